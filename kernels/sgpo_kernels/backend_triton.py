"""Row arithmetic of one chunk in Triton: the functions of `backend_torch`, by the same names, on the kernels of
`triton_kernels`.

What: launches; shapes, equations and the meaning of the tables are those of `backend_torch`. Products stay as they are until
  `gradient` writes dz (into `out_CV`, or over them).
Memory: per chunk 3 C (V / 1024) floats of tile statistics, C/16 V of column peaks.
Limits: float32 accumulators; CUDA, or a CPU under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from sgpo_kernels import sizes, triton_kernels
from sgpo_kernels.backend_torch import TABLE_ROWS, Bounds, Logits, Rule

# Launch syntax is beyond type checkers.
kernels: Any = triton_kernels
# The default of fused multiply-adds changes in Triton 3.10: said here.
COMPILED: dict[str, Any] = {} if sizes.interpreting() else {"enable_fp_fusion": True}
KINDS = {
    "score": kernels.SCORE,
    "forward_kl": kernels.FORWARD_KL,
    "reverse_kl": kernels.REVERSE_KL,
    "js": kernels.JS,
}
LIMITS = {"mask": kernels.MASK, "clamp": kernels.CLAMP, "scale": kernels.SCALE}
SETTLE_BLOCK = 128
RESCALE_BLOCK = 2048


def _blocks(kernel: str, like: Tensor) -> sizes.Blocks:
    arch = torch.cuda.get_device_capability(like.device) if like.is_cuda else None
    return sizes.blocks(kernel, arch)


def _options(block: sizes.Blocks) -> dict[str, Any]:
    return {"BLOCK_R": block.rows, "BLOCK_V": block.columns, "num_warps": block.warps, **COMPILED}


def _side(logits: Logits) -> tuple[Any, ...]:
    """Pointer, stride and bias of one context; an absent pointer is played by another one and never read."""
    products = logits.products_CV
    return products, products.stride(0), products if logits.bias_V is None else logits.bias_V


def _sides(student: Logits, teacher: Logits | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The leading arguments of the kernels that see both contexts, and their flags."""
    other = student if teacher is None else teacher
    heat = student.products_CV if student.inverse_temperature_C is None else student.inverse_temperature_C
    arguments = (*_side(student), *_side(other), heat, student.softcap or 1.0)
    flags = _flags(student)
    flags["HAS_TEACHER_BIAS"] = other.bias_V is not None
    return arguments, flags


def _flags(logits: Logits) -> dict[str, Any]:
    return {
        "HAS_BIAS": logits.bias_V is not None,
        "HAS_SOFTCAP": logits.softcap is not None,
        "HAS_HEAT": logits.inverse_temperature_C is not None,
    }


def scan(logits: Logits, targets_C: Tensor | None) -> Tensor:
    products = logits.products_CV
    rows, vocab = products.shape
    block = _blocks("scan", products)
    tiles = triton.cdiv(vocab, block.columns)
    tile_stats = products.new_empty(3, rows, tiles)
    heat = products if logits.inverse_temperature_C is None else logits.inverse_temperature_C
    common = (*_side(logits), heat, logits.softcap or 1.0)
    flags = _flags(logits)
    kernels.scan_tiles[(triton.cdiv(rows, block.rows), tiles)](
        *common, tile_stats, rows, vocab, tiles, **flags, **_options(block)
    )
    if logits.notes is not None:
        logits.notes["tiles"] = tile_stats
    stats_4C = products.new_empty(4, rows)
    pointer = stats_4C if targets_C is None else targets_C
    kernels.combine_tiles[(triton.cdiv(rows, 4),)](
        tile_stats,
        *common,
        pointer,
        stats_4C,
        rows,
        tiles,
        **flags,
        HAS_TARGETS=targets_C is not None,
        BLOCK_R=4,
        BLOCK_T=triton.next_power_of_2(tiles),
        num_warps=4,
        **COMPILED,
    )
    return stats_4C


def settle_scores(
    parts_R4C: Tensor,
    rank: int,
    targets_C: Tensor,
    slopes: tuple[Tensor, Tensor] | None,
    rows_C: Tensor,
    factor_C: Tensor | None,
    values: Tensor,
) -> Tensor:
    mode = kernels.VALUES if slopes is None else kernels.UPSTREAM
    return _settle(parts_R4C, rank, targets_C, mode, slopes, None, None, rows_C, factor_C, values)


def settle_policy(
    parts_R4C: Tensor,
    rank: int,
    targets_C: Tensor,
    old_N: Tensor | None,
    advantages_N: Tensor,
    weight_N: Tensor,
    bounds: Bounds,
    rows_C: Tensor,
    factor_C: Tensor | None,
    values: Tensor,
) -> Tensor:
    inputs = (advantages_N, weight_N)
    return _settle(parts_R4C, rank, targets_C, kernels.POLICY, inputs, old_N, bounds, rows_C, factor_C, values)


def _settle(
    parts_R4C: Tensor,
    rank: int,
    targets_C: Tensor,
    mode: int,
    inputs: tuple[Tensor, Tensor] | None,
    old_N: Tensor | None,
    bounds: Bounds | None,
    rows_C: Tensor,
    factor_C: Tensor | None,
    values: Tensor,
) -> Tensor:
    ranks, _, count = parts_R4C.shape
    table = parts_R4C.new_zeros(TABLE_ROWS, count)
    first, second = (values, values) if inputs is None else inputs
    low, high, dual = (None, None, None) if bounds is None else bounds
    kernels.settle_scores[(triton.cdiv(count, SETTLE_BLOCK),)](
        parts_R4C.contiguous(),
        rank,
        targets_C,
        rows_C,
        table if factor_C is None else factor_C.contiguous(),
        first.contiguous(),
        second.contiguous(),
        values if old_N is None else old_N.contiguous(),
        -math.inf if low is None else 1.0 - low,
        math.inf if high is None else 1.0 + high,
        math.inf if dual is None else float(dual),
        values,
        table,
        count,
        values.shape[1],
        MODE=mode,
        HAS_OLD=old_N is not None,
        HAS_FACTOR=factor_C is not None,
        RANKS=ranks,
        BLOCK=SETTLE_BLOCK,
        num_warps=4,
        **COMPILED,
    )
    return table


def settle_pair(parts_R8C: Tensor, rank: int, rows_C: Tensor, values: Tensor) -> Tensor:
    ranks, _, count = parts_R8C.shape
    table = parts_R8C.new_zeros(TABLE_ROWS, count)
    kernels.settle_pair[(triton.cdiv(count, SETTLE_BLOCK),)](
        parts_R8C.contiguous(),
        rank,
        rows_C,
        values,
        table,
        count,
        values.shape[1],
        RANKS=ranks,
        BLOCK=SETTLE_BLOCK,
        num_warps=4,
        **COMPILED,
    )
    return table


def divergence_sums(kind: str, student: Logits, teacher: Logits, table: Tensor) -> Tensor:
    rows, vocab = student.products_CV.shape
    block = _blocks("divergence", table)
    tiles = triton.cdiv(vocab, block.columns)
    partial = table.new_empty(3, rows, tiles)
    arguments, flags = _sides(student, teacher)
    kernels.divergence_tiles[(triton.cdiv(rows, block.rows), tiles)](
        *arguments, table, partial, rows, vocab, tiles, KIND=KINDS[kind], **flags, **_options(block)
    )
    return partial.sum(2)


def settle_divergence(
    sums_3C: Tensor,
    weight_N: Tensor,
    rule: Rule,
    rows_C: Tensor,
    factor_C: Tensor | None,
    values: Tensor,
    table: Tensor,
) -> None:
    count = sums_3C.shape[1]
    kernels.settle_divergence[(triton.cdiv(count, SETTLE_BLOCK),)](
        sums_3C,
        weight_N.contiguous(),
        rows_C,
        table if factor_C is None else factor_C.contiguous(),
        math.inf if rule.max_token_kl is None else float(rule.max_token_kl),
        values,
        table,
        count,
        values.shape[1],
        OVER=LIMITS[rule.over_limit],
        HAS_FACTOR=factor_C is not None,
        BLOCK=SETTLE_BLOCK,
        num_warps=4,
        **COMPILED,
    )


def peaks(
    kind: str,
    student: Logits,
    teacher: Logits | None,
    table: Tensor,
    targets_C: Tensor | None,
    threshold: Tensor,
) -> Tensor:
    rows, vocab = student.products_CV.shape
    # The column tiles of scan, whose maxima tell which tiles need no reading.
    block = _blocks("peaks", table)._replace(columns=_blocks("scan", table).columns)
    assert student.notes is not None
    tile_stats = student.notes["tiles"]
    other = tile_stats if teacher is None or teacher.notes is None else teacher.notes["tiles"]
    found = table.new_empty(triton.cdiv(rows, block.rows), vocab)
    arguments, flags = _sides(student, teacher)
    kernels.peak_tiles[(found.shape[0], tile_stats.shape[2])](
        *arguments,
        table,
        table if targets_C is None else targets_C,
        tile_stats,
        other,
        threshold,
        found,
        rows,
        vocab,
        tile_stats.shape[2],
        KIND=KINDS[kind],
        **flags,
        **_options(block),
    )
    return found.amax(0)


def gradient(
    kind: str,
    student: Logits,
    teacher: Logits | None,
    table: Tensor,
    targets_C: Tensor | None,
    out_CV: Tensor | None,
    *,
    with_entropy: bool = False,
) -> Tensor:
    rows, vocab = student.products_CV.shape
    out_CV = student.products_CV if out_CV is None else out_CV
    block = _blocks("gradient", table)
    arguments, flags = _sides(student, teacher)
    kernels.gradient_tiles[(triton.cdiv(rows, block.rows), triton.cdiv(vocab, block.columns))](
        *arguments,
        table,
        table if targets_C is None else targets_C,
        out_CV,
        out_CV.stride(0),
        rows,
        vocab,
        KIND=KINDS[kind],
        WITH_ENTROPY=with_entropy,
        **flags,
        **_options(block),
    )
    return out_CV


def gradient_columns(
    kind: str,
    student: Logits,
    teacher: Logits | None,
    table: Tensor,
    targets_C: Tensor | None,
    columns_A: Tensor,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    rows, live = student.products_CV.shape[0], columns_A.numel()
    # Padded, so that rows stay aligned for the products.
    dz_CA = table.new_zeros(rows, -(-live // 16) * 16)[:, :live]
    if not live:
        return dz_CA, table.new_zeros(rows)
    block = _blocks("columns", table)
    tiles = triton.cdiv(live, block.columns)
    kept = table.new_empty(rows, tiles)
    arguments, flags = _sides(student, teacher)
    kernels.gradient_column_tiles[(triton.cdiv(rows, block.rows), tiles)](
        *arguments,
        table,
        table if targets_C is None else targets_C,
        columns_A,
        columns_A if count is None else count,
        dz_CA,
        dz_CA.stride(0),
        kept,
        rows,
        live,
        tiles,
        KIND=KINDS[kind],
        HAS_COUNT=count is not None,
        **flags,
        **_options(block),
    )
    return dz_CA, kept.sum(1)


def rescaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * factor (0-d, float32) in `dtype`, for contiguous tensors: torch's own product with a 0-d tensor on the
    device and another output dtype runs at half the memory's speed."""
    out = torch.empty_like(grad, dtype=dtype)
    kernels.rescale[(triton.cdiv(grad.numel(), RESCALE_BLOCK),)](
        grad, factor, out, grad.numel(), BLOCK=RESCALE_BLOCK, num_warps=4, **COMPILED
    )
    return out
