"""Sizes and choices as pure functions of (N, H, V, dtype, device): chunk rows, head blocks, memory, implementation.

Nothing here touches a tensor, so a memory plan can call it before anything is allocated.
"""

from __future__ import annotations

import functools
import logging
from typing import Literal

import torch

Impl = Literal["auto", "triton", "torch"]
Op = Literal["logprob", "policy", "divergence", "sgpo"]

CPU_CHUNK_BYTES = 64 << 20
CUDA_CHUNK_ROWS = 1024
HEAD_BLOCK_BYTES = 64 << 20
# Chunk-sized [C, V] tensors in the accumulation dtype that an op holds at the same time, at most.
WORK_CHUNKS: dict[Op, int] = {"logprob": 4, "policy": 4, "divergence": 9, "sgpo": 9}

log = logging.getLogger("sgpo_kernels")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, row values and accumulators: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunk_rows(rows: int, hidden: int, vocab: int, dtype: torch.dtype, device_type: str) -> int:
    """Rows per chunk: about 64 MiB of logits on the CPU, 1024 rows on an accelerator, never more than there are."""
    if device_type == "cpu":
        limit = CPU_CHUNK_BYTES // (vocab * accumulate_dtype(dtype).itemsize)
    else:
        limit = CUDA_CHUNK_ROWS
    return max(1, min(rows, limit))


def head_block_rows(hidden: int, dtype: torch.dtype) -> int:
    """Vocabulary rows of dW that one product computes where it cannot add in place (64 MiB of accumulators)."""
    return max(128, HEAD_BLOCK_BYTES // (hidden * accumulate_dtype(dtype).itemsize))


def extra_bytes(
    op: Op,
    rows: int,
    hidden: int,
    vocab: int,
    dtype: torch.dtype,
    device_type: str,
    *,
    head_grad: bool = True,
    chunk: int | None = None,
) -> int:
    """Upper bound, in bytes, of what one forward and backward of `op` allocates beyond its inputs.

    K·C·V·a (chunks) + V·H·(a·[half on the CPU] + [dW]·(a + 2·s)) + 2·N·H·s + 6·C·H·a + block + 32·N·a + 4·V·a, with
    K = WORK_CHUNKS, C rows per chunk, s and a the bytes of the input and of the accumulation dtype. No term in N·V.
    """
    size, acc = dtype.itemsize, accumulate_dtype(dtype).itemsize
    chunk = chunk_rows(rows, hidden, vocab, dtype, device_type) if chunk is None else min(chunk, max(rows, 1))
    upcast_head = acc if device_type == "cpu" and size != acc else 0
    head_bytes = vocab * hidden * (upcast_head + (acc + 2 * size if head_grad else 0))
    block = head_block_rows(hidden, dtype) * hidden * acc if device_type != "cpu" and head_grad else 0
    chunks = WORK_CHUNKS[op] * chunk * vocab * acc + 6 * chunk * hidden * acc
    return chunks + head_bytes + 2 * rows * hidden * size + block + 32 * rows * acc + 4 * vocab * acc + 4096


def resolve_impl(impl: str) -> str:
    """The implementation that runs: "torch" for "auto" and "torch" (said once in the log for "auto").

    Raises: NotImplementedError for "triton", ValueError for an unknown name.
    """
    if impl == "triton":
        raise NotImplementedError('impl="triton" is not available yet: use impl="auto" or impl="torch".')
    if impl not in ("auto", "torch"):
        raise ValueError(f'impl: expected "auto", "triton" or "torch", got {impl!r}.')
    if impl == "auto":
        _announce_auto()
    return "torch"


@functools.cache
def _announce_auto() -> None:
    log.info('impl="auto" chose "torch"')
