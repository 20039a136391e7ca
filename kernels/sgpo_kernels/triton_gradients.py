"""Triton kernels from the table to gradients: divergence sums, column peaks, dz of all columns or of the live ones.

What: per chunk `divergence_tiles` (distillation rows, before their values), `peak_tiles` (with a column tolerance),
  `live_columns` and `place_columns`, then `gradient_tiles` or `gradient_column_tiles`; `rescale` for the finished
  gradients. How many columns live only the device knows.
Equation: backend_torch.py has the same arithmetic in plain torch; dz = SLOPE * core.
Source: as backend_torch.py.
Gradient: d loss / d (product + bias): the derivative of the soft-cap is in it.
Memory: [3, C, T] partial sums for T column tiles; [C / BLOCK_R, V] column peaks.
Precision: float32 throughout, dz rounded to the dtype of its buffer; one partial sum per tile, added up in a fixed
  order, no atomics. Products are read once per kernel.
Limits: finite logits; row offsets are 64-bit; column tiles lie on grid axis y (65535 tiles).
"""

# Triton reads these functions, Python does not: the rules of its types do not hold.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from sgpo_kernels.triton_constants import (
    CENTRE,
    CENTRE_SUM,
    DIVERGENCE_SUM,
    DROPPED,
    ENTROPY,
    ENTROPY_SLOPE,
    FORWARD_KL,
    JS,
    LOG_SUM,
    MAX,
    REVERSE_KL,
    SCORE,
    SHARE,
    SIZE_SUM,
    SIZES,
    SLOPE,
    STRENGTH,
    TEACHER_LOG_SUM,
    TEACHER_MAX,
    TOTAL,
)
from sgpo_kernels.triton_tiles import load_inv_temperature, load_tile, store_live, store_live_sums


@triton.jit
def _kl_terms(p, q, u):
    """p (e^u - 1 - u) with u = log(q / p), each >= 0."""
    series = u * u * (0.5 + u * (1 / 6 + u * (1 / 24 + u * (1 / 120 + u * (1 / 720 + u * (1 / 5040))))))
    exact = tl.exp(tl.minimum(u, 1.0)) - 1.0 - u
    near = p * tl.where(tl.abs(u) < 0.25, series, exact)
    return tl.where(u > 1.0, q - p * (1.0 + u), near)


@triton.jit
def _js_parts(v):
    """(g(v) = v tanh v - log cosh v >= 0, a = (v - log cosh v) / 2)."""
    size = tl.abs(v)
    t = tl.exp(-2.0 * size)
    tail = tl.log(0.5 + 0.5 * t)
    square = v * v
    g_series = square * (1 / 2 - square * (1 / 4 - square * (1 / 9 - square * (17 / 360))))
    c_series = square * (1 / 2 - square * (1 / 12 - square * (1 / 45 - square * (17 / 2520))))
    small = size < 0.25
    g = tl.where(small, g_series, -2.0 * size * t / (1.0 + t) - tail)
    return g, 0.5 * (v - tl.where(small, c_series, size + tail))


@triton.jit(do_not_specialize=SIZES)
def divergence_tiles(
    products_ptr, stride, bias_ptr, teacher_ptr, teacher_stride, teacher_bias_ptr, inv_temperature_ptr, softcap,
    table_ptr, sums_ptr, C, V, T,
    KIND: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TEACHER_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """sums [3, C, T]: the divergence's terms, the centre's, and those of the size, per column tile."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    row_inside, column_inside = rows < C, columns < V
    inside = row_inside[:, None] & column_inside[None, :]
    inv_temperature = load_inv_temperature(inv_temperature_ptr, rows, row_inside, HAS_TEMPERATURE)
    z_S, _ = load_tile(products_ptr, stride, rows, row_inside, columns, column_inside, bias_ptr, inv_temperature,
                       softcap, HAS_BIAS, HAS_SOFTCAP)  # fmt: skip
    z_T, _ = load_tile(teacher_ptr, teacher_stride, rows, row_inside, columns, column_inside, teacher_bias_ptr,
                       inv_temperature, softcap, HAS_TEACHER_BIAS, HAS_SOFTCAP)  # fmt: skip
    top = tl.load(table_ptr + MAX * C + rows, mask=row_inside, other=0.0)
    log_sum = tl.load(table_ptr + LOG_SUM * C + rows, mask=row_inside, other=0.0)
    teacher_top = tl.load(table_ptr + TEACHER_MAX * C + rows, mask=row_inside, other=0.0)
    teacher_log_sum = tl.load(table_ptr + TEACHER_LOG_SUM * C + rows, mask=row_inside, other=0.0)
    logp_S = tl.where(inside, (z_S - top[:, None]) - log_sum[:, None], 0.0)
    logp_T = tl.where(inside, (z_T - teacher_top[:, None]) - teacher_log_sum[:, None], 0.0)
    p_S = tl.where(inside, tl.exp(logp_S), 0.0)
    p_T = tl.where(inside, tl.exp(logp_T), 0.0)
    u = logp_S - logp_T
    if KIND == JS:
        g, a = _js_parts(0.5 * u)
        terms = g * (p_S + p_T) * 0.5
        centre = p_S * a
        size = p_S * tl.abs(a)
    elif KIND == REVERSE_KL:
        terms = _kl_terms(p_S, p_T, -u)
        centre = terms
        size = p_S * tl.abs(u)
    else:
        terms = _kl_terms(p_T, p_S, u)
        centre = 0.0 * terms
        size = tl.abs(p_S - p_T)
    at = rows.to(tl.int64) * T + tl.program_id(1)
    plane = C.to(tl.int64) * T
    tl.store(sums_ptr + DIVERGENCE_SUM * plane + at, tl.sum(terms, 1), mask=row_inside)
    tl.store(sums_ptr + CENTRE_SUM * plane + at, tl.sum(centre, 1), mask=row_inside)
    tl.store(sums_ptr + SIZE_SUM * plane + at, tl.sum(size, 1), mask=row_inside)


@triton.jit
def _core(z_S, z_T, is_label, inside, table_ptr, rows, row_inside, C, KIND: tl.constexpr):
    """(core, size, log p_S, p_S) of a tile: dz = SLOPE core, size >= |core|; zeros outside."""
    top = tl.load(table_ptr + MAX * C + rows, mask=row_inside, other=0.0)
    log_sum = tl.load(table_ptr + LOG_SUM * C + rows, mask=row_inside, other=0.0)
    logp_S = tl.where(inside, (z_S - top[:, None]) - log_sum[:, None], 0.0)
    p_S = tl.where(inside, tl.exp(logp_S), 0.0)
    if KIND == SCORE:
        core = tl.where(is_label, 1.0 - p_S, -p_S)
        size = tl.abs(core)
    else:
        teacher_top = tl.load(table_ptr + TEACHER_MAX * C + rows, mask=row_inside, other=0.0)
        teacher_log_sum = tl.load(table_ptr + TEACHER_LOG_SUM * C + rows, mask=row_inside, other=0.0)
        logp_T = tl.where(inside, (z_T - teacher_top[:, None]) - teacher_log_sum[:, None], 0.0)
        if KIND == FORWARD_KL:
            core = p_S - tl.where(inside, tl.exp(logp_T), 0.0)
            size = tl.abs(core)
        else:
            centre = tl.load(table_ptr + CENTRE * C + rows, mask=row_inside, other=0.0)[:, None]
            x = logp_S - logp_T
            if KIND == JS:
                _, x = _js_parts(0.5 * x)
            core = p_S * (x - centre)
            size = p_S * (tl.abs(x) + tl.abs(centre))
    return core, size, logp_S, p_S


@triton.jit(do_not_specialize=SIZES)
def peak_tiles(
    products_ptr, stride, bias_ptr, teacher_ptr, teacher_stride, teacher_bias_ptr, inv_temperature_ptr, softcap,
    table_ptr, labels_ptr, tiles_ptr, teacher_tiles_ptr, threshold_ptr, peaks_ptr, C, V, T,
    KIND: tl.constexpr, SKIP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TEACHER_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """peaks [row blocks, V]: the largest |core| STRENGTH of each column in each block of rows.

    With SKIP, a tile whose largest probabilities (from scan's tile maxima) stay below the threshold is not read: its
    peaks are stored as 0. Reverse KL and JS have no such bound and are always read.
    """
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    row_inside, column_inside = rows < C, columns < V
    strength = tl.load(table_ptr + STRENGTH * C + rows, mask=row_inside, other=0.0)
    labels = rows * 0 - 1
    if KIND == SCORE:
        labels = tl.load(labels_ptr + rows, mask=row_inside, other=-1).to(tl.int32)
    reach = 1.0 + 0.0 * strength
    if SKIP:
        top = tl.load(table_ptr + MAX * C + rows, mask=row_inside, other=0.0)
        log_sum = tl.load(table_ptr + LOG_SUM * C + rows, mask=row_inside, other=0.0)
        at = rows.to(tl.int64) * T + tl.program_id(1)
        reach = tl.exp(tl.load(tiles_ptr + at, mask=row_inside, other=float("-inf")) - top - log_sum)
        if KIND == SCORE:
            here = (labels >= tl.program_id(1) * BLOCK_V) & (labels < (tl.program_id(1) + 1) * BLOCK_V)
            reach = tl.where(here, 1.0, reach)
        else:
            top = tl.load(table_ptr + TEACHER_MAX * C + rows, mask=row_inside, other=0.0)
            log_sum = tl.load(table_ptr + TEACHER_LOG_SUM * C + rows, mask=row_inside, other=0.0)
            other = tl.load(teacher_tiles_ptr + at, mask=row_inside, other=float("-inf"))
            reach = tl.maximum(reach, tl.exp(other - top - log_sum))
        # Written so that NaN is read.
        reach = tl.where(reach * strength * 1.0001 < tl.load(threshold_ptr), 0.0, 1.0)
    peaks = tl.zeros([BLOCK_V], tl.float32)
    if tl.max(tl.where(row_inside, reach, 0.0), 0) > 0.0:
        inside = row_inside[:, None] & column_inside[None, :]
        inv_temperature = load_inv_temperature(inv_temperature_ptr, rows, row_inside, HAS_TEMPERATURE)
        z_S, _ = load_tile(products_ptr, stride, rows, row_inside, columns, column_inside, bias_ptr, inv_temperature,
                           softcap, HAS_BIAS, HAS_SOFTCAP)  # fmt: skip
        z_T = z_S
        if KIND != SCORE:
            z_T, _ = load_tile(teacher_ptr, teacher_stride, rows, row_inside, columns, column_inside,
                               teacher_bias_ptr, inv_temperature, softcap, HAS_TEACHER_BIAS, HAS_SOFTCAP)  # fmt: skip
        is_label = columns[None, :] == labels[:, None]
        core, _, _, _ = _core(z_S, z_T, is_label, inside, table_ptr, rows, row_inside, C, KIND)
        size = tl.abs(core) * strength[:, None]
        # NaN would be lost in a maximum: it becomes a peak above any tolerance.
        peaks = tl.max(tl.where(size == size, size, 4.0), 0)
    at = tl.program_id(0).to(tl.int64) * V + columns
    tl.store(peaks_ptr + at, peaks, mask=column_inside)


@triton.jit(do_not_specialize=SIZES)
def gradient_tiles(
    products_ptr, stride, bias_ptr, teacher_ptr, teacher_stride, teacher_bias_ptr, inv_temperature_ptr, softcap,
    table_ptr, labels_ptr, out_ptr, out_stride, C, V,
    KIND: tl.constexpr, WITH_ENTROPY: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TEACHER_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dz of every column into out [C, V]; out may be the products themselves."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    row_inside, column_inside = rows < C, columns < V
    inside = row_inside[:, None] & column_inside[None, :]
    inv_temperature = load_inv_temperature(inv_temperature_ptr, rows, row_inside, HAS_TEMPERATURE)
    z_S, chain = load_tile(products_ptr, stride, rows, row_inside, columns, column_inside, bias_ptr, inv_temperature,
                           softcap, HAS_BIAS, HAS_SOFTCAP)  # fmt: skip
    z_T = z_S
    labels = rows * 0 - 1
    if KIND == SCORE:
        labels = tl.load(labels_ptr + rows, mask=row_inside, other=-1).to(tl.int32)
    else:
        z_T, _ = load_tile(teacher_ptr, teacher_stride, rows, row_inside, columns, column_inside, teacher_bias_ptr,
                           inv_temperature, softcap, HAS_TEACHER_BIAS, HAS_SOFTCAP)  # fmt: skip
    is_label = columns[None, :] == labels[:, None]
    core, _, logp, p = _core(z_S, z_T, is_label, inside, table_ptr, rows, row_inside, C, KIND)
    slope = tl.load(table_ptr + SLOPE * C + rows, mask=row_inside, other=0.0)[:, None]
    # A row that a limit has dropped is zeros even where its core is NaN.
    dz = tl.where(slope == 0.0, 0.0, core * slope)
    if WITH_ENTROPY:
        entropy_slope = tl.load(table_ptr + ENTROPY_SLOPE * C + rows, mask=row_inside, other=0.0)[:, None]
        entropy = tl.load(table_ptr + ENTROPY * C + rows, mask=row_inside, other=0.0)[:, None]
        dz -= entropy_slope * p * (logp + entropy)
    if HAS_SOFTCAP:
        dz *= chain
    offsets = rows.to(tl.int64)[:, None] * out_stride + columns.to(tl.int64)[None, :]
    tl.store(out_ptr + offsets, dz.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def gradient_column_tiles(
    products_ptr, stride, bias_ptr, teacher_ptr, teacher_stride, teacher_bias_ptr, inv_temperature_ptr, softcap,
    table_ptr, labels_ptr, live_ptr, count_ptr, out_ptr, out_stride, sums_ptr, C,
    KIND: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TEACHER_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dz of the `count` live columns into out [C, count], zeros up to the next multiple of 16; and per program of the
    second grid axis, which take turns with the column tiles, their share of TOTAL and the sum of dz into sums [2, C,
    programs]."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_inside = rows < C
    inv_temperature = load_inv_temperature(inv_temperature_ptr, rows, row_inside, HAS_TEMPERATURE)
    labels = rows * 0 - 1
    if KIND == SCORE:
        labels = tl.load(labels_ptr + rows, mask=row_inside, other=-1).to(tl.int32)
    slope = tl.load(table_ptr + SLOPE * C + rows, mask=row_inside, other=0.0)[:, None]
    count = tl.load(count_ptr)
    kept = tl.zeros([BLOCK_R], tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    for tile in tl.range(tl.program_id(1), tl.cdiv(count, BLOCK_V), tl.num_programs(1)):
        place = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        place_inside = place < count
        inside = row_inside[:, None] & place_inside[None, :]
        columns = tl.load(live_ptr + place, mask=place_inside, other=0)
        z_S, chain = load_tile(products_ptr, stride, rows, row_inside, columns, place_inside, bias_ptr,
                               inv_temperature, softcap, HAS_BIAS, HAS_SOFTCAP)  # fmt: skip
        z_T = z_S
        if KIND != SCORE:
            z_T, _ = load_tile(teacher_ptr, teacher_stride, rows, row_inside, columns, place_inside,
                               teacher_bias_ptr, inv_temperature, softcap, HAS_TEACHER_BIAS, HAS_SOFTCAP)  # fmt: skip
        is_label = inside & (columns[None, :] == labels[:, None])
        core, size, _, _ = _core(z_S, z_T, is_label, inside, table_ptr, rows, row_inside, C, KIND)
        dz = tl.where(slope == 0.0, 0.0, core * slope)
        if HAS_SOFTCAP:
            dz *= chain
        dz = tl.where(inside, dz, 0.0)
        store_live(out_ptr, out_stride, dz, rows, row_inside, place, count)
        kept += tl.sum(tl.where(inside, size, 0.0), 1)
        total += tl.sum(dz, 1)
    store_live_sums(sums_ptr, kept, total, rows, row_inside, C)


@triton.jit(do_not_specialize=(*SIZES, "tolerance"))
def column_threshold(table_ptr, tolerance, threshold_ptr, C, BLOCK: tl.constexpr):
    """threshold = tolerance min(1, max STRENGTH TOTAL), by one program. NaN is passed on."""
    at = tl.arange(0, BLOCK)
    strength = tl.load(table_ptr + STRENGTH * C + at, mask=at < C, other=0.0)
    size = strength * tl.load(table_ptr + TOTAL * C + at, mask=at < C, other=0.0)
    nan = tl.max(tl.where(size == size, 0, 1), 0)
    largest = tl.minimum(tl.max(tl.where(size == size, size, 0.0), 0), 1.0)
    tl.store(threshold_ptr, tl.where(nan > 0, float("nan"), largest * tolerance))


@triton.jit(do_not_specialize=SIZES)
def live_columns(
    peaks_ptr, reach_ptr, forced_ptr, threshold_ptr, alive_ptr, dropped_ptr, counts_ptr, T, V,
    SWEPT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """From peaks [T, V] per block of rows: whether each column's largest is not below the threshold, the largest of the
    others (0 where it is not), and how many of each program's columns live. SWEPT: peaks are logs, which `reach` [T]
    belongs to, and `forced` columns live anyhow."""
    columns = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    blocks = tl.arange(0, BLOCK_T)
    inside = columns < V
    offsets = blocks.to(tl.int64)[:, None] * V + columns[None, :]
    mask = (blocks < T)[:, None] & inside[None, :]
    if SWEPT:
        peaks = tl.load(peaks_ptr + offsets, mask=mask, other=float("-inf"))
        peaks += tl.load(reach_ptr + blocks, mask=blocks < T, other=0.0)[:, None]
        largest = tl.exp(tl.max(tl.where(peaks == peaks, peaks, float("inf")), 0))
    else:
        largest = tl.max(tl.load(peaks_ptr + offsets, mask=mask, other=0.0), 0)
    dead = (largest < tl.load(threshold_ptr)) | (largest == 0.0)
    if SWEPT:
        dead = dead & (tl.load(forced_ptr + columns, mask=inside, other=0) == 0)
    tl.store(alive_ptr + columns, dead == 0, mask=inside)
    tl.store(dropped_ptr + columns, tl.where(dead, largest, 0.0), mask=inside)
    tl.store(counts_ptr + tl.program_id(0), tl.sum(tl.where(inside & (dead == 0), 1, 0), 0))


@triton.jit(do_not_specialize=(*SIZES, "limit"))
def place_columns(
    alive_ptr, counts_ptr, live_ptr, count_ptr, limit, T, V, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr
):  # fmt: skip
    """The live columns in ascending order into live [V], the last column in the places behind them, and their number.
    Where there are more than `limit`, every column lives."""
    program = tl.program_id(0)
    tiles = tl.arange(0, BLOCK_T)
    counts = tl.load(counts_ptr + tiles, mask=tiles < T, other=0)
    total = tl.sum(counts, 0)
    columns = program * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = columns < V
    # V where every column lives, else 0.
    every = tl.where(total > limit, V, 0)
    alive = tl.load(alive_ptr + columns, mask=inside, other=0).to(tl.int32)
    alive = tl.where(inside & (columns < every), 1, alive)
    before = tl.where(every > 0, program * BLOCK_V, tl.sum(tl.where(tiles < program, counts, 0), 0))
    tl.store(live_ptr + before + tl.cumsum(alive, 0) - 1, columns, mask=alive != 0)
    total = tl.maximum(total, every)
    tl.store(live_ptr + columns, V - 1, mask=inside & (columns >= total))
    if program == 0:
        tl.store(count_ptr, total)


@triton.jit(do_not_specialize=(*SIZES, "share"))
def finish_columns(
    table_ptr, kept_ptr, sum_ptr, count_ptr, scale_ptr, rows_ptr, values_ptr, share, floor, margin, C, N, V,
    HAS_SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """DROPPED and SHARE of the chunk's rows into values; nothing is dropped where every column lives."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < C
    rows = tl.load(rows_ptr + at, mask=inside, other=0)
    total = tl.load(table_ptr + TOTAL * C + at, mask=inside, other=0.0)
    slope = tl.load(table_ptr + SLOPE * C + at, mask=inside, other=0.0)
    lost = total - tl.load(kept_ptr + at, mask=inside, other=0.0)
    lost = tl.where(lost < 0.0, 0.0, lost) * margin + floor * tl.where(total < 1.0, 1.0, total)
    lost *= tl.abs(slope)
    if HAS_SUM:
        lost += tl.abs(tl.load(sum_ptr + at, mask=inside, other=0.0))
    count = tl.load(count_ptr)
    lost = tl.where(count == V, 0.0, lost * tl.load(scale_ptr))
    tl.store(values_ptr + DROPPED * N + rows, lost, mask=inside)
    tl.store(values_ptr + SHARE * N + rows, rows * 0 + count * share, mask=inside)


@triton.jit
def rescale(grad_ptr, factor_ptr, out_ptr, N, BLOCK: tl.constexpr):
    """out = grad * factor, rounded to the dtype of out."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    grad = tl.load(grad_ptr + at, mask=at < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (grad * tl.load(factor_ptr)).to(out_ptr.dtype.element_ty), mask=at < N)


@triton.jit
def rescale_rows(grad_ptr, rows_ptr, factor_ptr, out_ptr, H, BLOCK: tl.constexpr):
    """The same of a matrix [V, H], a row per program: zeros, and nothing read, where `rows` is 0."""
    row = tl.program_id(0).to(tl.int64)
    width = tl.arange(0, BLOCK)
    held = width < tl.where(tl.load(rows_ptr + row) != 0, H, 0)
    grad = tl.load(grad_ptr + row * H + width, mask=held, other=0.0).to(tl.float32)
    # 0 times a factor that is not finite is not 0.
    grad = tl.where(held, grad * tl.load(factor_ptr), 0.0)
    tl.store(out_ptr + row * H + width, grad.to(out_ptr.dtype.element_ty), mask=width < H)
