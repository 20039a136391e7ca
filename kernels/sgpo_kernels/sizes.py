"""Sizes and choices as pure functions of (N, H, V, dtype, device): chunk rows, blocks, memory, implementation.

Nothing here touches a tensor, so a memory plan can call it before anything is allocated.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import os
from typing import Literal, NamedTuple, get_args

import torch

Impl = Literal["auto", "triton", "triton-nologits", "torch"]
IMPLS = get_args(Impl)
Op = Literal["logprob", "policy", "divergence", "sgpo"]

CPU_CHUNK_BYTES = 64 << 20
CUDA_CHUNK_ROWS = 1024
# Rows of dz that one dW product takes where operands are narrower than accumulators.
SLAB_ROWS = 4096
HEAD_BLOCK_BYTES = {"cpu": 64 << 20, "cuda": 64 << 20}
ROW_BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}
# Above this share of live columns a chunk is multiplied densely.
DENSE_SHARE = 0.5
# Chunk-sized [C, V] tensors in the accumulation dtype that an op holds at the same time, at most.
WORK_CHUNKS: dict[Op, float] = {"logprob": 3, "policy": 3, "divergence": 4, "sgpo": 4}
# Row-block-sized tensors of the plain torch arithmetic.
WORK_BLOCKS = 10

log = logging.getLogger("sgpo_kernels")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, row values and accumulators: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunk_rows(rows: int, hidden: int, vocab: int, dtype: torch.dtype, device_type: str, op: Op = "policy") -> int:
    """Rows per chunk: about 64 MiB of logits on the CPU, 1024 rows on an accelerator; never more than there are."""
    if device_type == "cpu":
        limit = CPU_CHUNK_BYTES // (vocab * accumulate_dtype(dtype).itemsize)
    else:
        limit = CUDA_CHUNK_ROWS
    return max(1, min(rows, limit))


def slab_rows(rows: int, chunk: int) -> int:
    """Rows of dz [S, V] that wait for one dW product, whole chunks: enough to make that product compute-bound, and
    every slab of a call about as full as the others, since one of a single chunk would take the time of two."""
    slabs = max(1, math.ceil(rows / SLAB_ROWS))
    return max(1, math.ceil(rows / slabs / chunk)) * chunk


def dense_limit(vocab: int) -> int:
    """The largest number of live columns with which a chunk is not multiplied densely."""
    return int(DENSE_SHARE * vocab)


def padded_empty(rows: int, columns: int, *, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Empty [rows, columns] whose rows begin on 32-byte boundaries (16 elements), also where `columns` is odd: aligned
    loads, and operands and outputs that cuBLAS takes on its fast paths. On a CPU never a multiple of 1 KiB apart: the
    places below each other would share few sets of the cache, and a product takes 7 to 12 % longer."""
    stride, dtype = -(-columns // 16) * 16, dtype or like.dtype
    if like.device.type == "cpu" and stride * dtype.itemsize % 1024 == 0:
        stride += 16
    return like.new_empty(rows, stride, dtype=dtype)[:, :columns]


def block_rows(columns: int, dtype: torch.dtype, device_type: str) -> int:
    """Rows of a chunk that plain torch arithmetic handles at a time: what stays in a core's cache on a CPU."""
    return max(1, ROW_BLOCK_BYTES.get(device_type, 64 << 20) // (columns * accumulate_dtype(dtype).itemsize))


def head_block_rows(hidden: int, dtype: torch.dtype, device_type: str) -> int:
    """Vocabulary rows of dW that one product computes where it cannot add in place: a multiple of 128, so that blocks
    of dz columns begin aligned and fill whole tiles."""
    size = HEAD_BLOCK_BYTES.get(device_type, 64 << 20)
    return max(128, size // (hidden * accumulate_dtype(dtype).itemsize) // 128 * 128)


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

    K·C·V·a (chunks) + S·V·s (slab, accelerators) + 10·B·V·a (row blocks of plain torch) + V·H·(a·[half on the CPU] +
    [dW]·(a + s)) + 2·N·H·s + 6·C·H·a + 2·block + 48·N·a + 8·V·a, with K = WORK_CHUNKS (on an accelerator the 1 or 2
    buffers of products), C rows per chunk, S slab rows, B rows per row block, s and a the bytes of the input and of
    the accumulation dtype. No term in N·V.
    """
    size, acc = dtype.itemsize, accumulate_dtype(dtype).itemsize
    chunk = chunk_rows(rows, hidden, vocab, dtype, device_type, op) if chunk is None else min(chunk, max(rows, 1))
    narrow = size != acc
    upcast_head = acc if device_type == "cpu" and narrow else 0
    head_bytes = vocab * hidden * (upcast_head + (acc + size if head_grad else 0))
    block = 2 * head_block_rows(hidden, dtype, device_type) * hidden * acc if head_grad else 0
    copies = WORK_CHUNKS[op] if device_type == "cpu" or not narrow else (2 if op in ("divergence", "sgpo") else 1)
    slab = slab_rows(rows, chunk) * (vocab + hidden) * size if device_type != "cpu" and narrow else 0
    blocks = WORK_BLOCKS * min(chunk, block_rows(vocab, dtype, device_type)) * vocab * acc
    chunks = int(copies * chunk * vocab * acc) + 6 * chunk * hidden * acc
    per_row = 2 * rows * hidden * size + 48 * rows * acc
    return chunks + slab + blocks + head_bytes + min(block, 2 * vocab * hidden * acc) + per_row + 8 * vocab * acc + 4096


def peak_bytes(
    op: Op, rows: int, hidden: int, vocab: int, dtype: torch.dtype, device_type: str, *, head_grad: bool = True
) -> int:
    """Estimate, in bytes, of what one forward of `op` holds at its fullest moment beyond its inputs, dense, with the
    gradients that it leaves for backward (head_grad=False: without that of the head; logprob: without any).

    `extra_bytes` is a bound and adds up what never lives together. Here the largest of three moments:
      settling a chunk    K·C·V·a + C·H·a + 2 or, for divergences, 10·B·V·a (CPU) + V·H·a (dW, from the second chunk)
      its gradient        K·C·V·a + 2·C·H·a + V·H·a, and where operands are narrow C·V·(s + a) for dz rounded and
                          widened again (CPU) or S·(V + H)·s and one block of dW (accelerators)
      dW rounded          V·H·(a + s) where operands are narrow
    each + N·H·s (dH) + 8·N·a (row values) + V·H·a (the widened head, CPU with narrow operands); K contexts, C rows per
    chunk, S slab rows, B rows per row block, s and a the bytes of the input and of the accumulation dtype.
    """
    size, acc = dtype.itemsize, accumulate_dtype(dtype).itemsize
    on_cpu, narrow = device_type == "cpu", size != acc
    chunk = chunk_rows(rows, hidden, vocab, dtype, device_type, op)
    head = vocab * hidden
    products = (2 if op in ("divergence", "sgpo") else 1) * chunk * vocab * acc + chunk * hidden * acc
    block_count = WORK_BLOCKS if op in ("divergence", "sgpo") else 2
    blocks = block_count * min(chunk, block_rows(vocab, dtype, device_type)) * vocab * acc if on_cpu else 0
    dhead = head * acc if head_grad else 0
    kept = 8 * rows * acc + (head * acc if on_cpu and narrow else 0)
    settling = products + blocks + (dhead if rows > chunk else 0)
    if op == "logprob":
        return kept + settling
    slab = slab_rows(rows, chunk) if head_grad else chunk
    dz = chunk * vocab * (size + acc) if on_cpu else slab * (vocab + hidden) * size
    block = 0 if on_cpu or not head_grad else min(head, head_block_rows(hidden, dtype, device_type) * hidden) * acc
    gradient = products + chunk * hidden * acc + dhead + (dz + block if narrow else 0)
    rounded = head * (acc + size) if head_grad and narrow else 0
    return kept + rows * hidden * size + max(settling, gradient, rounded)


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter (the environment variable must be set before it is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def resolve_impl(impl: str, device_type: str, dtype: torch.dtype) -> str:
    """The implementation that runs, "triton" or "torch". "auto" takes Triton on CUDA below float64, and says so once;
    "triton-nologits" is "triton" where rows need no logits (backend_sweep.py).

    Raises: ValueError for an unknown name; NotImplementedError where Triton cannot run: float64, a device other than
    CUDA (unless Triton's interpreter is on), or no Triton.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(IMPLS)}; got {impl!r}.")
    if impl == "auto":
        installed = importlib.util.find_spec("triton") is not None
        impl = "triton" if device_type == "cuda" and dtype != torch.float64 and installed else "torch"
        _announce_auto(impl, device_type, str(dtype))
    elif impl != "torch":
        reason = _why_no_triton(device_type, dtype)
        if reason:
            raise NotImplementedError(f'impl="{impl}" {reason}: use impl="auto" or impl="torch".')
        impl = "triton"
    return impl


def _why_no_triton(device_type: str, dtype: torch.dtype) -> str | None:
    if dtype == torch.float64:
        return "does not take float64"
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which is not installed"
    if device_type != "cuda" and not interpreting():
        return f"needs tensors on CUDA, not on {device_type} (or TRITON_INTERPRET=1 before the first import)"
    return None


@functools.cache
def _announce_auto(impl: str, device_type: str, dtype: str) -> None:
    log.info('impl="auto" chose "%s" for %s on %s', impl, dtype, device_type)


class Tiles(NamedTuple):
    """The tile of a product in Triton [rows, columns], how much of the inner dimension a step takes, warps, stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# By kernel, for operands of two bytes; wider ones take half of each side.
PRODUCT_TILES = {
    "live_hidden": Tiles(128, 128, 64, 8, 3),
    "live_head": Tiles(128, 64, 64, 8, 3),
    "sweep": Tiles(128, 128, 64, 8, 3),
    "gathered": Tiles(128, 64, 64, 8, 3),
}
# By compute capability; on an H100 a sweep of 128 x 256 runs at the speed of cuBLAS (benchmarks/README.md).
TUNED_PRODUCT_TILES: dict[tuple[int, int], dict[str, Tiles]] = {(9, 0): {"sweep": Tiles(128, 256, 64, 8, 4)}}


def product_tiles(kernel: str, dtype: torch.dtype, arch: tuple[int, int] | None) -> Tiles:
    """The tile of a product for operands of a dtype on a compute capability (None: Triton's interpreter)."""
    tiles = TUNED_PRODUCT_TILES.get(arch or (0, 0), {}).get(kernel, PRODUCT_TILES[kernel])
    if dtype.itemsize <= 2:
        return tiles
    return tiles._replace(rows=tiles.rows // 2, columns=tiles.columns // 2, depth=tiles.depth // 2)


class Blocks(NamedTuple):
    """The tile of a Triton kernel [rows, columns], and its warps."""

    rows: int
    columns: int
    warps: int


# Tiles by kernel, chosen ahead of time so that nothing spills (`python -m sgpo_kernels.aot`). "peaks" must keep the
# columns of "scan", whose tile maxima it reads.
DEFAULT_BLOCKS = {
    "scan": Blocks(4, 1024, 4),
    "divergence": Blocks(2, 1024, 4),
    "peaks": Blocks(8, 1024, 8),
    "gradient": Blocks(4, 1024, 4),
    "columns": Blocks(16, 128, 4),
}
# Measured choices by compute capability, where they gain 3 % or more (benchmarks/tune_blocks.py). On an H100 every
# other default is within 2 % of the best tile tried.
TUNED_BLOCKS: dict[tuple[int, int], dict[str, Blocks]] = {(9, 0): {"columns": Blocks(4, 256, 4)}}


def blocks(kernel: str, arch: tuple[int, int] | None) -> Blocks:
    """The tile for a kernel on a compute capability (None: Triton's interpreter)."""
    return TUNED_BLOCKS.get(arch or (0, 0), {}).get(kernel, DEFAULT_BLOCKS[kernel])
