"""Are two formulas equal? Asked of Math-Verify, in processes that can be killed: some formulas never end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sgpo.rewards.pool import RewardItem, RewardPool
from sgpo.strategies.settings import LeakConfig


@contextmanager
def formula_comparer(config: LeakConfig) -> Iterator[Any]:
    """A function from pairs of formulas to True, False or None (undecided); its processes start with the first pair."""
    pools: list[RewardPool] = []

    def equal(pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
        if not pairs:
            return []
        if not pools:
            reward = "sgpo.rewards.equality:formulas_equal"
            limits = {"timeout_s": config.timeout_s, "memory_mib": config.memory_mib}
            pools.append(RewardPool(reward, workers=config.workers, **limits))  # pyright: ignore
        results = [pools[0].submit(RewardItem(ours, gold)) for gold, ours in pairs]
        return [result.reward > 0 if result.status == "ok" else None for result in (v.result() for v in results)]

    try:
        yield equal
    finally:
        for pool in pools:
            pool.close()
