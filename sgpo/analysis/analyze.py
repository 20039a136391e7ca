"""`sgpo strategies analyze`: are strategies reusable? Samples every arm, measures, writes numbers, plots and raw rows.

Files in the output folder: `samples.jsonl` (every completion with its result; append-only, so that nothing is sampled
twice), `problems.jsonl` (one row per problem), `token_kl.jsonl` (token by token, of correct guided rollouts),
`analysis.json` (all numbers) and `report.html` with its plots.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from sgpo_kernels import linear_divergence

from sgpo.algorithm.loss import PLAIN, LogitTransform
from sgpo.analysis.design import Study, load_policy, load_study, make_design
from sgpo.analysis.report import write_analysis_report
from sgpo.analysis.results import Results
from sgpo.analysis.samples import Row, collect
from sgpo.analysis.settings import AnalyzeConfig
from sgpo.analysis.token_kl import TokenKl, summarize, token_pieces
from sgpo.analysis.transfer import Draw
from sgpo.builders.model_engine import resolve_model
from sgpo.engine.batching import Contexts, collate, length_sorted
from sgpo.model.loading import load_tokenizer
from sgpo.types import SgpoError
from sgpo.utils import distributed
from sgpo.utils.provenance import environment
from sgpo.utils.seeds import seed_of

ANALYSIS_FILE = "analysis.json"


def analyze(config: AnalyzeConfig) -> dict[str, Any]:
    """Runs or resumes the analysis; returns what it writes to analysis.json.

    Raises SgpoError for what is wrong with data or settings before anything is sampled.
    """
    if distributed.world_size() > 1:
        raise SgpoError("sgpo strategies analyze runs in one process; start it without torchrun")
    output = output_folder(config)
    folder = resolve_model(config)
    tokenizer = load_tokenizer(folder)
    study, without_guidance = load_study(config, folder, tokenizer)
    design = make_design(config, folder, tokenizer, study)
    rows = collect(config, folder, tokenizer, study, design, output / "samples.jsonl")
    token_kl = measure_token_kl(config, folder, tokenizer, study, rows)
    results = Results(config.analyze, study, design, rows)
    found = {
        "model": config.model.path,
        "problems": len(study.problems),
        "without_guidance": without_guidance,
        **results.numbers(),
        "token_kl": _kl_numbers(config, token_kl),
        "settings": config.model_dump(mode="json"),
        "environment": environment(),
    }
    text = json.dumps(found, default=asdict, indent=1, ensure_ascii=False)
    _write(output / "problems.jsonl", map(json.dumps, results.problem_rows()))
    _write(output / "token_kl.jsonl", (json.dumps(asdict(row)) for row in token_kl))
    _write(output / ANALYSIS_FILE, [text])
    found = json.loads(text)
    write_analysis_report(output, found)
    return found


def output_folder(config: AnalyzeConfig) -> Path:
    """analyze.output, or a folder of the run's own."""
    return Path(config.analyze.output or config.run.dir / "strategies")


def measure_token_kl(
    config: AnalyzeConfig, folder: Path, tokenizer: Any, study: Study, rows: Mapping[Draw, Row]
) -> list[TokenKl]:
    """d_t of some correct completions of the own strategy, at the sampling temperature, as the trainer would see it.

    First one of each problem, then a second one, up to analyze.kl_rollouts.
    """
    correct = [d for d, row in rows.items() if d.arm == "own" and row["reward"] > 0 and row["completion_ids"]]
    places = _places([draw.problem for draw in correct])
    lots = [seed_of(config.run.seed, "token kl", study.problems[draw.problem].id) for draw in correct]
    order = sorted(range(len(correct)), key=lambda k: (places[k], lots[k]))
    chosen = [correct[k] for k in order[: config.analyze.kl_rollouts]]
    if not chosen:
        return []
    completions = [rows[draw]["completion_ids"] for draw in chosen]
    plain = [study.prompts[draw.problem].plain for draw in chosen]
    guided = [study.prompts[draw.problem].guided or () for draw in chosen]
    kl = _divergences(config, folder, plain, guided, completions, tokenizer.pad_token_id)
    decode = partial(tokenizer.decode, skip_special_tokens=False)
    return [
        TokenKl(draw.problem, study.problems[draw.problem].id, draw.sample, token_pieces(ids, decode), tuple(values))
        for draw, ids, values in zip(chosen, completions, kl, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _Divergence:
    """KL(guided || plain) of every row; called where the model holds its head, as SgpoLoss is."""

    temperature: float
    impl: Literal["auto", "triton", "triton-nologits", "torch"]

    def __call__(
        self,
        head: torch.Tensor,
        bias: torch.Tensor | None,
        hidden: torch.Tensor,
        guided_hidden: torch.Tensor,
        rows: Contexts,
        *,
        logits: LogitTransform = PLAIN,
    ) -> torch.Tensor:
        _, stats = linear_divergence(
            hidden,
            guided_hidden,
            head,
            token_weight=torch.ones(len(hidden), device=hidden.device),
            bias=bias,
            impl=self.impl,
            **logits.options(self.temperature),
        )
        return stats.divergence


@torch.no_grad()
def _divergences(
    config: AnalyzeConfig,
    folder: Path,
    plain: Sequence[Sequence[int]],
    guided: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    pad_id: int,
) -> list[list[float]]:
    """KL(guided || plain) of every token of every completion, from hidden states; no logits are kept."""
    policy, device = load_policy(config, folder)

    divergence = _Divergence(config.rollout.temperature, config.engine.loss_impl)
    found: dict[int, list[float]] = {}
    lengths = [max(len(p), len(g)) + len(c) for p, g, c in zip(plain, guided, completions, strict=True)]
    for group in length_sorted(lengths, config.engine.micro_batch_tokens):
        after_plain, after_guided = (
            collate([prompts[i] for i in group], [completions[i] for i in group], pad_id).to(device)
            for prompts in (plain, guided)
        )
        values = policy(divergence, Contexts(after_plain, after_guided))
        parts = values.split([len(completions[i]) for i in group])
        found.update(zip(group, (part.tolist() for part in parts), strict=True))
    return [found[i] for i in range(len(completions))]


def _kl_numbers(config: AnalyzeConfig, rows: Sequence[TokenKl]) -> dict[str, Any] | None:
    if not rows:
        return None
    return summarize(rows, limit=config.algorithm.max_token_kl, pattern=config.analyze.step_pattern)


def _places(problems: Sequence[int]) -> list[int]:
    """How many of the same problem stand before each."""
    seen: dict[int, int] = {}
    places = []
    for problem in problems:
        places.append(seen.get(problem, 0))
        seen[problem] = places[-1] + 1
    return places


def _write(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
