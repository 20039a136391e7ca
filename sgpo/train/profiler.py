"""`sgpo train --profile`: a memory timeline of each step, the share of the device's peak rate in training.

One thread samples memory; nothing is added to the training's own path. On CUDA torch's allocator history of the first
profiled step is dumped as well (profile/memory-snapshot.pickle, for pytorch.org/memory_viz).
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sgpo.engine.step import MicroBatchResult
from sgpo.reporting.run_files import PROFILE_FILE
from sgpo.types import SgpoError, TrainSequence
from sgpo.utils import distributed
from sgpo.utils.distributed import Meter

_SAMPLE_S = 0.02
_POINTS = 1000  # of a step's timeline in the file
# Dense bf16 tera-operations per second, from the makers' data sheets; the first name that the card's holds counts.
_PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165, "B200": 2250}

Span = tuple[str, float, float]  # stage, start, end on time.monotonic


@dataclass(frozen=True, slots=True)
class ModelFlops:
    """Sizes of a decoder that decide its operations.

    backbone: parameters of its matrices, embeddings left out; head: vocabulary x hidden size; attention: layers x heads
    x head size.
    """

    backbone: int
    head: int
    attention: int

    @classmethod
    def of(cls, lm: Any) -> ModelFlops:
        """The numbers of a loaded model."""

        def size(parameter: torch.Tensor) -> int:
            return getattr(parameter, "ds_numel", parameter.numel())  # the whole one, under ZeRO-3 too

        settings, head = lm.config.get_text_config(), lm.get_output_embeddings().weight
        outer = {id(head), id(lm.get_input_embeddings().weight)}
        width = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
        return cls(
            backbone=sum(size(p) for p in lm.parameters() if id(p) not in outer),
            head=size(head),
            attention=settings.num_hidden_layers * settings.num_attention_heads * width,
        )

    def forward(self, tokens: int, rows: int) -> int:
        """Operations of one sequence: 2 per parameter and token, the head on its rows, half a square of attention."""
        return 2 * self.backbone * tokens + 2 * self.head * rows + 2 * self.attention * tokens**2

    def training(self, sequence: TrainSequence) -> int:
        """Forward, a backward of twice as much, and the teacher's forward. Recomputed activations do not count."""
        completion = len(sequence.completion_ids)
        total = 3 * self.forward(len(sequence.prompt_ids) + completion, completion)
        if sequence.distill_weight and sequence.teacher_prompt_ids is not None:
            total += self.forward(len(sequence.teacher_prompt_ids) + completion, completion)
        return total


def peak_flops(device: torch.device, dtype: str, given_tflops: float | None) -> float:
    """Operations per second to compare with: as given, the card's data sheet, or a CPU's own matrix product, timed."""
    if given_tflops is not None:
        return given_tflops * 1e12
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((rate for card, rate in _PEAK_TFLOPS.items() if card in name), None)
        if known is None:
            raise SgpoError(f"--profile does not know the peak rate of {name}; give it as log.peak_tflops")
        return known * 1e12
    size = 768
    matrix = torch.ones(size, size, dtype=getattr(torch, dtype))
    times = []
    for _ in range(4):
        start = time.perf_counter()
        _ = matrix @ matrix
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


class Profiler:
    """Samples memory from its start to `close`; `record` and `write` once per step.

    Memory is what torch has allocated on a GPU without the bytes of a sleeping engine (`asleep`), else the resident
    memory of the process, in MiB.
    """

    def __init__(
        self, run_dir: Path, lm: Any, *, device: torch.device, peak: float, asleep: Callable[[], int] = lambda: 0
    ) -> None:
        self._path = run_dir / PROFILE_FILE
        self._flops = ModelFlops.of(lm)
        self._device, self._peak, self._asleep = device, peak, asleep
        self._samples: list[tuple[float, float]] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="memory profile", daemon=True)
        self._timeline: dict[str, Any] = {}
        self._history = device.type == "cuda"
        if self._history:
            torch.cuda.memory._record_memory_history(max_entries=200_000)
        self._thread.start()

    def record(self, meter: Meter, spans: Sequence[Span], passes: Sequence[MicroBatchResult]) -> None:
        """Adds the step's operations (of all ranks) to `meter`, and takes the step's samples."""
        samples, self._samples = [*self._samples, self._now()], []
        meter.sum("train_flops", sum(self._flops.training(s) for done in passes for s in done.sequences))
        zero = spans[0][1]
        self._timeline = {
            "stages": [[name, round(start - zero, 3), round(end - zero, 3)] for name, start, end in spans],
            "memory": [[round(moment - zero, 3), round(mib, 2)] for moment, mib in _thinned(samples) if moment >= zero],
        }

    def write(self, step: int, values: dict[str, float | None]) -> None:
        """Completes the step's values, all ranks' already, and appends its timeline to profile/steps.jsonl (rank 0)."""
        seconds = (values.get("train_s") or 0.0) * distributed.world_size()
        values["mfu"] = (values.get("train_flops") or 0.0) / (seconds * self._peak) if seconds else None
        live = (values.get("policy_rows") or 0.0) + (values.get("distill_rows") or 0.0)
        values["live_row_share"] = live / rows if (rows := values.get("rollout_tokens")) else None
        if not distributed.is_main():
            return
        self._path.parent.mkdir(exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "device": self._device.type, **self._timeline}) + "\n")
        if self._history:
            torch.cuda.memory._dump_snapshot(str(self._path.parent / "memory-snapshot.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
            self._history = False

    def close(self) -> None:
        """Ends the sampling of memory."""
        self._stopped.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stopped.wait(_SAMPLE_S):
            self._samples.append(self._now())

    def _now(self) -> tuple[float, float]:
        if self._device.type == "cuda":
            return time.monotonic(), (torch.cuda.memory_allocated(self._device) - self._asleep()) / 2**20
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return time.monotonic(), pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _thinned(samples: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most _POINTS samples, each the highest of its neighbours: no peak is lost."""
    width = -(-len(samples) // _POINTS)
    return [max(samples[i : i + width], key=lambda sample: sample[1]) for i in range(0, len(samples), max(width, 1))]
