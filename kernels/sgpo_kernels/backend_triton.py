"""The row arithmetic in Triton: the functions of `backend.Backend`, by launching the kernels of `triton_statistics`
and `triton_gradients`.

What: grids, tiles, strides and flags. Products stay as they are until `gradient` writes dz (into `out_CV`, or over
  them), so every kernel forms the logits it needs from them.
Equation: as backend_torch.py.
Source: as backend_torch.py.
Gradient: as backend_torch.py.
Memory: per chunk 3 C (V / 1024) floats of tile statistics, C/16 V of column peaks.
Precision: float32 throughout; products of half operands are float32 already.
Limits: CUDA, or a CPU under TRITON_INTERPRET=1; no float64.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from sgpo_kernels import backend_torch, sizes, triton_gradients, triton_products, triton_statistics
from sgpo_kernels import triton_constants as const
from sgpo_kernels.backend import STAT_ROWS, SUM_ROWS, TABLE_ROWS, LiveColumns, Logits
from sgpo_kernels.inputs import ClipRange, KlLimit

# Launch syntax is beyond type checkers.
statistics: Any = triton_statistics
gradients: Any = triton_gradients
products: Any = triton_products
# The default of fused multiply-adds changes in Triton 3.10: said here.
COMPILED: dict[str, Any] = {} if sizes.interpreting() else {"enable_fp_fusion": True}
# Planes of the statistics of a tile.
TILE_STATS = 3
ROW_BLOCK = 128
RESCALE_BLOCK = 2048
LIVE_TILE = 8192
# Programs that take turns with the tiles of live columns, whose number the host does not know.
LIVE_PROGRAMS = 16


def _arch(like: Tensor) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(like.device) if like.is_cuda else None


def _blocks(kernel: str, like: Tensor) -> sizes.Blocks:
    return sizes.blocks(kernel, _arch(like))


def product_tiles(kernel: str, operand: Tensor) -> sizes.Tiles:
    """The tile of a product with operands such as this one."""
    return sizes.product_tiles(kernel, operand.dtype, _arch(operand))


def _options(block: sizes.Blocks) -> dict[str, Any]:
    return {"BLOCK_R": block.rows, "BLOCK_V": block.columns, "num_warps": block.warps, **COMPILED}


def _side(logits: Logits) -> tuple[Any, ...]:
    """Pointer, stride and bias of one context; an absent pointer is played by another one and never read."""
    products = logits.products_CV
    return products, products.stride(0), products if logits.bias_V is None else logits.bias_V


def _sides(student: Logits, teacher: Logits | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The leading arguments of the kernels that see both contexts, and their flags."""
    other = student if teacher is None else teacher
    inv_temperature = student.products_CV if student.inv_temperature_C is None else student.inv_temperature_C
    arguments = (*_side(student), *_side(other), inv_temperature, student.softcap or 1.0)
    flags = _flags(student)
    flags["HAS_TEACHER_BIAS"] = other.bias_V is not None
    return arguments, flags


def _flags(logits: Logits) -> dict[str, Any]:
    return {
        "HAS_BIAS": logits.bias_V is not None,
        "HAS_SOFTCAP": logits.softcap is not None,
        "HAS_TEMPERATURE": logits.inv_temperature_C is not None,
    }


def scan(logits: Logits, labels_C: Tensor | None) -> Tensor:
    """See `Backend.scan`."""
    products = logits.products_CV
    rows, vocab = products.shape
    block = _blocks("scan", products)
    tiles = triton.cdiv(vocab, block.columns)
    tile_stats = products.new_empty(TILE_STATS, rows, tiles)
    inv_temperature = products if logits.inv_temperature_C is None else logits.inv_temperature_C
    common = (*_side(logits), inv_temperature, logits.softcap or 1.0)
    flags = _flags(logits)
    statistics.scan_tiles[(triton.cdiv(rows, block.rows), tiles)](
        *common, tile_stats, rows, vocab, tiles, **flags, **_options(block)
    )
    if logits.notes is not None:
        logits.notes["tiles"] = tile_stats
    stats_4C = products.new_empty(STAT_ROWS, rows)
    combine(tile_stats, (tiles, 1), stats_4C, labels_C, common, flags)
    return stats_4C


NO_FLAGS = {"HAS_BIAS": False, "HAS_SOFTCAP": False, "HAS_TEMPERATURE": False}


def combine(
    tile_stats: Tensor,
    steps: tuple[int, int],
    stats_4C: Tensor,
    labels_C: Tensor | None = None,
    products: tuple[Any, ...] | None = None,
    flags: dict[str, Any] = NO_FLAGS,
) -> None:
    """Statistics of tiles, with their steps from row to row and from tile to tile, into those of rows; with labels,
    also the logit of each from the products."""
    rows = stats_4C.shape[1]
    tiles = tile_stats[0].numel() // rows
    statistics.combine_tiles[(triton.cdiv(rows, 4),)](
        tile_stats,
        *steps,
        *(products or (tile_stats, 0, tile_stats, tile_stats, 1.0)),
        stats_4C if labels_C is None else labels_C,
        stats_4C,
        rows,
        tiles,
        **flags,
        HAS_LABELS=labels_C is not None,
        BLOCK_R=4,
        BLOCK_T=triton.next_power_of_2(tiles),
        num_warps=4,
        **COMPILED,
    )


def score_row_values(
    parts_R4C: Tensor,
    rank: int,
    labels_C: Tensor,
    slopes: tuple[Tensor, Tensor] | None,
    rows_C: Tensor,
    factor_C: Tensor | None,
    values: Tensor,
) -> Tensor:
    """See `Backend.score_row_values`."""
    mode = const.MODES["values"] if slopes is None else const.MODES["upstream"]
    return _label_row_values(parts_R4C, rank, labels_C, mode, slopes, None, None, rows_C, factor_C, values)


def policy_row_values(
    parts_R4C: Tensor,
    rank: int,
    labels_C: Tensor,
    old_N: Tensor | None,
    advantages_N: Tensor,
    weight_N: Tensor,
    clip_range: ClipRange,
    rows_C: Tensor,
    factor_C: Tensor | None,
    values: Tensor,
) -> Tensor:
    """See `Backend.policy_row_values`."""
    inputs = (advantages_N, weight_N)
    return _label_row_values(
        parts_R4C, rank, labels_C, const.MODES["policy"], inputs, old_N, clip_range, rows_C, factor_C, values
    )


def _label_row_values(
    parts_R4C: Tensor,
    rank: int,
    labels_C: Tensor,
    mode: int,
    inputs: tuple[Tensor, Tensor] | None,
    old_N: Tensor | None,
    clip_range: ClipRange | None,
    rows_C: Tensor,
    factor_C: Tensor | None,
    values: Tensor,
) -> Tensor:
    ranks, _, count = parts_R4C.shape
    table = parts_R4C.new_zeros(TABLE_ROWS, count)
    first, second = (values, values) if inputs is None else inputs
    low, high, dual = (None, None, None) if clip_range is None else clip_range
    statistics.label_row_values[(triton.cdiv(count, ROW_BLOCK),)](
        parts_R4C.contiguous(),
        rank,
        labels_C,
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
        BLOCK=ROW_BLOCK,
        num_warps=4,
        **COMPILED,
    )
    return table


def pair_row_values(parts_R8C: Tensor, rank: int, rows_C: Tensor, values: Tensor) -> Tensor:
    """See `Backend.pair_row_values`."""
    ranks, _, count = parts_R8C.shape
    table = parts_R8C.new_zeros(TABLE_ROWS, count)
    statistics.pair_row_values[(triton.cdiv(count, ROW_BLOCK),)](
        parts_R8C.contiguous(),
        rank,
        rows_C,
        values,
        table,
        count,
        values.shape[1],
        RANKS=ranks,
        BLOCK=ROW_BLOCK,
        num_warps=4,
        **COMPILED,
    )
    return table


def divergence_sums(kind: str, student: Logits, teacher: Logits, table: Tensor) -> Tensor:
    """See `Backend.divergence_sums`."""
    rows, vocab = student.products_CV.shape
    block = _blocks("divergence", table)
    tiles = triton.cdiv(vocab, block.columns)
    partial = table.new_empty(SUM_ROWS, rows, tiles)
    arguments, flags = _sides(student, teacher)
    gradients.divergence_tiles[(triton.cdiv(rows, block.rows), tiles)](
        *arguments, table, partial, rows, vocab, tiles, KIND=const.KINDS[kind], **flags, **_options(block)
    )
    return partial.sum(2)


def divergence_row_values(
    sums_3C: Tensor,
    weight_N: Tensor,
    kl_limit: KlLimit,
    rows_C: Tensor,
    factor_C: Tensor | None,
    values: Tensor,
    table: Tensor,
) -> None:
    """See `Backend.divergence_row_values`."""
    count = sums_3C.shape[1]
    statistics.divergence_row_values[(triton.cdiv(count, ROW_BLOCK),)](
        sums_3C,
        weight_N.contiguous(),
        rows_C,
        table if factor_C is None else factor_C.contiguous(),
        math.inf if kl_limit.max_token_kl is None else float(kl_limit.max_token_kl),
        values,
        table,
        count,
        values.shape[1],
        OVER_LIMIT=const.LIMITS[kl_limit.over_limit],
        HAS_FACTOR=factor_C is not None,
        BLOCK=ROW_BLOCK,
        num_warps=4,
        **COMPILED,
    )


def column_threshold(table: Tensor, tolerance: float) -> Tensor:
    """See `Backend.column_threshold`."""
    threshold, rows = table.new_empty(()), table.shape[1]
    gradients.column_threshold[(1,)](
        table, tolerance, threshold, rows, BLOCK=triton.next_power_of_2(rows), num_warps=4, **COMPILED
    )
    return threshold


def live_columns(
    kind: str,
    student: Logits,
    teacher: Logits | None,
    table: Tensor,
    labels_C: Tensor | None,
    threshold: Tensor,
    *,
    all_peaks: bool,
) -> tuple[LiveColumns, Tensor]:
    """See `Backend.live_columns`; the count stays on the device."""
    rows, vocab = student.products_CV.shape
    # The column tiles of scan, whose maxima tell which tiles need no reading.
    block = _blocks("peaks", table)._replace(columns=_blocks("scan", table).columns)
    assert student.notes is not None
    tile_stats = student.notes["tiles"]
    other = tile_stats if teacher is None or teacher.notes is None else teacher.notes["tiles"]
    found = table.new_empty(triton.cdiv(rows, block.rows), vocab)
    arguments, flags = _sides(student, teacher)
    gradients.peak_tiles[(found.shape[0], tile_stats.shape[2])](
        *arguments,
        table,
        table if labels_C is None else labels_C,
        tile_stats,
        other,
        threshold,
        found,
        rows,
        vocab,
        tile_stats.shape[2],
        KIND=const.KINDS[kind],
        SKIP=not all_peaks and kind in ("score", "forward_kl"),
        **flags,
        **_options(block),
    )
    if len(found) > LIVE_TILE // 64:
        found = found.amax(0, keepdim=True)
    return placed(found, threshold)


def placed(
    peaks_TV: Tensor, threshold: Tensor, reach_T: Tensor | None = None, forced_V: Tensor | None = None
) -> tuple[LiveColumns, Tensor]:
    """The live columns by the largest of each column's peaks, and the peaks of the others; with `reach_T` and
    `forced_V`, those of a sweep."""
    vocab = peaks_TV.shape[1]
    blocks = triton.next_power_of_2(len(peaks_TV))
    width = LIVE_TILE // blocks
    programs = triton.cdiv(vocab, width)
    live_V, dropped_V = peaks_TV.new_empty(vocab, dtype=torch.bool), peaks_TV.new_empty(vocab)
    counts, columns_V = live_V.new_empty(programs, dtype=torch.int32), live_V.new_empty(vocab, dtype=torch.int32)
    gradients.live_columns[(programs,)](
        peaks_TV, peaks_TV if reach_T is None else reach_T, live_V if forced_V is None else forced_V,
        threshold, live_V, dropped_V, counts, len(peaks_TV), vocab,
        SWEPT=reach_T is not None, BLOCK_T=blocks, BLOCK_V=width, num_warps=4, **COMPILED,
    )  # fmt: skip
    count = counts.new_empty(())
    gradients.place_columns[(programs,)](
        live_V, counts, columns_V, count, sizes.dense_limit(vocab), programs, vocab,
        BLOCK_T=triton.next_power_of_2(programs), BLOCK_V=width, num_warps=4, **COMPILED,
    )  # fmt: skip
    return LiveColumns(columns_V, count), dropped_V


def gradient(
    kind: str,
    student: Logits,
    teacher: Logits | None,
    table: Tensor,
    labels_C: Tensor | None,
    out_CV: Tensor | None,
    *,
    with_entropy: bool = False,
) -> Tensor:
    """See `Backend.gradient`."""
    rows, vocab = student.products_CV.shape
    out_CV = student.products_CV if out_CV is None else out_CV
    block = _blocks("gradient", table)
    arguments, flags = _sides(student, teacher)
    gradients.gradient_tiles[(triton.cdiv(rows, block.rows), triton.cdiv(vocab, block.columns))](
        *arguments,
        table,
        table if labels_C is None else labels_C,
        out_CV,
        out_CV.stride(0),
        rows,
        vocab,
        KIND=const.KINDS[kind],
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
    labels_C: Tensor | None,
    live: LiveColumns,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Backend.gradient_columns`."""
    rows = student.products_CV.shape[0]
    dz_CA = sizes.padded_empty(rows, live.columns_A.numel(), like=table, dtype=dtype)
    block = _blocks("columns", table)
    sums = table.new_empty(2, rows, LIVE_PROGRAMS)
    arguments, flags = _sides(student, teacher)
    gradients.gradient_column_tiles[(triton.cdiv(rows, block.rows), LIVE_PROGRAMS)](
        *arguments,
        table,
        table if labels_C is None else labels_C,
        *live,
        dz_CA,
        dz_CA.stride(0),
        sums,
        rows,
        KIND=const.KINDS[kind],
        **flags,
        **_options(block),
    )
    kept_C, sum_C = sums.sum(2)
    return dz_CA, kept_C, sum_C


def finish_columns(
    table: Tensor,
    kept_C: Tensor,
    sum_C: Tensor | None,
    live: LiveColumns,
    scale: Tensor,
    rows_C: Tensor,
    vocab: int,
    values: Tensor,
) -> None:
    """See `Backend.finish_columns`."""
    rows = len(rows_C)
    gradients.finish_columns[(triton.cdiv(rows, ROW_BLOCK),)](
        table,
        kept_C,
        kept_C if sum_C is None else sum_C,
        live.taken,
        scale,
        rows_C,
        values,
        1.0 / vocab,
        backend_torch.DROPPED_FLOOR,
        1 + backend_torch.DROPPED_MARGIN,
        rows,
        values.shape[1],
        vocab,
        HAS_SUM=sum_C is not None,
        BLOCK=ROW_BLOCK,
        num_warps=4,
        **COMPILED,
    )


def tile_options(tiles: sizes.Tiles) -> dict[str, Any]:
    """What the launch of a product is given of its tile."""
    blocks = {"BLOCK_R": tiles.rows, "BLOCK_V": tiles.columns, "BLOCK_K": tiles.depth}
    return {**blocks, "num_warps": tiles.warps, "num_stages": tiles.stages, **COMPILED}


def live_hidden(dz_CA: Tensor, head_VH: Tensor, live: LiveColumns) -> Tensor:
    """See `Backend.live_hidden`."""
    rows, width = len(dz_CA), head_VH.shape[1]
    tiles = product_tiles("live_hidden", dz_CA)
    out_CH = dz_CA.new_empty(rows, width, dtype=torch.float32)
    products.live_hidden[(triton.cdiv(rows, tiles.rows), triton.cdiv(width, tiles.columns))](
        dz_CA, dz_CA.stride(0), *live, head_VH, *head_VH.stride(), out_CH, rows, width, **tile_options(tiles)
    )
    return out_CH


def add_live_head(
    sums_VH: Tensor, first_V: Tensor | None, number: int, dz_CA: Tensor, hidden_CH: Tensor, live: LiveColumns
) -> None:
    """See `Backend.add_live_head`; sums_VH and hidden_CH contiguous."""
    rows, width = hidden_CH.shape
    tiles = product_tiles("live_head", dz_CA)
    products.live_head[(LIVE_PROGRAMS, triton.cdiv(width, tiles.columns))](
        dz_CA, dz_CA.stride(0), *live, hidden_CH, sums_VH, live.columns_A if first_V is None else first_V, number,
        rows, width, HAS_FIRST=first_V is not None, **tile_options(tiles),
    )  # fmt: skip


def rescaled(grad: Tensor, factor: Tensor, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
    """See `Backend.rescaled`; for contiguous tensors and a float32 factor. Torch's own product with a 0-d tensor on the
    device and another output dtype runs at half the memory's speed."""
    out = torch.empty_like(grad, dtype=dtype)
    if rows is None:
        gradients.rescale[(triton.cdiv(grad.numel(), RESCALE_BLOCK),)](
            grad, factor, out, grad.numel(), BLOCK=RESCALE_BLOCK, num_warps=4, **COMPILED
        )
    else:
        width = grad.shape[1]
        gradients.rescale_rows[(len(grad),)](
            grad, rows, factor, out, width, BLOCK=triton.next_power_of_2(width), num_warps=4, **COMPILED
        )
    return out
