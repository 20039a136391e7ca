"""Bootstrap intervals of a mean over problems."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def bootstrap_interval(
    values: Sequence[float], *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean of `values` (one per problem) under resampling of the problems."""
    data = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    # In blocks: resamples x problems at once would take gigabytes for a large test set.
    block = max(1, 2**22 // len(data))
    means = torch.cat(
        [
            data[torch.randint(len(data), (min(block, resamples - start), len(data)), generator=generator)].mean(1)
            for start in range(0, resamples, block)
        ]
    )
    tail = (1 - level) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high
