"""docs/families.md, made from the rows of benchmarks.families."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.family_checks import GRADIENT_LIMIT, LOGPROB_LIMIT

MODES = (
    "padded",
    "packed",
    "checkpointed",
    "packed, checkpointed",
    "dropout",
    "bfloat16",
    "LoRA",
    "export",
    "sync",
    "sampling",
)
_HEAD = "model type, plain, padded, gradient, packed, checkpointed, both, dropout, bf16, LoRA, export, sync, sampling"
Row = Mapping[str, Any]

INTRODUCTION = """\
# Model families

Every causal language model that transformers {transformers} can make ({count} model types of AutoModelForCausalLM), as
a tiny model with random weights, through the trainer's own doors: log-probs against `model(...).logits` of the plain
model in float64 (in float32 where its code knows nothing wider; so marked), one sequence at a time, and the gradient
of a weighted sum of them. On a CPU, in float32 where nothing else is said; attention is SDPA, or where the family has
no other `model.attn_implementation: eager` (so marked). A tiny model shows that the arithmetic is the family's own. It
says nothing about speed, memory or how well a family learns.

| outcome | families |
|---|---|
{outcomes}

Made by `python -m benchmarks.families`, then `python -m benchmarks.run_tables`, from commit {commit}.

| column | what runs | the number |
|---|---|---|
| plain | transformers' own float32 | largest error of a log-prob, nats: the yardstick |
| padded | `engine.packing: padded` | the same of ours; then the relative error of the worst parameter's gradient |
| packed | `engine.packing: packed`, three sequences in one row | log-prob error |
| checkpointed, both | `model.gradient_checkpointing`, alone and packed | log-prob error |
| dropout | checkpointed, every dropout of the configuration at 0.2 | log-prob error: nothing may be dropped |
| bf16 | `model.dtype: bfloat16`, padded | log-prob error, at most twice transformers' own in bfloat16 plus 0.05 |
| LoRA | `model.lora` on all linear layers, adapters not zero; its merged export too | log-prob error |
| export | changed weights; named as `save_pretrained` does it, all found by transformers | log-prob error |
| sync | changed weights into the HF sampler, all of them | gap between its log-probs and the trainer's |
| sampling | the HF sampler draws from prompts of three lengths at once | error of the log-probs it reports |

Limits: {logprob:g} nats, and {gradient:g} of a gradient in every mode that has one; in bf16 it is only finite.
A letter stands for a refusal before the first step; the sentences are below the tables.
"""


def page(rows: Sequence[Row]) -> str:
    """The whole page in Markdown."""
    groups = {outcome: [row for row in rows if outcome_of(row) == outcome] for outcome in OUTCOMES}
    reasons = _Reasons()
    parts = [
        INTRODUCTION.format(
            transformers=_only(row["versions"]["transformers"] for row in rows),
            count=len(rows),
            outcomes="\n".join(f"| {text} | {len(groups[outcome])} |" for outcome, text in OUTCOMES.items()),
            commit=_only((row["commit"] or "?")[:12] for row in rows),
            logprob=LOGPROB_LIMIT,
            gradient=GRADIENT_LIMIT,
        )
    ]
    tables = [outcome for outcome in ("wrong", "right", "partly") if groups[outcome]]
    parts += [f"## {OUTCOMES[outcome]}\n\n{_table(groups[outcome], reasons)}" for outcome in tables]
    if reasons.letters:
        parts.append(f"### Why a mode is refused\n\n{reasons.table()}")
    if groups["refused"]:
        parts.append(
            f"## {OUTCOMES['refused']}\n\n" + _reasons_table((r, r["padded"]["message"]) for r in groups["refused"])
        )
    if groups["not run"]:
        parts.append(f"## {OUTCOMES['not run']}\n\n{_reasons_table([(r, r['not_run']) for r in groups['not run']])}")
    return "\n\n".join(parts) + "\n"


OUTCOMES = {
    "right": "Right in every mode",
    "partly": "Right, some modes refused",
    "refused": "Refused when the model is loaded",
    "wrong": "Wrong, or a traceback",
    "not run": "Not run: there is no tiny model, or transformers alone does not compute it",
}


def outcome_of(row: Row) -> str:
    """The key of OUTCOMES for a family's row."""
    if "not_run" in row:
        return "not run"
    found = {row[mode]["status"] for mode in MODES if mode in row}
    if found & {"wrong", "traceback"}:
        return "wrong"
    return "right" if found == {"right"} else "refused" if row["padded"]["status"] == "refused" else "partly"


class _Reasons:
    """Letters for sentences of refusal, in the order in which they come."""

    def __init__(self) -> None:
        self.letters: dict[str, str] = {}

    def letter(self, row: Row, found: Row) -> str:
        sentence = _without_name(row, found["message"])
        return self.letters.setdefault(sentence, _letters(len(self.letters)))

    def table(self) -> str:
        lines = ["| | sentence |", "|---|---|"]
        return "\n".join(lines + [f"| {letter} | {_cell(sentence)} |" for sentence, letter in self.letters.items()])


def _table(rows: Iterable[Row], reasons: _Reasons) -> str:
    lines = [f"| {_HEAD.replace(', ', ' | ')} |", "|" + "---|" * 13]
    for row in rows:
        cells = [_number(row["plain_error"])]
        for mode in MODES:
            found = row[mode]
            shown = {"refused": reasons.letter, "right": _logprob_error}.get(found["status"], _loud)
            cells.append(shown(row, found))
            if mode == "padded":
                cells.append(_number(found["gradient_error"]))
        marks = [row["attention"]] * (row["attention"] != "sdpa") + ["float32"] * (row["truth"] != "torch.float64")
        name = f"{row['family']} ({', '.join(marks)})" if marks else row["family"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _reasons_table(pairs: Iterable[tuple[Row, str]]) -> str:
    """Families by the sentence that they share."""
    families: dict[str, list[str]] = {}
    for row, message in pairs:
        families.setdefault(_without_name(row, message), []).append(row["family"])
    lines = ["| model types | reason |", "|---|---|"]
    return "\n".join(lines + [f"| {', '.join(names)} | {_cell(sentence)} |" for sentence, names in families.items()])


def _without_name(row: Row, message: str) -> str:
    """The sentence without what differs between families that it says the same of: name, class, measured size."""
    names = sorted({row["family"], row.get("class") or row["family"], f"{row['family']}_text"}, key=len, reverse=True)
    message = re.sub(rf"\b({'|'.join(map(re.escape, names))})\b", "MODEL_TYPE", message)
    return re.sub(r"\d+(\.\d+)?(e[-+]?\d+)? nats|(?<=rounding: )[\d.e-]+", "X nats", message).replace("X nats)", "X)")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _logprob_error(_: Row, found: Row) -> str:
    return _number(found["logprob_error"])


def _loud(_: Row, found: Row) -> str:
    return f"**{found['status']}**"


def _number(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-")


def _letters(index: int) -> str:
    return chr(ord("a") + index) if index < 26 else _letters(index // 26 - 1) + _letters(index % 26)


def _only(values: Iterable[str]) -> str:
    """The one value, or all of them."""
    return ", ".join(sorted(set(values)))
