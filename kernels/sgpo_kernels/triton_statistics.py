"""Triton kernels from logits to row values: softmax statistics, gates, losses, and the table that dz is computed from.

What: per chunk `scan_tiles` -> `combine_tiles` -> `label_row_values`, or `pair_row_values` and, after the sums of
  `triton_gradients.divergence_tiles`, `divergence_row_values`.
Equation: backend_torch.py has the same arithmetic in plain torch.
Source: as backend_torch.py.
Gradient: the table's planes; dz is formed from them in triton_gradients.py.
Memory: the tile statistics, [3, C, T] for T column tiles.
Precision: float32 throughout. Every sum over the vocabulary is made of one partial sum per tile, added up in a fixed
  order: no atomics, the same bits each time.
Limits: finite logits; column tiles lie on grid axis y (65535 tiles). Gates are evaluated from run-time arguments;
  nothing that is annealed is a compile-time constant.
"""

# Triton reads these functions, Python does not: the rules of its types do not hold.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from sgpo_kernels.triton_constants import (
    CENTRE,
    CENTRE_SUM,
    CLIPPED,
    DIVERGENCE,
    DIVERGENCE_SUM,
    ENTROPY,
    ENTROPY_SLOPE,
    EXP_SUM,
    LABEL_LOGIT,
    LOG_SUM,
    LOGPROB,
    MASK,
    MAX,
    OVER,
    PAIR_ROWS,
    POLICY,
    RATIO,
    ROW_ENTROPY,
    ROW_LOSS,
    SCALE,
    SIZE_SUM,
    SIZES,
    SLOPE,
    STAT_ROWS,
    STRENGTH,
    TEACHER_ENTROPY,
    TEACHER_LOG_SUM,
    TEACHER_MAX,
    TOP,
    TOTAL,
    UPSTREAM,
    WEIGHTED_SUM,
)
from sgpo_kernels.triton_tiles import load_inv_temperature, load_tile, tanh


@triton.jit(do_not_specialize=SIZES)
def scan_tiles(
    products_ptr, stride, bias_ptr, inv_temperature_ptr, softcap, tiles_ptr, C, V, T,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_TEMPERATURE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """tiles [3, C, T]: max, sum e^(z - max), sum e^(z - max) (z - max) of each row in each column tile."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    row_inside, column_inside = rows < C, columns < V
    inv_temperature = load_inv_temperature(inv_temperature_ptr, rows, row_inside, HAS_TEMPERATURE)
    z, _ = load_tile(products_ptr, stride, rows, row_inside, columns, column_inside, bias_ptr, inv_temperature,
                     softcap, HAS_BIAS, HAS_SOFTCAP)  # fmt: skip
    top = tl.max(z, 1)
    below = tl.where(column_inside[None, :], z - top[:, None], float("-inf"))
    exp = tl.exp(below)
    at = rows.to(tl.int64) * T + tl.program_id(1)
    plane = C.to(tl.int64) * T
    tl.store(tiles_ptr + TOP * plane + at, top, mask=row_inside)
    tl.store(tiles_ptr + EXP_SUM * plane + at, tl.sum(exp, 1), mask=row_inside)
    weighted = tl.where(column_inside[None, :], exp * below, 0.0)
    tl.store(tiles_ptr + WEIGHTED_SUM * plane + at, tl.sum(weighted, 1), mask=row_inside)


@triton.jit(do_not_specialize=SIZES)
def combine_tiles(
    tiles_ptr, row_step, tile_step, products_ptr, stride, bias_ptr, inv_temperature_ptr, softcap, labels_ptr, stats_ptr,
    C, T,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, HAS_LABELS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """stats [STAT_ROWS, C]: max, sum, weighted sum of the whole row, from those of its tiles [3, ...] with the steps
    given; and, where labels are, the label's logit (-inf without one)."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    tiles = tl.arange(0, BLOCK_T)
    row_inside = rows < C
    inside = row_inside[:, None] & (tiles < T)[None, :]
    at = rows.to(tl.int64)[:, None] * row_step + tiles[None, :] * tile_step
    plane = C.to(tl.int64) * T
    tops = tl.load(tiles_ptr + TOP * plane + at, mask=inside, other=float("-inf"))
    sums = tl.load(tiles_ptr + EXP_SUM * plane + at, mask=inside, other=0.0)
    weighted = tl.load(tiles_ptr + WEIGHTED_SUM * plane + at, mask=inside, other=0.0)
    top = tl.max(tops, 1)
    below = tl.where(inside, tops - top[:, None], 0.0)
    factor = tl.where(inside, tl.exp(below), 0.0)
    tl.store(stats_ptr + TOP * C + rows, top, mask=row_inside)
    tl.store(stats_ptr + EXP_SUM * C + rows, tl.sum(factor * sums, 1), mask=row_inside)
    tl.store(stats_ptr + WEIGHTED_SUM * C + rows, tl.sum(factor * (weighted + sums * below), 1), mask=row_inside)
    if HAS_LABELS:
        labels = tl.load(labels_ptr + rows, mask=row_inside, other=-1)
        found = row_inside & (labels >= 0)
        z = tl.load(products_ptr + rows.to(tl.int64) * stride + labels, mask=found, other=0.0)
        if HAS_BIAS:
            z += tl.load(bias_ptr + labels, mask=found, other=0.0)
        if HAS_SOFTCAP:
            z = softcap * tanh(z / softcap)
        if HAS_TEMPERATURE:
            z *= tl.load(inv_temperature_ptr + rows, mask=row_inside, other=1.0)
        tl.store(stats_ptr + LABEL_LOGIT * C + rows, tl.where(found, z, float("-inf")), mask=row_inside)


@triton.jit
def _combine_shards(parts_ptr, first, K: tl.constexpr, C, rows, row_inside, RANKS: tl.constexpr):
    """Shard statistics, parts [RANKS, K, C] from plane `first` -> (max, sum, entropy, label's logit) of whole rows."""
    top = tl.load(parts_ptr + (first + TOP) * C + rows, mask=row_inside, other=0.0)
    hit = tl.load(parts_ptr + (first + LABEL_LOGIT) * C + rows, mask=row_inside, other=0.0)
    for rank in tl.static_range(1, RANKS):
        base = parts_ptr + (rank * K + first) * C + rows
        top = tl.maximum(top, tl.load(base + TOP * C, mask=row_inside, other=0.0))
        hit = tl.maximum(hit, tl.load(base + LABEL_LOGIT * C, mask=row_inside, other=0.0))
    total = 0.0 * top
    weighted = 0.0 * top
    for rank in tl.static_range(RANKS):
        base = parts_ptr + (rank * K + first) * C + rows
        below = tl.load(base + TOP * C, mask=row_inside, other=0.0) - top
        factor = tl.exp(below)
        part = tl.load(base + EXP_SUM * C, mask=row_inside, other=1.0)
        total += factor * part
        weighted += factor * (tl.load(base + WEIGHTED_SUM * C, mask=row_inside, other=0.0) + part * below)
    log_sum = tl.log(total)
    return top, log_sum, log_sum - weighted / total, hit


@triton.jit
def _shard_mass(parts_ptr, first, K: tl.constexpr, C, rows, row_inside, rank, top, log_sum):
    base = parts_ptr + (rank * K + first) * C + rows
    own = tl.load(base + TOP * C, mask=row_inside, other=0.0)
    return tl.load(base + EXP_SUM * C, mask=row_inside, other=0.0) * tl.exp(own - top - log_sum)


@triton.jit(do_not_specialize=SIZES)
def label_row_values(
    parts_ptr, rank, labels_ptr, rows_ptr, factor_ptr, first_ptr, second_ptr, old_ptr,
    lower, upper, dual, values_ptr, table_ptr, C, N,
    MODE: tl.constexpr, HAS_OLD: tl.constexpr, HAS_FACTOR: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row values and the table of score rows. `first`, `second`: the upstream gradients of log-prob and entropy
    (UPSTREAM), or advantage and weight (POLICY). Bounds that are off come as infinities."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < C
    rows = tl.load(rows_ptr + at, mask=inside, other=0)
    top, log_sum, entropy, hit = _combine_shards(parts_ptr, 0, STAT_ROWS, C, at, inside, RANKS)
    logprob = (hit - top) - log_sum
    if MODE != UPSTREAM:
        tl.store(values_ptr + LOGPROB * N + rows, logprob, mask=inside)
        tl.store(values_ptr + ROW_ENTROPY * N + rows, entropy, mask=inside)
    slope = 0.0 * top
    strength = 0.0 * top
    extra = 0.0 * top
    if MODE == UPSTREAM:
        slope = tl.load(first_ptr + rows, mask=inside, other=0.0)
        extra = tl.load(second_ptr + rows, mask=inside, other=0.0)
    if MODE == POLICY:
        advantage = tl.load(first_ptr + rows, mask=inside, other=0.0)
        weight = tl.load(second_ptr + rows, mask=inside, other=0.0)
        old = tl.load(old_ptr + rows, mask=inside, other=0.0) if HAS_OLD else logprob
        ratio = tl.exp(logprob - old)
        clipped = ((advantage > 0) & (ratio > upper)) | ((advantage < 0) & (ratio < lower))
        beyond = (advantage < 0) & (ratio > dual)
        used = tl.where(clipped, tl.minimum(tl.maximum(ratio, lower), upper), ratio)
        used = tl.where(beyond, dual, used)
        clipped = clipped | beyond
        strength = tl.where(clipped, 0.0, ratio)
        slope = tl.where(clipped, 0.0, -ratio * advantage) * weight
        tl.store(values_ptr + RATIO * N + rows, ratio, mask=inside)
        tl.store(values_ptr + CLIPPED * N + rows, tl.where(clipped, 1.0, 0.0), mask=inside)
        tl.store(values_ptr + ROW_LOSS * N + rows, -used * advantage * weight, mask=inside)
    if HAS_FACTOR:
        factor = tl.load(factor_ptr + at, mask=inside, other=0.0)
        labels = tl.load(labels_ptr + at, mask=inside, other=-1)
        mass = _shard_mass(parts_ptr, 0, STAT_ROWS, C, at, inside, rank, top, log_sum)
        tl.store(table_ptr + MAX * C + at, top, mask=inside)
        tl.store(table_ptr + LOG_SUM * C + at, log_sum, mask=inside)
        tl.store(table_ptr + SLOPE * C + at, slope * factor, mask=inside)
        tl.store(table_ptr + STRENGTH * C + at, strength, mask=inside)
        tl.store(table_ptr + ENTROPY_SLOPE * C + at, extra * factor, mask=inside)
        tl.store(table_ptr + ENTROPY * C + at, entropy, mask=inside)
        # sum |onehot - p| over this shard: its mass, with 1 - p instead of p at the label.
        mass += tl.where(labels >= 0, 1.0 - 2.0 * tl.exp(logprob), 0.0)
        tl.store(table_ptr + TOTAL * C + at, mass, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def pair_row_values(
    parts_ptr, rank, rows_ptr, values_ptr, table_ptr, C, N, RANKS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Normalisers and entropies of both contexts, parts [RANKS, 2 * STAT_ROWS, C]."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < C
    rows = tl.load(rows_ptr + at, mask=inside, other=0)
    top, log_sum, entropy, _ = _combine_shards(parts_ptr, 0, PAIR_ROWS, C, at, inside, RANKS)
    teacher_top, teacher_log_sum, teacher_entropy, _ = _combine_shards(
        parts_ptr, STAT_ROWS, PAIR_ROWS, C, at, inside, RANKS
    )
    tl.store(values_ptr + ROW_ENTROPY * N + rows, entropy, mask=inside)
    tl.store(values_ptr + TEACHER_ENTROPY * N + rows, teacher_entropy, mask=inside)
    tl.store(table_ptr + MAX * C + at, top, mask=inside)
    tl.store(table_ptr + LOG_SUM * C + at, log_sum, mask=inside)
    tl.store(table_ptr + ENTROPY * C + at, entropy, mask=inside)
    tl.store(table_ptr + TEACHER_MAX * C + at, teacher_top, mask=inside)
    tl.store(table_ptr + TEACHER_LOG_SUM * C + at, teacher_log_sum, mask=inside)
    mass = _shard_mass(parts_ptr, 0, PAIR_ROWS, C, at, inside, rank, top, log_sum)
    tl.store(table_ptr + TOTAL * C + at, mass, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def divergence_row_values(
    sums_ptr, weight_ptr, rows_ptr, factor_ptr, limit, values_ptr, table_ptr, C, N,
    OVER_LIMIT: tl.constexpr, HAS_FACTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Limit, loss and slopes from the summed divergence, centre and size, sums [3, C]. No limit comes as infinity."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < C
    rows = tl.load(rows_ptr + at, mask=inside, other=0)
    divergence = tl.load(sums_ptr + DIVERGENCE_SUM * C + at, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + rows, mask=inside, other=0.0)
    # NaN is over any limit; infinity, which stands for none, is not one.
    over = (divergence <= limit) == 0
    over = over & (limit < float("inf"))
    value_over = tl.zeros([BLOCK], tl.float32)
    gate_over = tl.zeros([BLOCK], tl.float32)
    if OVER_LIMIT != MASK:
        value_over += limit
    if OVER_LIMIT == SCALE:
        gate_over = tl.where(divergence == divergence, limit / divergence, 0.0)
    gate = tl.where(over, gate_over, 1.0)
    tl.store(values_ptr + DIVERGENCE * N + rows, divergence, mask=inside)
    tl.store(values_ptr + OVER * N + rows, tl.where(over, 1.0, 0.0), mask=inside)
    tl.store(values_ptr + ROW_LOSS * N + rows, tl.where(over, value_over, divergence) * weight, mask=inside)
    if HAS_FACTOR:
        factor = tl.load(factor_ptr + at, mask=inside, other=0.0)
        centre = tl.load(sums_ptr + CENTRE_SUM * C + at, mask=inside, other=0.0)
        size = tl.load(sums_ptr + SIZE_SUM * C + at, mask=inside, other=0.0)
        mass = tl.load(table_ptr + TOTAL * C + at, mask=inside, other=0.0)
        tl.store(table_ptr + SLOPE * C + at, gate * weight * factor, mask=inside)
        tl.store(table_ptr + STRENGTH * C + at, gate, mask=inside)
        tl.store(table_ptr + CENTRE * C + at, centre, mask=inside)
        tl.store(table_ptr + TOTAL * C + at, size + tl.abs(centre) * mass, mask=inside)
