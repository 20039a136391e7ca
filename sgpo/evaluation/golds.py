"""Problems as they are before a run: those that no completion can answer right, and those that are there twice."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from sgpo.config import Config
from sgpo.data.problems import listing, normalised_text
from sgpo.rewards.answers import normalised
from sgpo.rewards.golds import gold_faults
from sgpo.types import Problem, SgpoError
from sgpo.utils.distributed import on_rank_zero_first


@dataclass(frozen=True, slots=True)
class Dropped:
    """A problem that is left out because of its answer."""

    id: str
    place: str
    answer: str
    reason: str

    def __str__(self) -> str:
        where = f"{self.place} ({self.id!r})" if self.place else f"problem {self.id!r}"
        return f"{where}: the answer {' '.join(self.answer.split())[:60]!r} {self.reason}"


def check_problems(
    config: Config, source: str, problems: list[Problem], report: Callable[[str], None]
) -> tuple[list[Problem], list[Dropped]]:
    """The problems whose answer can be reached, and those that data.bad_golds: drop leaves out. Collective.

    Args:
        report: takes a line on what is dropped, and one on duplicates.

    Raises:
        SgpoError: lists the bad answers where data.bad_golds is refuse; none is left.
    """
    golds, reward = [problem.answer for problem in problems], config.reward
    workers = max(reward.workers, min(os.cpu_count() or 1, 16))  # nothing else runs yet
    check = partial(gold_faults, golds, reward=reward.kind, workers=workers, timeout_s=reward.timeout_s)
    faults = on_rank_zero_first(check)
    bad = [Dropped(p.id, p.place, p.answer, faults[p.answer]) for p in problems if p.answer in faults]
    if bad:
        head = f"{source}: {len(bad)} of {len(problems)} problems have an answer that no completion can reach"
        if config.data.bad_golds == "refuse" or len(bad) == len(problems):
            ways = "correct or remove these rows, or set data.bad_golds to drop"
            raise SgpoError(listing(f"{head}; {ways}", list(map(str, bad))))
        report(listing(f"{head} and are left out", list(map(str, bad))))
    kept = [problem for problem in problems if problem.answer not in faults]
    if line := duplicates(source, kept):
        report(line)
    return kept, bad


def duplicates(source: str, problems: Sequence[Problem]) -> str:
    """What to say of problems with the same text (up to case and white space), and of different answers to one text;
    "" where there are none."""
    same: dict[str, list[Problem]] = {}
    for problem in problems:
        same.setdefault(normalised_text(problem.problem), []).append(problem)
    groups = [group for group in same.values() if len(group) > 1]
    if not groups:
        return ""
    line = f"{source}: {sum(map(len, groups)) - len(groups)} of {len(problems)} problems repeat the text of another"
    odd = [group for group in groups if len({normalised(problem.answer) for problem in group}) > 1]
    if not odd:
        return line
    answers = [", ".join(f"{p.place or p.id} {p.answer!r}" for p in group[:4]) for group in odd]
    return listing(f"{line}; {len(odd)} of these texts have different answers", answers)
