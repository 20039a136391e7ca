"""What the samples of the arms say: pass rates and paired differences with intervals, whom guidance helps and hurts.

A problem is the unit of every interval and test: its samples are averaged first, then problems are resampled.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from sgpo.utils.statistics import bootstrap_interval, permutation_p_value

Outcomes = Mapping[int, Sequence[bool]]
"""Problem -> whether each of its completions in one arm is correct."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over `problems` with its 95 % interval; all None without problems, no interval with a single one."""

    mean: float | None
    low: float | None
    high: float | None
    problems: int


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean over the problems of both arms of rate(first) - rate(second); p under random signs."""

    first: str
    second: str
    difference: Estimate
    p_value: float


@dataclass(frozen=True, slots=True)
class HelpAndHarm:
    """How often an arm does better or worse than no guidance, problem by problem, and how often it would by chance.

    `higher`, `lower`, `equal`: plain comparison of the two pass rates. `helps`, `hurts`: that and Fisher's exact test
    (two-sided) at `level`. The `_by_chance` counts are what to expect of each if every completion of a problem were
    as likely correct with as without guidance, given how many of its completions are correct in all.
    """

    arm: str
    problems: int
    higher: int
    lower: int
    equal: int
    helps: int
    hurts: int
    higher_by_chance: float
    lower_by_chance: float
    helps_by_chance: float
    hurts_by_chance: float
    level: float


@dataclass(frozen=True, slots=True)
class Band:
    """Items whose value lies in [low, high], and what came of them."""

    low: float
    high: float
    items: int
    effect: Estimate


def rates(outcomes: Outcomes) -> dict[int, float]:
    """Problem -> share of its completions that are correct; problems without completions are left out."""
    return {problem: sum(passed) / len(passed) for problem, passed in outcomes.items() if passed}


def estimate(values: Sequence[float]) -> Estimate:
    """The mean over problems with its bootstrap interval; None where there are too few values."""
    if not values:
        return Estimate(None, None, None, 0)
    mean = sum(values) / len(values)
    if len(values) == 1:
        return Estimate(mean, None, None, 1)
    low, high = bootstrap_interval(values)
    return Estimate(mean, low, high, len(values))


def difference(first: str, second: str, arms: Mapping[str, Outcomes]) -> Difference:
    """Over the problems that have completions in both arms."""
    a, b = rates(arms[first]), rates(arms[second])
    gaps = [a[problem] - b[problem] for problem in a if problem in b]
    return Difference(first, second, estimate(gaps), permutation_p_value(gaps))


def help_and_harm(arm: str, with_guidance: Outcomes, without: Outcomes, level: float) -> HelpAndHarm:
    """Over problems: where guidance raises or lowers the pass rate, and where a test says so at `level`."""
    pairs = [
        (sum(passed), len(passed), sum(without[problem]), len(without[problem]))
        for problem, passed in with_guidance.items()
        if passed and without.get(problem)
    ]
    chances = [_chances(a + b, n, m, level) for a, n, b, m in pairs]
    signs = [_sign(a * m - b * n) for a, n, b, m in pairs]
    clear = [fisher_p_value(a, n, b, m) <= level for a, n, b, m in pairs]
    return HelpAndHarm(
        arm,
        problems=len(pairs),
        higher=signs.count(1),
        lower=signs.count(-1),
        equal=signs.count(0),
        helps=sum(sign > 0 and sure for sign, sure in zip(signs, clear, strict=True)),
        hurts=sum(sign < 0 and sure for sign, sure in zip(signs, clear, strict=True)),
        higher_by_chance=sum(chance[0] for chance in chances),
        lower_by_chance=sum(chance[1] for chance in chances),
        helps_by_chance=sum(chance[2] for chance in chances),
        hurts_by_chance=sum(chance[3] for chance in chances),
        level=level,
    )


def fisher_p_value(a: int, n: int, b: int, m: int) -> float:
    """Two-sided exact p of a correct out of n against b out of m: all splits of a + b as unlikely as this one."""
    weights = _splits(a + b, n, m)
    return sum(weight for weight in weights.values() if weight <= weights[a] * (1 + 1e-9))


@lru_cache(maxsize=4096)
def _splits(correct: int, n: int, m: int) -> dict[int, float]:
    """How likely each number of the `correct` falls to the first n of n + m completions (hypergeometric)."""
    total = math.comb(n + m, correct)
    return {
        a: math.comb(n, a) * math.comb(m, correct - a) / total for a in range(max(0, correct - m), min(n, correct) + 1)
    }


@lru_cache(maxsize=4096)
def _chances(correct: int, n: int, m: int, level: float) -> tuple[float, float, float, float]:
    """Chance of higher, lower, clearly higher, clearly lower under exchangeable completions."""
    found = [0.0, 0.0, 0.0, 0.0]
    for a, weight in _splits(correct, n, m).items():
        sign = _sign(a * m - (correct - a) * n)
        if sign:
            worse = sign < 0
            found[worse] += weight
            if fisher_p_value(a, n, correct - a, m) <= level:
                found[2 + worse] += weight
    return found[0], found[1], found[2], found[3]


def bands(values: Sequence[float], effects: Sequence[float], units: Sequence[int], count: int) -> list[Band]:
    """Items in up to `count` bins of equal size by value, equal values together; the effect is averaged per unit.

    Args:
        values, effects: one per item. units: what an item belongs to (a problem), the unit of the interval.
    """
    order = sorted(range(len(values)), key=lambda i: values[i])
    bins: dict[int, list[int]] = {}
    start = 0
    for _, equal in groupby(order, key=lambda i: values[i]):
        items = list(equal)
        middle = start + len(items) // 2
        bins.setdefault(middle * count // len(order), []).extend(items)
        start += len(items)
    return [
        Band(values[items[0]], values[items[-1]], len(items), estimate(_by_unit((units[i], effects[i]) for i in items)))
        for items in bins.values()
    ]


def _by_unit(pairs: Iterable[tuple[int, float]]) -> list[float]:
    found: dict[int, list[float]] = {}
    for unit, value in pairs:
        found.setdefault(unit, []).append(value)
    return [sum(values) / len(values) for values in found.values()]


def _sign(value: int) -> int:
    return (value > 0) - (value < 0)
