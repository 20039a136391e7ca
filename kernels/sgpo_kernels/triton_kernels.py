"""The Triton kernels behind `backend_triton`: row arithmetic on tiles [BLOCK_R, BLOCK_V] of float32 products.

What: per chunk `scan_tiles` -> `combine_tiles` -> `settle_*`, then `divergence_tiles`, `peak_tiles`, `gradient_tiles`
  or `gradient_column_tiles`. Equations: see backend_torch, whose functions are the same arithmetic in plain torch.
Order: every sum over the vocabulary is made of one partial sum per tile, added up in a fixed order: no atomics, the
  same bits each time. Gates are evaluated in the settle kernels from run-time arguments; nothing that is annealed is a
  compile-time constant.
Precision: float32 throughout; products are read once per stage, -inf outside the vocabulary.
Limits: finite logits; row offsets are 64-bit; column tiles lie on grid axis y (65535 tiles).
"""

# Triton reads these functions, Python does not: the rules of its types do not hold.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

# Kinds of rows, as compile-time constants: the names with an underscore are for use inside kernels.
SCORE, FORWARD_KL, REVERSE_KL, JS = 0, 1, 2, 3
# Arguments that vary from chunk to chunk: no variant of their own for 1 or for multiples of 16.
SIZES = ("C", "N", "A", "T", "rank")
# What `settle_scores` is asked for.
VALUES, UPSTREAM, POLICY = 0, 1, 2
MASK, CLAMP, SCALE = 0, 1, 2
SCORE_, FORWARD_KL_, REVERSE_KL_, JS_ = (tl.constexpr(kind) for kind in (SCORE, FORWARD_KL, REVERSE_KL, JS))
UPSTREAM_, POLICY_ = tl.constexpr(UPSTREAM), tl.constexpr(POLICY)
MASK_, SCALE_ = tl.constexpr(MASK), tl.constexpr(SCALE)


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))


@triton.jit
def _logits(products, inside, bias_ptr, columns, column_inside, heat, softcap, HAS_BIAS: tl.constexpr,
            HAS_SOFTCAP: tl.constexpr):  # fmt: skip
    """(logits, d logit / d (product + bias) without the temperature); -inf outside the vocabulary."""
    z = products
    if HAS_BIAS:
        z += tl.load(bias_ptr + columns, mask=column_inside, other=0.0)[None, :]
    chain = 1.0 + 0.0 * z
    if HAS_SOFTCAP:
        tanh = _tanh(z / softcap)
        z = tl.where(inside, softcap * tanh, float("-inf"))
        chain = 1.0 - tanh * tanh
    return z * heat[:, None], chain


@triton.jit
def _tile(products_ptr, stride, rows, row_inside, columns, column_inside, bias_ptr, heat, softcap,
          HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):  # fmt: skip
    inside = row_inside[:, None] & column_inside[None, :]
    offsets = rows.to(tl.int64)[:, None] * stride + columns.to(tl.int64)[None, :]
    products = tl.load(products_ptr + offsets, mask=inside, other=float("-inf"))
    return _logits(products, inside, bias_ptr, columns, column_inside, heat, softcap, HAS_BIAS, HAS_SOFTCAP)


@triton.jit
def _row_heat(heat_ptr, rows, row_inside, HAS_HEAT: tl.constexpr):
    heat = tl.load(heat_ptr + rows, mask=row_inside, other=1.0) if HAS_HEAT else tl.where(row_inside, 1.0, 1.0)
    return heat


@triton.jit(do_not_specialize=SIZES)
def scan_tiles(
    products_ptr, stride, bias_ptr, heat_ptr, softcap, tiles_ptr, C, V, T,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_HEAT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """tiles [3, C, T]: max, sum e^(z - max), sum e^(z - max) (z - max) of each row in each column tile."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    row_inside, column_inside = rows < C, columns < V
    heat = _row_heat(heat_ptr, rows, row_inside, HAS_HEAT)
    z, _ = _tile(products_ptr, stride, rows, row_inside, columns, column_inside, bias_ptr, heat, softcap, HAS_BIAS,
                 HAS_SOFTCAP)  # fmt: skip
    top = tl.max(z, 1)
    below = tl.where(column_inside[None, :], z - top[:, None], float("-inf"))
    exp = tl.exp(below)
    at = rows.to(tl.int64) * T + tl.program_id(1)
    plane = C.to(tl.int64) * T
    tl.store(tiles_ptr + at, top, mask=row_inside)
    tl.store(tiles_ptr + plane + at, tl.sum(exp, 1), mask=row_inside)
    weighted = tl.where(column_inside[None, :], exp * below, 0.0)
    tl.store(tiles_ptr + 2 * plane + at, tl.sum(weighted, 1), mask=row_inside)


@triton.jit(do_not_specialize=SIZES)
def combine_tiles(
    tiles_ptr, products_ptr, stride, bias_ptr, heat_ptr, softcap, targets_ptr, stats_ptr, C, T,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_HEAT: tl.constexpr, HAS_TARGETS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """stats [4, C]: max, sum, weighted sum of the whole row, and the target's logit (-inf without one)."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    tiles = tl.arange(0, BLOCK_T)
    row_inside = rows < C
    inside = row_inside[:, None] & (tiles < T)[None, :]
    at = rows.to(tl.int64)[:, None] * T + tiles[None, :]
    plane = C.to(tl.int64) * T
    tops = tl.load(tiles_ptr + at, mask=inside, other=float("-inf"))
    sums = tl.load(tiles_ptr + plane + at, mask=inside, other=0.0)
    weighted = tl.load(tiles_ptr + 2 * plane + at, mask=inside, other=0.0)
    top = tl.max(tops, 1)
    below = tl.where(inside, tops - top[:, None], 0.0)
    factor = tl.where(inside, tl.exp(below), 0.0)
    tl.store(stats_ptr + rows, top, mask=row_inside)
    tl.store(stats_ptr + C + rows, tl.sum(factor * sums, 1), mask=row_inside)
    tl.store(stats_ptr + 2 * C + rows, tl.sum(factor * (weighted + sums * below), 1), mask=row_inside)
    if HAS_TARGETS:
        targets = tl.load(targets_ptr + rows, mask=row_inside, other=-1)
        found = row_inside & (targets >= 0)
        z = tl.load(products_ptr + rows.to(tl.int64) * stride + targets, mask=found, other=0.0)
        if HAS_BIAS:
            z += tl.load(bias_ptr + targets, mask=found, other=0.0)
        if HAS_SOFTCAP:
            z = softcap * _tanh(z / softcap)
        if HAS_HEAT:
            z *= tl.load(heat_ptr + rows, mask=row_inside, other=1.0)
        tl.store(stats_ptr + 3 * C + rows, tl.where(found, z, float("-inf")), mask=row_inside)


@triton.jit
def _combine_shards(parts_ptr, first, K: tl.constexpr, C, rows, row_inside, RANKS: tl.constexpr):
    """Shard statistics, parts [RANKS, K, C] from plane `first` -> (max, sum, entropy, target logit) of whole rows."""
    top = tl.load(parts_ptr + first * C + rows, mask=row_inside, other=0.0)
    hit = tl.load(parts_ptr + (first + 3) * C + rows, mask=row_inside, other=0.0)
    for rank in tl.static_range(1, RANKS):
        base = parts_ptr + (rank * K + first) * C + rows
        top = tl.maximum(top, tl.load(base, mask=row_inside, other=0.0))
        hit = tl.maximum(hit, tl.load(base + 3 * C, mask=row_inside, other=0.0))
    total = 0.0 * top
    weighted = 0.0 * top
    for rank in tl.static_range(RANKS):
        base = parts_ptr + (rank * K + first) * C + rows
        below = tl.load(base, mask=row_inside, other=0.0) - top
        factor = tl.exp(below)
        part = tl.load(base + C, mask=row_inside, other=1.0)
        total += factor * part
        weighted += factor * (tl.load(base + 2 * C, mask=row_inside, other=0.0) + part * below)
    log_sum = tl.log(total)
    return top, log_sum, log_sum - weighted / total, hit


@triton.jit
def _shard_mass(parts_ptr, first, K: tl.constexpr, C, rows, row_inside, rank, top, log_sum):
    base = parts_ptr + (rank * K + first) * C + rows
    own = tl.load(base, mask=row_inside, other=0.0)
    return tl.load(base + C, mask=row_inside, other=0.0) * tl.exp(own - top - log_sum)


@triton.jit(do_not_specialize=SIZES)
def settle_scores(
    parts_ptr, rank, targets_ptr, rows_ptr, factor_ptr, first_ptr, second_ptr, old_ptr,
    lower, upper, dual, values_ptr, table_ptr, C, N,
    MODE: tl.constexpr, HAS_OLD: tl.constexpr, HAS_FACTOR: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row values and the table of score rows. `first`, `second`: the upstream gradients of log-prob and entropy
    (UPSTREAM), or advantage and weight (POLICY). Bounds that are off come as infinities."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < C
    rows = tl.load(rows_ptr + at, mask=inside, other=0)
    top, log_sum, entropy, hit = _combine_shards(parts_ptr, 0, 4, C, at, inside, RANKS)
    logprob = (hit - top) - log_sum
    if MODE != UPSTREAM_:
        tl.store(values_ptr + rows, logprob, mask=inside)
        tl.store(values_ptr + N + rows, entropy, mask=inside)
    slope = 0.0 * top
    strength = 0.0 * top
    extra = 0.0 * top
    if MODE == UPSTREAM_:
        slope = tl.load(first_ptr + rows, mask=inside, other=0.0)
        extra = tl.load(second_ptr + rows, mask=inside, other=0.0)
    if MODE == POLICY_:
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
        tl.store(values_ptr + 2 * N + rows, ratio, mask=inside)
        tl.store(values_ptr + 3 * N + rows, tl.where(clipped, 1.0, 0.0), mask=inside)
        tl.store(values_ptr + 4 * N + rows, -used * advantage * weight, mask=inside)
    if HAS_FACTOR:
        factor = tl.load(factor_ptr + at, mask=inside, other=0.0)
        targets = tl.load(targets_ptr + at, mask=inside, other=-1)
        mass = _shard_mass(parts_ptr, 0, 4, C, at, inside, rank, top, log_sum)
        tl.store(table_ptr + at, top, mask=inside)
        tl.store(table_ptr + C + at, log_sum, mask=inside)
        tl.store(table_ptr + 2 * C + at, slope * factor, mask=inside)
        tl.store(table_ptr + 3 * C + at, strength, mask=inside)
        tl.store(table_ptr + 4 * C + at, extra * factor, mask=inside)
        tl.store(table_ptr + 5 * C + at, entropy, mask=inside)
        tl.store(table_ptr + 8 * C + at, mass + tl.where(targets >= 0, 1.0 - 2.0 * tl.exp(logprob), 0.0), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def settle_pair(
    parts_ptr, rank, rows_ptr, values_ptr, table_ptr, C, N, RANKS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Normalisers and entropies of both contexts, parts [RANKS, 8, C]."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < C
    rows = tl.load(rows_ptr + at, mask=inside, other=0)
    top, log_sum, entropy, _ = _combine_shards(parts_ptr, 0, 8, C, at, inside, RANKS)
    teacher_top, teacher_log_sum, teacher_entropy, _ = _combine_shards(parts_ptr, 4, 8, C, at, inside, RANKS)
    tl.store(values_ptr + N + rows, entropy, mask=inside)
    tl.store(values_ptr + 2 * N + rows, teacher_entropy, mask=inside)
    tl.store(table_ptr + at, top, mask=inside)
    tl.store(table_ptr + C + at, log_sum, mask=inside)
    tl.store(table_ptr + 5 * C + at, entropy, mask=inside)
    tl.store(table_ptr + 6 * C + at, teacher_top, mask=inside)
    tl.store(table_ptr + 7 * C + at, teacher_log_sum, mask=inside)
    tl.store(table_ptr + 8 * C + at, _shard_mass(parts_ptr, 0, 8, C, at, inside, rank, top, log_sum), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def settle_divergence(
    sums_ptr, weight_ptr, rows_ptr, factor_ptr, limit, values_ptr, table_ptr, C, N,
    OVER: tl.constexpr, HAS_FACTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Limit, loss and slopes from the summed divergence, centre and size, sums [3, C]. No limit comes as infinity."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < C
    rows = tl.load(rows_ptr + at, mask=inside, other=0)
    divergence = tl.load(sums_ptr + at, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + rows, mask=inside, other=0.0)
    over = divergence > limit
    value_over = 0.0 * divergence
    gate_over = 0.0 * divergence
    if OVER != MASK_:
        value_over += limit
    if OVER == SCALE_:
        gate_over = limit / divergence
    gate = tl.where(over, gate_over, 1.0)
    tl.store(values_ptr + rows, divergence, mask=inside)
    tl.store(values_ptr + 3 * N + rows, tl.where(over, 1.0, 0.0), mask=inside)
    tl.store(values_ptr + 4 * N + rows, tl.where(over, value_over, divergence) * weight, mask=inside)
    if HAS_FACTOR:
        factor = tl.load(factor_ptr + at, mask=inside, other=0.0)
        centre = tl.load(sums_ptr + C + at, mask=inside, other=0.0)
        size = tl.load(sums_ptr + 2 * C + at, mask=inside, other=0.0)
        mass = tl.load(table_ptr + 8 * C + at, mask=inside, other=0.0)
        tl.store(table_ptr + 2 * C + at, gate * weight * factor, mask=inside)
        tl.store(table_ptr + 3 * C + at, gate, mask=inside)
        tl.store(table_ptr + 4 * C + at, centre, mask=inside)
        tl.store(table_ptr + 8 * C + at, size + tl.abs(centre) * mass, mask=inside)


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
    products_ptr, stride, bias_ptr, teacher_ptr, teacher_stride, teacher_bias_ptr, heat_ptr, softcap, table_ptr,
    sums_ptr, C, V, T,
    KIND: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TEACHER_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_HEAT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """sums [3, C, T]: the divergence's terms, the centre's, and those of the size, per column tile."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    row_inside, column_inside = rows < C, columns < V
    inside = row_inside[:, None] & column_inside[None, :]
    heat = _row_heat(heat_ptr, rows, row_inside, HAS_HEAT)
    z_S, _ = _tile(products_ptr, stride, rows, row_inside, columns, column_inside, bias_ptr, heat, softcap, HAS_BIAS,
                   HAS_SOFTCAP)  # fmt: skip
    z_T, _ = _tile(teacher_ptr, teacher_stride, rows, row_inside, columns, column_inside, teacher_bias_ptr, heat,
                   softcap, HAS_TEACHER_BIAS, HAS_SOFTCAP)  # fmt: skip
    top = tl.load(table_ptr + rows, mask=row_inside, other=0.0)
    log_sum = tl.load(table_ptr + C + rows, mask=row_inside, other=0.0)
    teacher_top = tl.load(table_ptr + 6 * C + rows, mask=row_inside, other=0.0)
    teacher_log_sum = tl.load(table_ptr + 7 * C + rows, mask=row_inside, other=0.0)
    logp_S = tl.where(inside, (z_S - top[:, None]) - log_sum[:, None], 0.0)
    logp_T = tl.where(inside, (z_T - teacher_top[:, None]) - teacher_log_sum[:, None], 0.0)
    p_S = tl.where(inside, tl.exp(logp_S), 0.0)
    p_T = tl.where(inside, tl.exp(logp_T), 0.0)
    u = logp_S - logp_T
    if KIND == JS_:
        g, a = _js_parts(0.5 * u)
        terms = g * (p_S + p_T) * 0.5
        centre = p_S * a
        size = p_S * tl.abs(a)
    elif KIND == REVERSE_KL_:
        terms = _kl_terms(p_S, p_T, -u)
        centre = terms
        size = p_S * tl.abs(u)
    else:
        terms = _kl_terms(p_T, p_S, u)
        centre = 0.0 * terms
        size = tl.abs(p_S - p_T)
    at = rows.to(tl.int64) * T + tl.program_id(1)
    plane = C.to(tl.int64) * T
    tl.store(sums_ptr + at, tl.sum(terms, 1), mask=row_inside)
    tl.store(sums_ptr + plane + at, tl.sum(centre, 1), mask=row_inside)
    tl.store(sums_ptr + 2 * plane + at, tl.sum(size, 1), mask=row_inside)


@triton.jit
def _core(z_S, z_T, is_target, inside, table_ptr, rows, row_inside, C, KIND: tl.constexpr):
    """(core, size, log p_S, p_S) of a tile: dz = SLOPE core, size >= |core|; zeros outside."""
    top = tl.load(table_ptr + rows, mask=row_inside, other=0.0)
    log_sum = tl.load(table_ptr + C + rows, mask=row_inside, other=0.0)
    logp_S = tl.where(inside, (z_S - top[:, None]) - log_sum[:, None], 0.0)
    p_S = tl.where(inside, tl.exp(logp_S), 0.0)
    if KIND == SCORE_:
        core = tl.where(is_target, 1.0 - p_S, -p_S)
        size = tl.abs(core)
    else:
        teacher_top = tl.load(table_ptr + 6 * C + rows, mask=row_inside, other=0.0)
        teacher_log_sum = tl.load(table_ptr + 7 * C + rows, mask=row_inside, other=0.0)
        logp_T = tl.where(inside, (z_T - teacher_top[:, None]) - teacher_log_sum[:, None], 0.0)
        if KIND == FORWARD_KL_:
            core = p_S - tl.where(inside, tl.exp(logp_T), 0.0)
            size = tl.abs(core)
        else:
            centre = tl.load(table_ptr + 4 * C + rows, mask=row_inside, other=0.0)[:, None]
            x = logp_S - logp_T
            if KIND == JS_:
                _, x = _js_parts(0.5 * x)
            core = p_S * (x - centre)
            size = p_S * (tl.abs(x) + tl.abs(centre))
    return core, size, logp_S, p_S


@triton.jit(do_not_specialize=SIZES)
def peak_tiles(
    products_ptr, stride, bias_ptr, teacher_ptr, teacher_stride, teacher_bias_ptr, heat_ptr, softcap, table_ptr,
    targets_ptr, tiles_ptr, teacher_tiles_ptr, threshold_ptr, peaks_ptr, C, V, T,
    KIND: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TEACHER_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_HEAT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """peaks [row blocks, V]: the largest |core| STRENGTH of each column in each block of rows.

    A tile whose largest probabilities (from scan's tile maxima) stay below the threshold is not read: its peaks are
    stored as 0. Reverse KL and JS have no such bound and are always read.
    """
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    row_inside, column_inside = rows < C, columns < V
    strength = tl.load(table_ptr + 3 * C + rows, mask=row_inside, other=0.0)
    targets = rows * 0 - 1
    reach = 1.0 + 0.0 * strength
    if (KIND == SCORE_) | (KIND == FORWARD_KL_):
        top = tl.load(table_ptr + rows, mask=row_inside, other=0.0)
        log_sum = tl.load(table_ptr + C + rows, mask=row_inside, other=0.0)
        at = rows.to(tl.int64) * T + tl.program_id(1)
        reach = tl.exp(tl.load(tiles_ptr + at, mask=row_inside, other=float("-inf")) - top - log_sum)
        if KIND == SCORE_:
            targets = tl.load(targets_ptr + rows, mask=row_inside, other=-1).to(tl.int32)
            here = (targets >= tl.program_id(1) * BLOCK_V) & (targets < (tl.program_id(1) + 1) * BLOCK_V)
            reach = tl.where(here, 1.0, reach)
        else:
            top = tl.load(table_ptr + 6 * C + rows, mask=row_inside, other=0.0)
            log_sum = tl.load(table_ptr + 7 * C + rows, mask=row_inside, other=0.0)
            other = tl.load(teacher_tiles_ptr + at, mask=row_inside, other=float("-inf"))
            reach = tl.maximum(reach, tl.exp(other - top - log_sum))
        # Written so that NaN is read.
        reach = tl.where(reach * strength * 1.0001 < tl.load(threshold_ptr), 0.0, 1.0)
    peaks = tl.zeros([BLOCK_V], tl.float32)
    if tl.max(tl.where(row_inside, reach, 0.0), 0) > 0.0:
        inside = row_inside[:, None] & column_inside[None, :]
        heat = _row_heat(heat_ptr, rows, row_inside, HAS_HEAT)
        z_S, _ = _tile(products_ptr, stride, rows, row_inside, columns, column_inside, bias_ptr, heat, softcap,
                       HAS_BIAS, HAS_SOFTCAP)  # fmt: skip
        z_T = z_S
        if KIND != SCORE_:
            z_T, _ = _tile(teacher_ptr, teacher_stride, rows, row_inside, columns, column_inside, teacher_bias_ptr,
                           heat, softcap, HAS_TEACHER_BIAS, HAS_SOFTCAP)  # fmt: skip
        is_target = columns[None, :] == targets[:, None]
        core, _, _, _ = _core(z_S, z_T, is_target, inside, table_ptr, rows, row_inside, C, KIND)
        size = tl.abs(core) * strength[:, None]
        # NaN would be lost in a maximum: it becomes a peak above any tolerance.
        peaks = tl.max(tl.where(size == size, size, 4.0), 0)
    at = tl.program_id(0).to(tl.int64) * V + columns
    tl.store(peaks_ptr + at, peaks, mask=column_inside)


@triton.jit(do_not_specialize=SIZES)
def gradient_tiles(
    products_ptr, stride, bias_ptr, teacher_ptr, teacher_stride, teacher_bias_ptr, heat_ptr, softcap, table_ptr,
    targets_ptr, out_ptr, out_stride, C, V,
    KIND: tl.constexpr, WITH_ENTROPY: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TEACHER_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_HEAT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dz of every column into out [C, V]; out may be the products themselves."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    row_inside, column_inside = rows < C, columns < V
    inside = row_inside[:, None] & column_inside[None, :]
    heat = _row_heat(heat_ptr, rows, row_inside, HAS_HEAT)
    z_S, chain = _tile(products_ptr, stride, rows, row_inside, columns, column_inside, bias_ptr, heat, softcap,
                       HAS_BIAS, HAS_SOFTCAP)  # fmt: skip
    z_T = z_S
    targets = rows * 0 - 1
    if KIND == SCORE_:
        targets = tl.load(targets_ptr + rows, mask=row_inside, other=-1).to(tl.int32)
    else:
        z_T, _ = _tile(teacher_ptr, teacher_stride, rows, row_inside, columns, column_inside, teacher_bias_ptr, heat,
                       softcap, HAS_TEACHER_BIAS, HAS_SOFTCAP)  # fmt: skip
    is_target = columns[None, :] == targets[:, None]
    core, _, logp, p = _core(z_S, z_T, is_target, inside, table_ptr, rows, row_inside, C, KIND)
    dz = core * tl.load(table_ptr + 2 * C + rows, mask=row_inside, other=0.0)[:, None]
    if WITH_ENTROPY:
        slope = tl.load(table_ptr + 4 * C + rows, mask=row_inside, other=0.0)[:, None]
        entropy = tl.load(table_ptr + 5 * C + rows, mask=row_inside, other=0.0)[:, None]
        dz -= slope * p * (logp + entropy)
    if HAS_SOFTCAP:
        dz *= chain
    offsets = rows.to(tl.int64)[:, None] * out_stride + columns.to(tl.int64)[None, :]
    tl.store(out_ptr + offsets, dz.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def gradient_column_tiles(
    products_ptr, stride, bias_ptr, teacher_ptr, teacher_stride, teacher_bias_ptr, heat_ptr, softcap, table_ptr,
    targets_ptr, live_ptr, count_ptr, out_ptr, out_stride, kept_ptr, C, A, T,
    KIND: tl.constexpr, HAS_COUNT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TEACHER_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_HEAT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dz of the live columns into out [C, A], and their share of TOTAL per tile into kept [C, T]. With a count only so
    many of the A columns are live, and the dz of the others is 0."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    place = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    row_inside, place_inside = rows < C, place < A
    whole = row_inside[:, None] & place_inside[None, :]
    if HAS_COUNT:
        place_inside = place_inside & (place < tl.load(count_ptr))
    inside = row_inside[:, None] & place_inside[None, :]
    columns = tl.load(live_ptr + place, mask=place_inside, other=0).to(tl.int32)
    heat = _row_heat(heat_ptr, rows, row_inside, HAS_HEAT)
    z_S, chain = _tile(products_ptr, stride, rows, row_inside, columns, place_inside, bias_ptr, heat, softcap,
                       HAS_BIAS, HAS_SOFTCAP)  # fmt: skip
    z_T = z_S
    targets = rows * 0 - 1
    if KIND == SCORE_:
        targets = tl.load(targets_ptr + rows, mask=row_inside, other=-1).to(tl.int32)
    else:
        z_T, _ = _tile(teacher_ptr, teacher_stride, rows, row_inside, columns, place_inside, teacher_bias_ptr, heat,
                       softcap, HAS_TEACHER_BIAS, HAS_SOFTCAP)  # fmt: skip
    is_target = inside & (columns[None, :] == targets[:, None])
    core, size, _, _ = _core(z_S, z_T, is_target, inside, table_ptr, rows, row_inside, C, KIND)
    dz = core * tl.load(table_ptr + 2 * C + rows, mask=row_inside, other=0.0)[:, None]
    if HAS_SOFTCAP:
        dz *= chain
    offsets = rows.to(tl.int64)[:, None] * out_stride + place.to(tl.int64)[None, :]
    tl.store(out_ptr + offsets, tl.where(inside, dz, 0.0).to(out_ptr.dtype.element_ty), mask=whole)
    at = rows.to(tl.int64) * T + tl.program_id(1)
    tl.store(kept_ptr + at, tl.sum(tl.where(inside, size, 0.0), 1), mask=row_inside)


@triton.jit
def rescale(grad_ptr, factor_ptr, out_ptr, N, BLOCK: tl.constexpr):
    """out = grad * factor, rounded to the dtype of out."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    grad = tl.load(grad_ptr + at, mask=at < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (grad * tl.load(factor_ptr)).to(out_ptr.dtype.element_ty), mask=at < N)
