"""Which problems a step takes: every epoch is a new order of all of them, decided by the seed alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sgpo.utils import distributed
from sgpo.utils.seeds import seed_of


def epoch_order(count: int, *, seed: int, epoch: int) -> Sequence[int]:
    """Order of `count` problems in an epoch, as indices."""
    generator = torch.Generator().manual_seed(seed_of(seed, "order", epoch))
    return torch.randperm(count, generator=generator).tolist()


def problems_of_step(count: int, *, per_step: int, seed: int, step: int) -> list[int]:
    """This rank's problem indices of a step: a new order each epoch, an incomplete last step of an epoch is dropped."""
    epoch, position = divmod(step, count // per_step)
    chosen = epoch_order(count, seed=seed, epoch=epoch)[position * per_step : (position + 1) * per_step]
    return list(chosen[distributed.rank() :: distributed.world_size()])
