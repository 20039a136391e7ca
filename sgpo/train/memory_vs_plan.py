"""Was the plan right? Peak memory of every stage of a step, and the plan's number for it divided by the peak."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from sgpo.config import Config
from sgpo.planning.architectures import find_architecture
from sgpo.planning.memory import Phase, Planner
from sgpo.planning.plan import find_place
from sgpo.train.step_metrics import Clock
from sgpo.types import SgpoError
from sgpo.utils.distributed import Meter

# Stage of the trainer's clock -> phases of the plan that it covers.
_COVERS = {
    "rollout": ("rollout",),
    "target": ("score",),
    "train": ("forward", "backward", "optimizer"),
    "sync": ("sync",),
    "worst_case": ("forward", "backward", "optimizer"),
}
# Terms that the measured side does not see: memory outside torch's allocator, other processes; and on a CPU the plan's
# constant for a process, in place of which stands what this one held before.
_UNSEEN = ("CUDA context", "reward workers", "processes")
_ENGINE = ("engine's weights", "KV cache", "engine's activations", "engine asleep")


class Gauge:
    """Peaks of this process in MiB: of what torch has allocated on the GPU, on a CPU of resident memory (Linux).

    The plan counts sequences of full length, which the worst-case step has; an ordinary one needs less.

    Args:
        planned: bytes by stage; see `planned_peaks`.
        asleep: bytes of a sleeping rollout engine that torch counts as allocated.
    """

    def __init__(self, planned: Mapping[str, float], asleep: Callable[[], int] = lambda: 0) -> None:
        self._planned, self._asleep = planned, asleep
        self.summary: dict[str, dict[str, float]] = {}
        reset_peak()

    def clock(self, meter: Meter) -> Clock:
        """Of a step that begins now, which reads the peaks of its stages into `meter`."""
        reset_peak()
        return Clock(meter, partial(self.read, meter))

    def read(self, meter: Meter, stage: str) -> None:
        """Adds peak_<stage>_mib, the peak since the last call. Nothing where the system does not tell."""
        if (peak := peak_bytes()) is not None:
            meter.max(f"peak_{stage}_mib", (peak - self._asleep()) / 2**20)
        reset_peak()

    @contextmanager
    def reading(self, stage: str) -> Iterator[None]:
        """A stage outside the steps, for the summary alone. Collective."""
        meter = Meter()
        reset_peak()
        yield
        self.read(meter, stage)
        self.compare(meter.reduce())

    def compare(self, values: dict[str, float | None]) -> None:
        """Adds plan_ratio_<stage>, planned / measured on the fullest rank; keeps the highest peaks for the summary."""
        for stage, planned in self._planned.items():
            if not (peak := values.get(f"peak_{stage}_mib")):
                continue
            ratio = values[f"plan_ratio_{stage}"] = round(planned / 2**20 / peak, 4)
            if peak > self.summary.get(stage, {}).get("measured_mib", 0.0):
                self.summary[stage] = {
                    "planned_mib": round(planned / 2**20, 1), "measured_mib": round(peak, 1), "ratio": ratio,
                }  # fmt: skip


def planned_peaks(config: Config, model_folder: Path) -> dict[str, float]:
    """Bytes by stage that the plan foresees for one process here; empty where the model's sizes cannot be read.

    To be called before the model is loaded: on a CPU, what the process holds now stands for the plan's constant.
    """
    place = find_place(config, here=True)
    try:
        phases = Planner(config, find_architecture(str(model_folder)), place).plan().phases
    except SgpoError:
        return {}
    unseen = _UNSEEN + _ENGINE * (config.rollout.placement == "process")
    before = 0.0 if place.gpu_bytes is not None else _status("VmRSS")

    def seen(phase: Phase) -> float:
        terms = phase.gpu or {name: size / place.per_host for name, size in phase.host.items()}
        return (before or 0.0) + sum(size for name, size in terms.items() if name not in unseen)

    return {stage: max(seen(phases[name]) for name in names) for stage, names in _COVERS.items()}


def peak_bytes() -> float | None:
    """The highest since the last `reset_peak`."""
    return float(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else _status("VmHWM")


def reset_peak() -> None:
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
