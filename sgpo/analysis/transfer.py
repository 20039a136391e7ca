"""Whose strategy goes to which problem: seeded assignments, and guidance that is empty but as long as the real one.

Arms, each with `samples` completions per problem:
  none         the plain prompt
  own          the problem's own strategy
  same_type    the strategy of another problem of its type
  other_type   the strategy of a random problem of another type
  placeholder  no words, as many tokens as the own strategy
  matrix       (type A, type B): strategies of A on problems of B, a number of draws per cell, never a problem's own
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

from sgpo.types import Problem, SgpoError
from sgpo.utils.seeds import seed_of

ARMS = ("none", "own", "same_type", "other_type", "placeholder")
FOREIGN = ("same_type", "other_type", "matrix")
MATRIX = "matrix"
_TRIES = 8  # of a placeholder's length
_STATED_TYPE = re.compile(
    r"^[ \t#*_]*(?:problem )?type[ \t*_]*:[ \t*_]*(.+?)[ \t*_]*(?=$|[ .]*\bstrategy[ \t*_]*:)",
    re.IGNORECASE | re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Draw:
    """One completion to sample: the `sample`-th of an arm for a problem, with the guidance of problem `source`."""

    arm: str
    problem: int
    sample: int
    source: int | None


def guidance_text(problem: Problem) -> str:
    """All words of the guidance: the strategy, and what stands in the chat turns."""
    return "\n".join(filter(None, (problem.strategy, *(turn.content for turn in problem.guidance_turns))))


def stated_type(strategy: str | None) -> str | None:
    """The first part of a strategy ("Problem type: ..."), in lower case and without a full stop; None without one."""
    match = _STATED_TYPE.search(strategy or "")
    return " ".join(match[1].casefold().split()).rstrip(" .") or None if match else None


def types_of(problems: Sequence[Problem], how: str, clusters: Sequence[int]) -> list[str | None]:
    """The type of every problem, None where it has none: `how` is "stated", "clusters" or a field of the data.

    Raises SgpoError where no problem has a type.
    """
    if how == "clusters":
        return [f"cluster {label + 1}" for label in clusters]
    if how == "stated":
        types = [stated_type(problem.strategy) for problem in problems]
    else:
        types = [None if (value := p.extra.get(how)) is None else str(value) for p in problems]
    if not any(types):
        what = "strategy states its problem type" if how == "stated" else f"row has a field {how!r}"
        raise SgpoError(f"no {what}; set analyze.types to a field of the data that names the type, or to clusters")
    return types


def with_guidance_of(problem: Problem, source: Problem) -> Problem:
    """`problem` with the strategy or chat turns of `source` in place of its own."""
    return replace(
        problem,
        id=f"{problem.id} with the strategy of {source.id}",
        strategy=source.strategy,
        guidance_turns=source.guidance_turns,
    )


def assign(
    problem_ids: Sequence[str], types: Sequence[str | None], *, samples: int, partners: int, seed: int
) -> list[Draw]:
    """The draws of the five arms. A problem without a partner has none in that arm.

    Partners are drawn once per problem and arm, from (seed, arm, id) alone, and take turns over the samples.
    """
    of_type: dict[str, list[int]] = {}
    for i, kind in enumerate(types):
        if kind is not None:
            of_type.setdefault(kind, []).append(i)
    draws: list[Draw] = []
    for i, kind in enumerate(types):
        same = [j for j in of_type.get(kind, ()) if j != i] if kind is not None else []
        other = [j for name, members in of_type.items() if name != kind for j in members] if kind is not None else []
        draws += [Draw("none", i, k, None) for k in range(samples)]
        draws += [Draw("own", i, k, i) for k in range(samples)]
        for arm, pool in (("same_type", same), ("other_type", other)):
            chosen = _rng(seed, arm, problem_ids[i]).sample(pool, min(partners, len(pool)))
            draws += [Draw(arm, i, k, chosen[k % len(chosen)]) for k in range(samples) if chosen]
        draws += [Draw("placeholder", i, k, i) for k in range(samples)]
    return draws


def matrix_types(types: Sequence[str | None], most: int) -> list[str]:
    """The `most` frequent types, in alphabetical order; a tie goes to the name that comes first."""
    counts = Counter(kind for kind in types if kind is not None)
    return sorted(sorted(counts, key=lambda kind: (-counts[kind], kind))[:most])


def assign_matrix(
    types: Sequence[str | None], names: Sequence[str], *, draws: int, seed: int
) -> dict[tuple[str, str], list[Draw]]:
    """By (type of the strategy, type of the problem) the draws of that cell: problems in turn, sources at random."""
    of_type = {name: [i for i, kind in enumerate(types) if kind == name] for name in names}
    cells = {}
    for source, target in product(names, names):
        rng = _rng(seed, MATRIX, source, target)
        targets = rng.sample(of_type[target], len(of_type[target]))
        pools = [(i, [j for j in of_type[source] if j != i]) for i in targets]
        turns = [(i, pool) for i, pool in pools if pool]
        chosen = [turns[k % len(turns)] for k in range(draws if turns else 0)]
        cells[source, target] = [Draw(MATRIX, i, k, rng.choice(pool)) for k, (i, pool) in enumerate(chosen)]
    return cells


def placeholder(
    problem: Problem, unit: str, target: int, count_of: Callable[[str], int], length_of: Callable[[Problem], int]
) -> tuple[Problem, int]:
    """The problem with repetitions of `unit` in place of every text of its guidance, and its length less `target`.

    Args:
        target: tokens of the guided prompt that is to be matched.
        count_of: tokens of a text. length_of: tokens of a problem's guided prompt.
    """
    texts = [problem.strategy or "", *(turn.content for turn in problem.guidance_turns)]
    per_unit = max(count_of(" ".join([unit] * 16)) / 16, 1.0)
    counts = [max(round(count_of(text) / per_unit), 1) if text else 0 for text in texts]
    longest = counts.index(max(counts))
    best: tuple[Problem, int] | None = None
    for _ in range(_TRIES):
        fillers = [" ".join([unit] * count) for count in counts]
        turns = tuple(
            replace(turn, content=text) for turn, text in zip(problem.guidance_turns, fillers[1:], strict=True)
        )
        empty = replace(
            problem,
            id=f"{problem.id} with a placeholder",
            strategy=fillers[0] if problem.strategy else problem.strategy,
            guidance_turns=turns,
        )
        excess = length_of(empty) - target
        if best is None or abs(excess) < abs(best[1]):
            best = empty, excess
        if excess == 0:
            break
        counts[longest] = max(1, counts[longest] - (round(excess / per_unit) or (1 if excess > 0 else -1)))
    assert best is not None
    return best


def _rng(seed: int, *parts: str) -> random.Random:
    return random.Random(seed_of(seed, "strategies analyze", *parts))
