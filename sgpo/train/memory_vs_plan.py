"""Was the plan right? The highest peak of memory in the steps of a run, and the plan's number for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sgpo.config import Config
from sgpo.planning.architectures import find_architecture
from sgpo.planning.memory import Phase, Planner
from sgpo.planning.plan import find_place
from sgpo.types import SgpoError
from sgpo.utils import distributed

_PHASES = ("rollout", "score", "forward", "backward", "optimizer", "sync")  # of a step
# Terms that the measured side does not see: memory outside torch's allocator, other processes; and on a CPU the plan's
# constant for a process, in place of which stands what this one held before.
_UNSEEN = ("CUDA context", "reward workers", "processes")
_ENGINE = ("engine's weights", "KV cache", "engine's activations", "engine asleep")


class MemoryTracker:
    """Peaks of this process in MiB: of what torch has allocated on the GPU, on a CPU of resident memory (Linux).

    The plan counts sequences of full length, which the worst-case step has; an ordinary one needs less.

    Args:
        planned: bytes; see `planned_peak`.
        asleep: bytes of a sleeping rollout engine that torch counts as allocated.
    """

    def __init__(self, planned: float | None, asleep: Callable[[], int] = lambda: 0) -> None:
        self._planned, self._asleep = planned, asleep
        self._highest: float | None = None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """The highest peak within counts."""
        reset_peak()
        yield
        self.read()

    def read(self) -> float | None:
        """The peak since the last call, which counts; None where the system does not tell.

        To be called before the rollout engine falls asleep or wakes.
        """
        peak = peak_bytes()
        reset_peak()
        if peak is None:
            return None
        mib = (peak - self._asleep()) / 2**20
        self._highest = max(mib, self._highest or 0.0)
        return mib

    def summary(self) -> dict[str, float | None]:
        """Planned and measured MiB on the fullest rank, and planned / measured; None what is not known. Collective."""
        planned = None if self._planned is None else self._planned / 2**20
        measured = max((peak for peak in distributed.gather(self._highest) if peak is not None), default=None)
        return {
            "planned_mib": None if planned is None else round(planned, 1),
            "measured_mib": None if measured is None else round(measured, 1),
            "ratio": round(planned / measured, 4) if planned and measured else None,
        }


def planned_peak(config: Config, model_folder: Path) -> float | None:
    """Bytes that the plan foresees for one process in a step here; None where the model's sizes cannot be read.

    To be called before the model is loaded: on a CPU, what the process holds now stands for the plan's constant.
    """
    place = find_place(config, here=True)
    try:
        phases = Planner(config, find_architecture(str(model_folder)), place).plan().phases
    except SgpoError:
        return None
    unseen = _UNSEEN + _ENGINE * (config.rollout.placement == "process")
    before = 0.0 if place.gpu_bytes is not None else _status("VmRSS")

    def seen(phase: Phase) -> float:
        terms = phase.gpu or {name: size / place.per_host for name, size in phase.host.items()}
        return (before or 0.0) + sum(size for name, size in terms.items() if name not in unseen)

    return max(seen(phases[name]) for name in _PHASES)


def peak_bytes() -> float | None:
    """The highest since the last `reset_peak`."""
    return float(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else _status("VmHWM")


def reset_peak() -> None:
    """The peak counts anew from here on."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts anew
    except OSError:
        return


def _status(name: str) -> float | None:
    """A size of this process in bytes; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)
