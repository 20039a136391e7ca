"""The row arithmetic in plain torch: softmax statistics, gates, divergences, dz. The functions of `backend.Backend`.

What: block by block of a chunk's rows, so that a chain of elementwise operations stays in the cache. `scan` turns the
  products into logits in place, and those of rows with labels into e^(z - MAX), which is all that a score needs later
  (with a soft-cap they stay logits: its derivative is taken from them).
Equation: p = softmax(z); entropy = log sum e^(z - max) - sum e^(z - max) (z - max) / sum e^(z - max). With
  u = log p_S - log p_T and v = u / 2:
    forward KL(T||S) = sum p_T f(u)         f(u) = e^u - 1 - u              dz = p_S - p_T
    reverse KL(S||T) = sum p_S f(-u)                                        dz = p_S (u - KL)
    JS (beta = 1/2)  = sum m g(v)           g(v) = v tanh v - log cosh v    dz = p_S (a - sum p_S a)
    m = (p_S + p_T) / 2, a = (log p_S - log m) / 2 = (v - log cosh v) / 2
Source: arXiv 2606.24064 Eq. 1 (surrogate), Eq. 3 and Eq. 5 (forward KL and its limit).
Gradient: dz = SLOPE * core, times the derivative of the soft-cap; see `score_core` and `divergence_core`.
Memory: `sizes.WORK_BLOCKS` tensors of a row block [B, V] in the accumulation dtype.
Precision: every divergence is a sum over the vocabulary of terms that are >= 0 in floating point too, so a small value
  keeps its relative accuracy and equal rows give exactly 0. The plain form, sum p_T (log p_T - log p_S), loses 77 % at
  KL = 5e-7. f and g go through their series for small arguments.
Limits: finite logits but for closed columns (head.py). NaN makes a row's values NaN, its divergence is over any limit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from sgpo_kernels import sizes
from sgpo_kernels.backend import (
    CENTRE,
    CENTRE_SUM,
    CLIPPED,
    DIVERGENCE,
    DIVERGENCE_SUM,
    DROPPED,
    ENTROPY,
    ENTROPY_SLOPE,
    EXP_SUM,
    LABEL_LOGIT,
    LOG_SUM,
    LOGPROB,
    MAX,
    OVER,
    RATIO,
    ROW_ENTROPY,
    ROW_LOSS,
    SHARE,
    SIZE_SUM,
    SLOPE,
    STAT_ROWS,
    STRENGTH,
    SUM_ROWS,
    TABLE_ROWS,
    TEACHER_ENTROPY,
    TEACHER_LOG_SUM,
    TEACHER_MAX,
    TOP,
    TOTAL,
    WEIGHTED_SUM,
    LiveColumns,
    Logits,
)
from sgpo_kernels.head import mm
from sgpo_kernels.inputs import ClipRange, KlLimit

# Below this |u| the terms of a divergence come from their series.
SERIES_BELOW = 0.05
# What float32 may lose in TOTAL - kept, relative to the row's |SLOPE| max(1, TOTAL), and in each of the probabilities.
DROPPED_FLOOR, DROPPED_MARGIN = 2.0**-18, 1e-4


def row_blocks(tensor_CV: Tensor) -> Iterator[slice]:
    """Slices of rows small enough that a chain of elementwise operations stays in the cache."""
    rows = sizes.block_rows(tensor_CV.shape[1], tensor_CV.dtype, tensor_CV.device.type)
    for start in range(0, tensor_CV.shape[0], rows):
        yield slice(start, start + rows)


# scan


def scan(logits: Logits, labels_C: Tensor | None) -> Tensor:
    """See `Backend.scan`; turns the products into logits, or into exponentials (see the module's text)."""
    in_place = labels_C is not None and logits.softcap is None
    stats_4C = logits.products_CV.new_empty(STAT_ROWS, logits.products_CV.shape[0])
    for rows in row_blocks(logits.products_CV):
        z_RV = _finish_(logits, rows)
        if labels_C is not None:
            stats_4C[LABEL_LOGIT, rows] = _at(z_RV, labels_C[rows], -math.inf)
        below_RV = z_RV - torch.amax(z_RV, 1, keepdim=True, out=stats_4C[TOP, rows].unsqueeze(1))
        exp_RV = torch.exp(below_RV, out=z_RV if in_place else None)
        stats_4C[EXP_SUM, rows] = exp_RV.sum(1)
        stats_4C[WEIGHTED_SUM, rows] = below_RV.mul_(exp_RV).sum(1)
    return stats_4C


def _finish_(logits: Logits, rows: slice) -> Tensor:
    """Products -> logits in place: bias, soft-cap, temperature."""
    z_RV = logits.products_CV[rows]
    if logits.bias_V is not None:
        z_RV.add_(logits.bias_V)
    if logits.softcap is not None:
        z_RV.div_(logits.softcap).tanh_().mul_(logits.softcap)
    if logits.inv_temperature_C is not None:
        z_RV.mul_(logits.inv_temperature_C[rows].unsqueeze(1))
    return z_RV


def _at(values_RV: Tensor, columns_R: Tensor, missing: float) -> Tensor:
    here = columns_R >= 0
    return torch.where(here, values_RV.gather(1, columns_R.clamp(min=0).unsqueeze(1)).squeeze(1), missing)


# row values


def combine(parts_RKC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of several vocabulary shards -> (max, log of the sum, entropy) of the whole row, [C] each."""
    maxima_RC, sums_RC, weighted_RC = parts_RKC[:, TOP], parts_RKC[:, EXP_SUM], parts_RKC[:, WEIGHTED_SUM]
    top_C = maxima_RC.amax(0)
    below_RC = maxima_RC - top_C
    factor_RC = below_RC.exp()
    total_C = (sums_RC * factor_RC).sum(0)
    log_sum_C = total_C.log()
    return top_C, log_sum_C, log_sum_C - (factor_RC * (weighted_RC + sums_RC * below_RC)).sum(0) / total_C


def _mass(parts_RKC: Tensor, rank: int, table: Tensor) -> Tensor:
    """sum p over the columns of one shard, [C]."""
    return parts_RKC[rank, EXP_SUM] * (parts_RKC[rank, TOP] - table[MAX] - table[LOG_SUM]).exp()


def _score_table(parts_R4C: Tensor, rank: int, labels_C: Tensor) -> tuple[Tensor, Tensor]:
    """(table, log-probability of the label). MAX is that of this shard, from which its exponentials are taken."""
    table = parts_R4C.new_zeros(TABLE_ROWS, parts_R4C.shape[2])
    top_C, log_sum_C, table[ENTROPY] = combine(parts_R4C)
    logprob_C = (parts_R4C[:, LABEL_LOGIT].amax(0) - top_C) - log_sum_C
    table[MAX] = parts_R4C[rank, TOP]
    table[LOG_SUM] = (top_C - table[MAX]) + log_sum_C
    # sum |onehot - p| over this shard: its mass, with 1 - p instead of p at the label.
    table[TOTAL] = _mass(parts_R4C, rank, table) + torch.where(labels_C >= 0, 1.0 - 2.0 * logprob_C.exp(), 0.0)
    return table, logprob_C


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
    table, logprob_C = _score_table(parts_R4C, rank, labels_C)
    if slopes is None:
        values[LOGPROB, rows_C], values[ROW_ENTROPY, rows_C] = logprob_C, table[ENTROPY]
    elif factor_C is not None:
        table[SLOPE], table[ENTROPY_SLOPE] = slopes[0][rows_C] * factor_C, slopes[1][rows_C] * factor_C
    return table


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_range: ClipRange) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, d loss / d logp, clipped) per row, before the weight."""
    lower = -math.inf if clip_range.clip_low is None else 1.0 - clip_range.clip_low
    upper = math.inf if clip_range.clip_high is None else 1.0 + clip_range.clip_high
    clipped = ((advantages > 0) & (ratio > upper)) | ((advantages < 0) & (ratio < lower))
    used = torch.where(clipped, ratio.clamp(lower, upper), ratio)
    if clip_range.dual_clip is not None:
        beyond = (advantages < 0) & (ratio > clip_range.dual_clip)
        clipped, used = clipped | beyond, torch.where(beyond, clip_range.dual_clip, used)
    slope = torch.where(clipped, 0.0, -ratio * advantages)
    return -used * advantages, slope, clipped


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
    table, logprob_C = _score_table(parts_R4C, rank, labels_C)
    ratio_C = (logprob_C - (logprob_C if old_N is None else old_N[rows_C])).exp()
    loss_C, slope_C, clipped_C = clipped_surrogate(ratio_C, advantages_N[rows_C], clip_range)
    weight_C = weight_N[rows_C]
    values[LOGPROB, rows_C], values[ROW_ENTROPY, rows_C] = logprob_C, table[ENTROPY]
    values[RATIO, rows_C], values[CLIPPED, rows_C] = ratio_C, clipped_C.to(ratio_C.dtype)
    values[ROW_LOSS, rows_C] = loss_C * weight_C
    if factor_C is not None:
        table[SLOPE] = slope_C * weight_C * factor_C
        table[STRENGTH] = torch.where(clipped_C, 0.0, ratio_C)
    return table


def pair_row_values(parts_R8C: Tensor, rank: int, rows_C: Tensor, values: Tensor) -> Tensor:
    """See `Backend.pair_row_values`."""
    student_R4C, teacher_R4C = parts_R8C[:, :STAT_ROWS], parts_R8C[:, STAT_ROWS:]
    table = parts_R8C.new_zeros(TABLE_ROWS, parts_R8C.shape[2])
    table[MAX], table[LOG_SUM], table[ENTROPY] = combine(student_R4C)
    table[TEACHER_MAX], table[TEACHER_LOG_SUM], teacher_entropy_C = combine(teacher_R4C)
    table[TOTAL] = _mass(student_R4C, rank, table)
    values[ROW_ENTROPY, rows_C], values[TEACHER_ENTROPY, rows_C] = table[ENTROPY], teacher_entropy_C
    return table


def limited(divergence: Tensor, kl_limit: KlLimit) -> tuple[Tensor, Tensor, Tensor]:
    """(value, gradient factor, over the limit) per row. NaN is over any limit, and has no gradient."""
    if kl_limit.max_token_kl is None:
        return divergence, torch.ones_like(divergence), torch.zeros_like(divergence, dtype=torch.bool)
    over = (divergence <= kl_limit.max_token_kl).logical_not_()
    value_over = 0.0 if kl_limit.over_limit == "mask" else kl_limit.max_token_kl
    factor_over = kl_limit.max_token_kl / divergence if kl_limit.over_limit == "scale" else torch.zeros_like(divergence)
    return torch.where(over, value_over, divergence), torch.where(over, factor_over.nan_to_num_(nan=0.0), 1.0), over


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
    divergence_C, centre_C, size_C = sums_3C[DIVERGENCE_SUM], sums_3C[CENTRE_SUM], sums_3C[SIZE_SUM]
    value_C, gate_C, over_C = limited(divergence_C, kl_limit)
    weight_C = weight_N[rows_C]
    values[DIVERGENCE, rows_C] = divergence_C
    values[OVER, rows_C], values[ROW_LOSS, rows_C] = over_C.to(value_C.dtype), value_C * weight_C
    if factor_C is not None:
        table[SLOPE], table[STRENGTH] = gate_C * weight_C * factor_C, gate_C
        table[CENTRE], table[TOTAL] = centre_C, size_C + centre_C.abs() * table[TOTAL]


# divergences


def kl_terms(p: Tensor, q: Tensor, u: Tensor) -> Tensor:
    """p (e^u - 1 - u) elementwise with u = log(q / p): the terms of KL(p||q), each >= 0."""
    series = u * u * (0.5 + u * (1 / 6 + u * (1 / 24 + u * (1 / 120 + u * (1 / 720)))))
    exact = u.clamp(max=1.0).expm1_().sub_(u)
    near = torch.where(u.abs() < SERIES_BELOW, series, exact)
    # e^u overflows for large u, and p e^u is q.
    return torch.where(u > 1.0, q - p * (1.0 + u), near.mul_(p))


def js_parts(logp_S: Tensor, p_S: Tensor, logp_T: Tensor, p_T: Tensor) -> tuple[Tensor, Tensor]:
    """(terms of JS, each >= 0, and a = (log p_S - log m) / 2) elementwise."""
    v = (logp_S - logp_T).div_(2)
    size = v.abs()
    # log cosh v = |v| + tail
    tail = (size * -2).expm1_().div_(2).log1p_()
    square = v * v
    series = square * (1 / 2 - square * (1 / 4 - square * (1 / 9 - square * (17 / 360))))
    exact = (size.tanh() - 1).mul_(size).sub_(tail)
    terms = torch.where(size < SERIES_BELOW / 2, series, exact).mul_(p_S + p_T).div_(2)
    return terms, v.sub_(size).sub_(tail).div_(2)


def log_probs(z_RK: Tensor, top_R: Tensor, log_sum_R: Tensor) -> Tensor:
    """z - max - log sum: the maximum is taken off first, so log p keeps its accuracy for logits of any size."""
    return (z_RK - top_R.unsqueeze(1)).sub_(log_sum_R.unsqueeze(1))


def divergence_sums(kind: str, student: Logits, teacher: Logits, table: Tensor) -> Tensor:
    """See `Backend.divergence_sums`."""
    sums_3C = table.new_zeros(SUM_ROWS, table.shape[1])
    for rows in row_blocks(student.products_CV):
        top, log_sum, top_T, log_sum_T = (table[k, rows] for k in (MAX, LOG_SUM, TEACHER_MAX, TEACHER_LOG_SUM))
        logp_S = log_probs(student.products_CV[rows], top, log_sum)
        logp_T = log_probs(teacher.products_CV[rows], top_T, log_sum_T)
        p_S, p_T = logp_S.exp(), logp_T.exp()
        if kind == "js":
            terms, a = js_parts(logp_S, p_S, logp_T, p_T)
            sums_3C[DIVERGENCE_SUM, rows], sums_3C[CENTRE_SUM, rows] = terms.sum(1), (p_S * a).sum(1)
            sums_3C[SIZE_SUM, rows] = a.abs_().mul_(p_S).sum(1)
        elif kind == "reverse_kl":
            u = logp_T.sub_(logp_S)
            sums_3C[DIVERGENCE_SUM, rows] = kl_terms(p_S, p_T, u).sum(1)
            sums_3C[CENTRE_SUM, rows] = sums_3C[DIVERGENCE_SUM, rows]
            sums_3C[SIZE_SUM, rows] = u.abs_().mul_(p_S).sum(1)
        else:
            sums_3C[DIVERGENCE_SUM, rows] = kl_terms(p_T, p_S, logp_S.sub_(logp_T)).sum(1)
            sums_3C[SIZE_SUM, rows] = p_S.sub_(p_T).abs_().sum(1)
    return sums_3C


# dz


def _add_one_hot_(core_RK: Tensor, labels_R: Tensor) -> Tensor:
    """Adds 1 at the label's column, in the accumulation dtype; rows without one (negative) stay as they are."""
    columns_R1 = labels_R.clamp(min=0).unsqueeze(1)
    return core_RK.scatter_(1, columns_R1, core_RK.gather(1, columns_R1) + (labels_R >= 0).unsqueeze(1))


def exponentials(z_RK: Tensor, logits: Logits, table: Tensor) -> Tensor:
    """e^(z - MAX) of score rows, from what `scan` left of them."""
    return z_RK if logits.softcap is None else (z_RK - table[MAX].unsqueeze(1)).exp_()


def score_core(exp_RK: Tensor, table: Tensor, labels_R: Tensor | None, out: Tensor | None = None) -> Tensor:
    """onehot - p on some columns [R, K] of some rows: dz = SLOPE core. Into `out`, which may be `exp_RK`."""
    core_RK = torch.mul(exp_RK, table[LOG_SUM].neg().exp_().neg_().unsqueeze(1), out=out)
    return core_RK if labels_R is None or not core_RK.shape[1] else _add_one_hot_(core_RK, labels_R)


def divergence_core(kind: str, z_S: Tensor, z_T: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """(core, size) on some columns [R, K] of some rows: dz = SLOPE core, see the module's text. |size| >= |core|
    elementwise, by terms that can be summed over the columns before the centre is known. Dropped rows are zeros."""
    dropped_R1 = (table[SLOPE] == 0).unsqueeze(1)  # by a limit; their core may be NaN
    logp_S = log_probs(z_S, table[MAX], table[LOG_SUM])
    logp_T = log_probs(z_T, table[TEACHER_MAX], table[TEACHER_LOG_SUM])
    if kind == "forward_kl":
        core_RK = logp_S.exp_().sub_(logp_T.exp_()).masked_fill_(dropped_R1, 0.0)
        return core_RK, core_RK
    p_S, centre_R1 = logp_S.exp(), table[CENTRE].unsqueeze(1)
    x = js_parts(logp_S, p_S, logp_T, logp_T.exp())[1] if kind == "js" else logp_S.sub_(logp_T)
    size_RK = x.abs().add_(centre_R1.abs()).mul_(p_S)
    return x.sub_(centre_R1).mul_(p_S).masked_fill_(dropped_R1, 0.0), size_RK


def _entropy_part(exp_RK: Tensor, table: Tensor) -> Tensor:
    """ENTROPY_SLOPE times the gradient of the entropy, -p (log p + entropy)."""
    logp = exp_RK.clamp(min=torch.finfo(exp_RK.dtype).tiny).log_().sub_(table[LOG_SUM].unsqueeze(1))
    prob = logp.exp()
    return logp.add_(table[ENTROPY].unsqueeze(1)).mul_(prob).mul_(-table[ENTROPY_SLOPE].unsqueeze(1))


def _through_softcap(z_RK: Tensor, logits: Logits, rows: slice) -> Tensor | None:
    """d (cap tanh(x / cap)) / dx = 1 - tanh^2, from the finished logits; None without a soft-cap."""
    if logits.softcap is None:
        return None
    tanh = z_RK / logits.softcap
    if logits.inv_temperature_C is not None:
        tanh.div_(logits.inv_temperature_C[rows].unsqueeze(1))
    return tanh.square_().neg_().add_(1.0)


def column_threshold(table: Tensor, tolerance: float) -> Tensor:
    """See `Backend.column_threshold`."""
    return (table[STRENGTH] * table[TOTAL]).amax().clamp(max=1.0) * tolerance


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
    """See `Backend.live_columns`; all peaks are exact here. On an accelerator the count is a host sync."""
    peaks_V = table.new_zeros(student.products_CV.shape[1])
    for rows in row_blocks(student.products_CV):
        z_RV, block = student.products_CV[rows], table[:, rows]
        if teacher is None:
            labels = None if labels_C is None else labels_C[rows]
            core_RV = score_core(exponentials(z_RV, student, block), block, labels)
        else:
            core_RV, _ = divergence_core(kind, z_RV, teacher.products_CV[rows], block)
        torch.maximum(peaks_V, core_RV.mul_(table[STRENGTH, rows].unsqueeze(1)).abs_().amax(0), out=peaks_V)
    columns_A = ((peaks_V < threshold) | (peaks_V == 0)).logical_not_().nonzero().squeeze(1)
    return LiveColumns(columns_A, None), peaks_V.index_fill_(0, columns_A, 0.0)


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
    """See `Backend.gradient`; the products of rows with labels are gone afterwards, whatever the output."""
    for rows in row_blocks(student.products_CV):
        z_RV, block = student.products_CV[rows], table[:, rows]
        chain = _through_softcap(z_RV, student, rows)
        if teacher is None:
            exp_RV = exponentials(z_RV, student, block)
            part_RV = _entropy_part(exp_RV, block) if with_entropy else None
            dz_RV = score_core(exp_RV, block, None if labels_C is None else labels_C[rows], out=z_RV)
        else:
            part_RV, (dz_RV, _) = None, divergence_core(kind, z_RV, teacher.products_CV[rows], block)
        dz_RV.mul_(block[SLOPE].unsqueeze(1))
        if part_RV is not None:
            dz_RV.add_(part_RV)
        if chain is not None:
            dz_RV.mul_(chain)
        if out_CV is not None or dz_RV is not z_RV:
            (student.products_CV if out_CV is None else out_CV)[rows] = dz_RV
    return student.products_CV if out_CV is None else out_CV


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
    columns_A = live.columns_A
    z_CA = student.products_CV.index_select(1, columns_A)
    z_T = None if teacher is None else teacher.products_CV.index_select(1, columns_A)
    where = None
    if labels_C is not None and columns_A.numel():
        # Positions among the live columns; -1 for a label that is not live.
        place_C = torch.searchsorted(columns_A, labels_C).clamp_(max=columns_A.numel() - 1)
        where = torch.where(columns_A[place_C] == labels_C, place_C, -1)
    chain = _through_softcap(z_CA, student, slice(None))
    if z_T is None:
        core_CA = size_CA = score_core(exponentials(z_CA, student, table), table, where)
    else:
        core_CA, size_CA = divergence_core(kind, z_CA, z_T, table)
    kept_C = size_CA.abs().sum(1)
    dz_CA = core_CA.mul_(table[SLOPE].unsqueeze(1))
    dz_CA = dz_CA if chain is None else dz_CA.mul_(chain)
    return dz_CA.to(dtype), kept_C, dz_CA.sum(1)


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
    total_C = table[TOTAL]
    lost_C = (total_C - kept_C).clamp_(min=0).mul_(1 + DROPPED_MARGIN).add_(DROPPED_FLOOR * total_C.clamp(min=1.0))
    lost_C.mul_(table[SLOPE].abs())
    if sum_C is not None:
        lost_C.add_(sum_C.abs())
    values[DROPPED].index_copy_(0, rows_C, lost_C.mul_(scale))
    values[SHARE].index_fill_(0, rows_C, live.columns_A.numel() / vocab)


def live_hidden(dz_CA: Tensor, head_VH: Tensor, live: LiveColumns) -> Tensor:
    """See `Backend.live_hidden`; the gathered rows of the head come block by block."""
    width = head_VH.shape[1]
    block = sizes.head_block_rows(width, sizes.accumulate_dtype(dz_CA.dtype), dz_CA.device.type)
    parts = zip(live.columns_A.split(block), dz_CA.split(block, 1), strict=True)
    columns, dz = next(parts)
    dhidden_CH = mm(dz, head_VH[columns])
    for columns, dz in parts:
        dhidden_CH.add_(mm(dz, head_VH[columns]))
    return dhidden_CH


def add_live_head(
    sums_VH: Tensor, first_V: Tensor | None, number: int, dz_CA: Tensor, hidden_CH: Tensor, live: LiveColumns
) -> None:
    """See `Backend.add_live_head`; every row of sums_VH holds its sum."""
    assert first_V is None
    block = sizes.head_block_rows(sums_VH.shape[1], sums_VH.dtype, sums_VH.device.type)
    for columns, dz in zip(live.columns_A.split(block), dz_CA.split(block, 1), strict=True):
        # No column appears twice: no order matters.
        sums_VH.index_add_(0, columns, mm(dz.t(), hidden_CH))


# scale


def rescaled(grad: Tensor, factor: Tensor, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
    """See `Backend.rescaled`."""
    result = torch.mul(grad, factor.reshape(1), out=torch.empty_like(grad, dtype=dtype))
    return result if rows is None else result.masked_fill_((rows == 0).unsqueeze(1), 0.0)


def power_of_two_scale(values: Tensor) -> Tensor:
    """The power of two just above max |values| (1 where that is 0 or not finite), 0-d. No host sync.

    Row gradients are divided by it before they are cast, so that a weight of 1e-7 does not vanish in float16; a power
    of two costs no rounding.
    """
    largest = values.abs().amax()
    _, exponent = torch.frexp(largest)
    usable = torch.isfinite(largest) & (largest > math.ldexp(1.0, -100))
    return torch.where(usable, torch.ldexp(torch.ones_like(largest), exponent), torch.ones_like(largest))
