"""The processes of a run: who am I, and the few small exchanges of plain values between ranks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from sgpo.types import SgpoError

# What gloo and NCCL say when another process is gone.
_LOST_PROCESS = ("Timed out", "timed out", "Connection closed by peer", "Connection reset by peer", "pair closure")


def rank() -> int:
    """Number of this process among all of the run, from 0."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Number of this process on its host, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this process is the one that writes files."""
    return rank() == 0


def barrier() -> None:
    """Waits until every process is here."""
    if dist.is_initialized() and world_size() > 1:
        dist.barrier()


def wait_for_gloo() -> None:
    """Before the interpreter ends: gloo's own thread lets go of the last collective a moment after it, for which it
    needs the interpreter; without, the process aborts (torch 2.13; about half of all exits right after one)."""
    if dist.is_initialized() and dist.get_backend() == "gloo":
        time.sleep(0.2)


def gather(value: Any) -> list[Any]:
    """The picklable `value` of every rank, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast(value: Any) -> Any:
    """Rank 0's picklable `value`, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_rank_zero_first(action: Callable[[], Any]) -> Any:
    """Runs `action` on rank 0; an SgpoError there is raised on every rank instead of leaving the others waiting."""
    outcome: Any = None
    if is_main():
        try:
            outcome = (action(), None)
        except SgpoError as error:
            outcome = (None, str(error))
    value, problem = broadcast(outcome)
    if problem is not None:
        raise SgpoError(problem)
    return value


@contextmanager
def name_lost_process(timeout_s: float, where: Callable[[], str]) -> Iterator[None]:
    """Says at which stage another process was lost; gloo only knows that it was."""
    try:
        yield
    except RuntimeError as error:
        lost = next((words for words in _LOST_PROCESS if words in str(error)), None)
        if lost is None:
            raise
        raise SgpoError(
            f"{where()}: another process of the run died or gave no answer within run.timeout_s = "
            f"{timeout_s:.0f} s (its own output says why); the last checkpoint is whole"
        ) from error


_NOTHING = float("-inf")  # as a maximum


class Meter:
    """Weighted means, sums and maxima of a step, over all that is added on all ranks."""

    def __init__(self) -> None:
        self._means: dict[str, tuple[float, float]] = {}
        self._sums: dict[str, float] = {}
        self._maxima: dict[str, float] = {}

    def declare(self, *, means: Iterable[str] = (), sums: Iterable[str] = (), maxima: Iterable[str] = ()) -> None:
        """Names that the step has whether or not anything is added to them."""
        for name in means:
            self.mean(name, 0.0, 0.0)
        for name in sums:
            self.sum(name, 0.0)
        self.maxima(dict.fromkeys(maxima, _NOTHING))

    def mean(self, name: str, total: float, weight: float) -> None:
        """Adds `weight` observations that sum to `total`."""
        old_total, old_weight = self._means.get(name, (0.0, 0.0))
        self._means[name] = (old_total + float(total), old_weight + float(weight))

    def means(self, name: str, values: Iterable[float]) -> None:
        """Adds these observations."""
        values = list(values)
        self.mean(name, sum(values), len(values))

    def sum(self, name: str, value: float) -> None:
        """Adds to a sum."""
        self._sums[name] = self._sums.get(name, 0.0) + float(value)

    def max(self, name: str, value: float) -> None:
        """Raises a maximum."""
        self._maxima[name] = max(self._maxima.get(name, _NOTHING), float(value))

    def maxima(self, values: Mapping[str, float]) -> None:
        """Raises several maxima."""
        for name, value in values.items():
            self.max(name, value)

    def reduce(self) -> dict[str, float | None]:
        """One value per name over all ranks; a mean or maximum of nothing is None. Every rank must call it."""
        merged = Meter()
        for other in gather((self._means, self._sums, self._maxima)):
            merged._merge(*other)
        means = {name: total / weight if weight else None for name, (total, weight) in merged._means.items()}
        maxima = {name: None if value == _NOTHING else value for name, value in merged._maxima.items()}
        return {**means, **merged._sums, **maxima}

    def _merge(
        self, means: Mapping[str, tuple[float, float]], sums: Mapping[str, float], maxima: Mapping[str, float]
    ) -> None:
        for name, (total, weight) in means.items():
            self.mean(name, total, weight)
        for name, value in sums.items():
            self.sum(name, value)
        for name, value in maxima.items():
            self.max(name, value)
