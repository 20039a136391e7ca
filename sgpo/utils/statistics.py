"""Intervals and tests over problems and samples: what an evaluation may claim. All in fp64, all seeded.

An unpaired statement is about the mean over problems; a paired one about the differences, problem by problem (or seed
by seed), of two runs over the same problems.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

_EXACT_SIGNS = 16  # up to so many differences the permutation test goes through all 2^n signs
_BLOCK = 2**22  # numbers that one block of resamples may hold: all at once would take gigabytes for a large test set


def bootstrap_interval(
    values: Sequence[float], *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean of `values` (one per problem) under resampling of the problems."""
    data = torch.tensor(values, dtype=torch.float64)

    def means(count: int, generator: torch.Generator) -> torch.Tensor:
        return data[torch.randint(len(data), (count, len(data)), generator=generator)].mean(1)

    return _percentiles(_resampled(means, resamples, len(data), seed), level)


def nested_bootstrap_interval(
    samples: Sequence[Sequence[float]], *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Interval of the mean over problems of the mean over samples, resampling problems and, within each, samples.

    Wider than that of the problems alone: it also holds the noise of having drawn k samples and no others (which the
    spread between problems partly contains already, so it errs on the wide side). `samples` has one row per problem;
    the rows may differ in length.
    """
    lengths = torch.tensor([len(row) for row in samples])
    data = torch.zeros(len(samples), int(lengths.max()), dtype=torch.float64)
    for i, row in enumerate(samples):
        data[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
    problems, longest = data.shape

    def means(count: int, generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(problems, (count, problems), generator=generator)
        uniform = torch.rand((count, problems, longest), generator=generator, dtype=torch.float64)
        drawn = (uniform * lengths[chosen][..., None]).long()
        kept = torch.arange(longest) < lengths[chosen][..., None]
        return ((data[chosen[..., None], drawn] * kept).sum(-1) / lengths[chosen]).mean(1)

    return _percentiles(_resampled(means, resamples, problems * longest, seed), level)


def permutation_p_value(differences: Sequence[float], *, permutations: int = 20_000, seed: int = 0) -> float:
    """Two-sided p-value of mean(differences) = 0 under random signs, exact for up to 16 differences.

    The smallest p of n pairs is 2 / 2^n: five seeds cannot go below 0.0625. Beyond 16, the observed signs count as one
    of the draws, so that p is never 0.
    """
    data = torch.tensor(differences, dtype=torch.float64)
    data = data[data != 0]  # a zero keeps its value under either sign
    if len(data) == 0:
        return 1.0
    observed = data.mean().abs() - 1e-12
    if len(data) <= _EXACT_SIGNS:
        bits = torch.arange(2 ** len(data))[:, None] >> torch.arange(len(data)) & 1
        return float(((bits * 2 - 1) * data).mean(1).abs().ge(observed).double().mean())

    def means(count: int, generator: torch.Generator) -> torch.Tensor:
        signs = torch.randint(2, (count, len(data)), generator=generator) * 2 - 1
        return (signs * data).mean(1)

    hits = int(_resampled(means, permutations, len(data), seed).abs().ge(observed).sum())
    return (hits + 1) / (permutations + 1)


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """Chance that at least one of k of the `samples` completions, drawn without replacement, is correct."""
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs at least {k} samples per problem, got {samples}; draw more or lower k")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def t_interval(values: Sequence[float], *, level: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean of a few runs (seeds); infinite for a single one."""
    data = torch.tensor(values, dtype=torch.float64)
    mean = float(data.mean())
    if len(data) < 2:
        return -math.inf, math.inf
    half = _t_quantile(1 - (1 - level) / 2, len(data) - 1) * float(data.std()) / math.sqrt(len(data))
    return mean - half, mean + half


def _t_quantile(p: float, freedom: int) -> float:
    """Quantile of Student's t by bisection of its distribution function (integrated over the angle)."""

    def below(t: float) -> float:
        # t = sqrt(n) tan(a) turns the density into cos(a)^(n-1) on (-pi/2, pi/2).
        end = math.atan(t / math.sqrt(freedom))
        angles = torch.linspace(0, end, 4001, dtype=torch.float64)
        constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
        return 0.5 + constant * float(torch.trapezoid(torch.cos(angles) ** (freedom - 1), angles))

    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < p else (low, middle)
    return (low + high) / 2


def _resampled(
    draw: Callable[[int, torch.Generator], torch.Tensor], count: int, numbers_each: int, seed: int
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    block = max(1, _BLOCK // numbers_each)
    return torch.cat([draw(min(block, count - start), generator) for start in range(0, count, block)])


def _percentiles(values: torch.Tensor, level: float) -> tuple[float, float]:
    tail = (1 - level) / 2
    low, high = torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high
