r"""`sgpo verify`: the reward of an answer and why, step by step, or the rewards of a file of pairs."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgpo.rewards.answers import last_boxed, wrap_boxed
from sgpo.rewards.golds import text_fault
from sgpo.rewards.pool import RewardItem, RewardPool
from sgpo.rewards.worker_process import Outcome
from sgpo.types import SgpoError
from sgpo.utils.config_file import no_words

SETTINGS = None

_SHOWN_CHARS = 60


@dataclass(frozen=True, slots=True)
class _Pair:
    item: RewardItem
    label: bool | None
    where: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A pair or a file of pairs, and the reward."""
    parser.add_argument("gold", nargs="?", metavar="GOLD", help=r"the right answer, e.g. '\frac{1}{2}'")
    parser.add_argument("answer", nargs="?", metavar="ANSWER", help="a completion; without a box, the content of one")
    parser.add_argument(
        "--file",
        type=Path,
        help='JSONL of pairs: {"gold": ..., "completion" or "answer": ..., "label": 0 or 1 if known}',
    )
    parser.add_argument("--reward", default="math_verify", help='"math_verify", "exact" or "package.module:function"')
    parser.add_argument("--problem", default="", help="the problem's text, for a reward of your own that reads it")
    parser.add_argument(
        "--no-require-box", action="store_true", help="the completion as it is: without a box its text is searched"
    )
    parser.add_argument("--timeout", type=float, default=10.0, metavar="S", help="seconds for one result (10)")
    parser._negative_number_matcher = re.compile(r"-(?!-)")  # pyright: ignore -- "-\frac12" is an answer, no option


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Prints the steps to one result, or one line per row and the totals; exit code 0 whatever they say."""
    no_words(words)
    if (arguments.file is None) == (arguments.answer is None) or (arguments.file and arguments.gold):
        raise SgpoError("give GOLD and ANSWER, or --file with pairs: sgpo verify '\\frac12' 0.5")
    pairs = _file_pairs(arguments.file, arguments) if arguments.file else [_one_pair(arguments)]
    with RewardPool(
        arguments.reward, workers=1, timeout_s=arguments.timeout, require_box=not arguments.no_require_box
    ) as pool:
        if arguments.file is None:
            _print_steps(pairs[0].item, pool.explain(pairs[0].item))
        else:
            _print_rows(pairs, pool)
    return 0


def _one_pair(arguments: argparse.Namespace) -> _Pair:
    completion = _completion(arguments.answer, arguments)
    if completion != arguments.answer:
        print("the answer has no box: taken as the content of one")
    return _Pair(RewardItem(completion, arguments.gold, arguments.problem), None, "")


def _completion(answer: str, arguments: argparse.Namespace) -> str:
    """An answer without a box as a completion; a reward of the user's own sees what is given."""
    is_bare = arguments.reward in ("math_verify", "exact") and not arguments.no_require_box
    return wrap_boxed(answer) if is_bare and last_boxed(answer) is None else answer


def _print_steps(item: RewardItem, outcome: Outcome) -> None:
    if fault := text_fault(item.gold):
        print(f"the gold answer {fault}: a run would refuse its row (data.bad_golds)")
    for step in outcome.steps:
        print(step)
    if outcome.cause:
        print(outcome.cause)
    print(f"result: {_in_words(outcome)}")


def _print_rows(pairs: Sequence[_Pair], pool: RewardPool) -> None:
    counts, disagreements = Counter[str](), 0
    for pair in pairs:
        outcome = pool.explain(pair.item)
        is_right = outcome.result.reward > 0
        counts["right" if is_right else "wrong"] += 1
        differs = pair.label is not None and pair.label != is_right
        disagreements += differs
        answer = last_boxed(pair.item.completion) or pair.item.completion
        reason = outcome.steps[-1] if outcome.steps else outcome.cause
        shown = " | ".join((_in_words(outcome), _one_line(pair.item.gold), _one_line(answer), reason))
        print(f"{pair.where}: {shown}{' | disagrees with its label' if differs else ''}")
    labels = sum(pair.label is not None for pair in pairs)
    said = f"; {disagreements} of {labels} labels disagree" if labels else ""
    print(f"{len(pairs)} rows: {counts['right']} right, {counts['wrong']} wrong{said}")


def _in_words(outcome: Outcome) -> str:
    result = outcome.result
    status = "" if result.status == "ok" else f", status {result.status}"
    return f"{'right' if result.reward > 0 else 'wrong'}, reward {result.reward:g}{status}"


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."


def _file_pairs(path: Path, arguments: argparse.Namespace) -> list[_Pair]:
    pairs = [_row_pair(row, where, arguments) for where, row in _rows(path)]
    if not pairs:
        raise SgpoError(f"{path} has no rows: expected JSONL with a gold and a completion or an answer in each line")
    return pairs


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise SgpoError(f"cannot read {path}: {error.strerror}; expected a JSONL file of pairs") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except ValueError:
                raise SgpoError(f"{path}:{number}: not valid JSON; expected one object a line") from None


def _row_pair(row: Any, where: str, arguments: argparse.Namespace) -> _Pair:
    if not isinstance(row, dict) or not isinstance(row.get("gold"), str):
        raise SgpoError(f'{where}: expected an object with "gold", a string, and "completion" or "answer"')
    if isinstance(row.get("completion"), str):
        completion = row["completion"]
    elif isinstance(row.get("answer"), str):
        completion = _completion(row["answer"], arguments)
    else:
        raise SgpoError(f'{where}: expected "completion" (a whole text) or "answer" (what stands in the box), a string')
    if row.get("label") not in (None, 0, 1):
        raise SgpoError(f'{where}: "label" must be 0 or 1, got {row["label"]!r}')
    label = None if row.get("label") is None else bool(row["label"])
    return _Pair(RewardItem(completion, row["gold"], str(row.get("problem", arguments.problem))), label, where)
