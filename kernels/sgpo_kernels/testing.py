"""What tests of loss ops need: accuracy against a reference, peak memory, host syncs, poisoned memory."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sgpo_kernels.sizes import accumulate_dtype

# A module whose attributes are made at import time: a type checker does not see them.
_deterministic: Any = torch.utils.deterministic
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

# Error floors relative to the largest value of the truth: a few units in the last place of the dtype the result is
# stored in.
FLOORS: dict[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}


def error(value: Tensor, truth: Tensor) -> float:
    """max |value - truth|, in float64. Not-finite entries of `value` raise AssertionError first."""
    assert value.shape == truth.shape, f"shape: expected {tuple(truth.shape)}, got {tuple(value.shape)}"
    assert bool(torch.isfinite(value).all()), "the result holds values that are not finite"
    return float((value.double() - truth.double()).abs().amax()) if value.numel() else 0.0


def assert_close_to_reference(
    ours: Tensor,
    same_dtype: Tensor,
    truth: Tensor,
    *,
    name: str = "result",
    factor: float = 2.0,
    cancelled: float = 0.0,
) -> None:
    """Fails unless max |ours - truth| <= factor * max |same_dtype - truth| + floor.

    Args:
        ours: the result under test. same_dtype: the framework's own result from the same inputs in the same dtype.
        truth: the reference in float64, same shape.
        cancelled: the size of the terms whose difference the result is, where that may be far above the result.

    The floor is FLOORS[ours.dtype] * max |truth|, plus FLOORS of the accumulation dtype times `cancelled`.
    """
    size = float(truth.abs().amax()) if truth.numel() else 0.0
    got, yardstick = error(ours, truth), error(same_dtype, truth)
    floor = FLOORS[ours.dtype] * size + FLOORS[accumulate_dtype(ours.dtype)] * cancelled
    allowed = factor * yardstick + floor
    detail = f"{factor} x {yardstick:.3e} of torch + floor {floor:.3e}, max |truth| {size:.3e}"
    assert got <= allowed, f"{name}: error {got:.3e} > {allowed:.3e} ({detail})"


@dataclass
class Peak:
    """Bytes beyond what was alive at the start: the peak, and the largest single allocation (None: not known)."""

    peak_bytes: int
    largest_bytes: int | None


class _StorageTracker(TorchDispatchMode):
    """Follows the storages that operators return; those of `sgpo_kernels` are followed inside. Scratch memory inside
    one operator of torch is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = Peak(0, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._add(tensor, 0)
        if func.namespace == "sgpo_kernels":
            # To a mode a custom operator is one call: its own work is only seen where its kernel runs with the mode on.
            with self:
                result = func.redispatch(_CPU, *args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor, tensor.untyped_storage().nbytes())
        self.known = {key: entry for key, entry in self.known.items() if not entry[0].expired()}
        self.peak.peak_bytes = max(self.peak.peak_bytes, sum(size for _, size in self.known.values()))
        return result

    def _add(self, tensor: Tensor, size: int) -> None:
        ref = StorageWeakRef(tensor.untyped_storage())
        entry = self.known.get(ref.cdata)
        if entry is None or entry[0].expired():
            self.known[ref.cdata] = (ref, size)
            self.peak.largest_bytes = max(self.peak.largest_bytes or 0, size)


def cpu_peak(run: Callable[[], object]) -> Peak:
    """Peak of the tensor storages that `run` creates on the CPU. Tensors that exist before the call count as 0."""
    tracker = _StorageTracker()
    with tracker:
        run()
    return tracker.peak


def cuda_peak(run: Callable[[], object]) -> Peak:
    """Peak of the CUDA allocator during `run`, beyond what was allocated before."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return Peak(torch.cuda.max_memory_allocated() - before, None)


def host_syncs(run: Callable[[], object]) -> int:
    """How many times `run` makes the host wait for the CUDA device, by torch's own sync debug mode."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    # Torch's notice that the mode is a prototype speaks of synchronizing operations too, once per process.
    return sum("called a synchronizing CUDA operation" in str(warning.message) for warning in caught)


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Inside, torch fills what `torch.empty` and its kin return with NaN (the largest value for integers)."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = _deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    _deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        _deterministic.fill_uninitialized_memory = filled
