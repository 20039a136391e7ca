"""The output head as the chunk loop sees it: matrix products with float32 results, and the shard of the vocabulary.

What: `mm`, `bmm` and `add_mm` are torch's products with a wide result; `Head` holds W and b ready for them; `Shard`
  says which rows of W this rank holds and talks to the other ranks; `read_later` brings a number to the host.
Equation: products = h Wᵀ; the logits z = softcap(products + b) / temperature are made later, by the row arithmetic.
Gradient: none here; the chunk loop multiplies dz by W and h itself.
Memory: on the CPU half heads are copied once per call in float32; on CUDA nothing of the head's size.
Precision: products of half operands accumulate and come out in float32.
Limits: a bias of -inf closes its column: probability, gradient and every term of a divergence are 0 there;
  vocabulary shards (tensor parallel): every rank holds all rows h and the head rows [start, start + V_r); per
  chunk one all-gather of the row statistics [STAT_ROWS, C] per context makes the normalisers whole, and for divergences
  one all-reduce of [2, C].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sgpo_kernels import sizes

# What a bias of -inf becomes: e^CLOSED is 0 at any temperature, but CLOSED - CLOSED and 0 * CLOSED are 0 and not NaN.
CLOSED = -1e20


def mm(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left @ right with a float32 (float64) result; half operands only reach this on CUDA, where torch can widen the
    output."""
    acc = sizes.accumulate_dtype(left.dtype)
    if left.dtype == acc:
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=acc) if out is None else torch.mm(left, right, out_dtype=acc, out=out)


def bmm(left: Tensor, right: Tensor) -> Tensor:
    """left [B, M, K] @ right [B, K, N], with the result of `mm`."""
    acc = sizes.accumulate_dtype(left.dtype)
    return torch.bmm(left, right) if left.dtype == acc else torch.bmm(left, right, out_dtype=acc)


def add_mm(sums: Tensor, left: Tensor, right: Tensor, block: int) -> None:
    """sums += left @ right, sums [R, H] float32 (float64). Where the product of half operands cannot add in place
    (torch below 2.11), `block` rows of it at a time: no second [R, H] exists and the block stays in the cache."""
    if left.dtype == sums.dtype:
        sums.addmm_(left, right)
    elif adds_in_place(left.dtype, left.device):
        torch.addmm(sums, left, right, out_dtype=sums.dtype, out=sums)
    else:
        for part, rows in zip(sums.split(block), left.split(block), strict=True):
            part.add_(mm(rows, right))


@functools.cache
def adds_in_place(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch adds a widened product to a float32 tensor in place: tried once, with products of 16 x 16."""
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    sums = ones.float()
    try:
        torch.addmm(sums, ones, ones, out_dtype=torch.float32, out=sums)
    except (RuntimeError, TypeError):
        return False
    return True


def capturing(tensor: Tensor) -> bool:
    """Whether what is launched now on the tensor's device goes into a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def read_later(count: Tensor) -> Callable[[], int]:
    """A function that returns the number `count` (0-d). On CUDA it is sent to the host now, and the function waits for
    it to arrive, but not for anything that is launched after this call."""
    if not count.is_cuda:
        return lambda: int(count)
    here = torch.empty_like(count, device="cpu", pin_memory=True).copy_(count, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> int:
        arrived.synchronize()
        return int(here)

    return read


@dataclass(frozen=True)
class Shard:
    """Which part of the vocabulary this rank holds. Without a group: all of it."""

    group_name: str | None = None
    start: int = 0

    @property
    def group(self) -> Any:
        """The process group of that name."""
        assert self.group_name is not None
        return dist.distributed_c10d._resolve_process_group(self.group_name)  # type: ignore[arg-type]

    @property
    def rank(self) -> int:
        """This rank's place in the group, 0 without one."""
        return 0 if self.group_name is None else dist.get_rank(self.group)

    def gather(self, stats: Tensor) -> Tensor:
        """[K, C] of this rank -> [ranks, K, C] of all, the same on every rank."""
        if self.group_name is None:
            return stats.unsqueeze(0)
        parts = [torch.empty_like(stats) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, stats.contiguous(), group=self.group)
        return torch.stack(parts)

    def sum_(self, values: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.group_name is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def smallest(self, count: int) -> int:
        """The smallest of the ranks' counts. A host sync, for the CPU."""
        if self.group_name is None:
            return count
        counts = torch.tensor([count], device="cpu")
        dist.all_reduce(counts, op=dist.ReduceOp.MIN, group=self.group)
        return int(counts)

    def local(self, labels: Tensor, columns: int) -> Tensor:
        """Token ids -> columns of this shard, -1 for the ids of other shards."""
        if self.group_name is None:
            return labels
        moved = labels - self.start
        return torch.where((moved >= 0) & (moved < columns), moved, -1)


@dataclass(frozen=True)
class Head:
    """A head ready for products. CPU torch has no `mm(out_dtype=)`, so half dtypes are upcast there, once per call."""

    weight_VH: Tensor
    bias_V: Tensor | None

    @staticmethod
    def of(head: Tensor, bias: Tensor | None) -> Head:
        """From head [V, H] and bias [V], detached."""
        operand = head.dtype if head.is_cuda else sizes.accumulate_dtype(head.dtype)
        return Head(head.detach().to(operand), None).with_bias(bias)

    def with_bias(self, bias: Tensor | None) -> Head:
        """The same head with another bias [V], detached."""
        acc = sizes.accumulate_dtype(self.weight_VH.dtype)
        return Head(self.weight_VH, None if bias is None else bias.detach().to(acc).clamp(min=CLOSED))

    def products(self, hidden_CH: Tensor, out_CV: Tensor) -> Tensor:
        """h Wᵀ in the accumulation dtype, written to `out_CV`."""
        return mm(hidden_CH.to(self.weight_VH.dtype), self.weight_VH.t(), out_CV)
