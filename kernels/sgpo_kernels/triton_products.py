"""Triton kernels that multiply: dz of the live columns by the head and by the hidden states, and a sweep over the head
that leaves row statistics and no logits.

What: `live_hidden` and `live_head` form dH and dW of live columns whose number only the device knows. Without logits:
  `label_guess` -> `sweep` (statistics per column tile; with PEAKS the largest z - guess of each column in each block of
  rows) -> `triton_statistics.combine_tiles` -> row values -> `sweep_reach` (what the peaks are worth) -> live columns
  -> `gathered_gradient` (their logits once more, and dz).
Equation: dH = dz_A W_A, dW_A += dzᵀ h; z = h Wᵀ / temperature; p = e^(z - guess) e^(guess - log sum).
Source: arXiv 1805.02867 for the statistics of a tile.
Gradient: dz = SLOPE (onehot - p), as triton_gradients.py.
Memory: [3, T, C] tile statistics and [C / BLOCK_R, V] peaks instead of [C, V] logits.
Precision: half operands on tensor cores with float32 sums; float32 ones exactly (no TF32). Fixed order, no atomics.
Limits: `sweep` reads hidden states and head through TMA descriptors: rows of whole 16 bytes; no bias, no soft-cap, no
  vocabulary shards.
"""

# Triton reads these functions, Python does not: the rules of its types do not hold.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from sgpo_kernels.triton_constants import EXP_SUM, LOG_SUM, MAX, SIZES, SLOPE, STRENGTH, TOP, WEIGHTED_SUM
from sgpo_kernels.triton_tiles import load_inv_temperature, store_live, store_live_sums


@triton.jit(do_not_specialize=SIZES)
def live_hidden(
    dz_ptr, dz_stride, live_ptr, count_ptr, head_ptr, head_stride, head_step, out_ptr, C, H,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [C, H] = dz [C, count] W[live], float32."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    width = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    row_inside, width_inside = rows < C, width < H
    count = tl.load(count_ptr)
    padded = tl.cdiv(count, 16) * 16
    offsets = rows.to(tl.int64)[:, None] * dz_stride
    sums = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    for start in tl.range(0, count, BLOCK_K):
        place = start + tl.arange(0, BLOCK_K)
        taken = place < count
        dz = tl.load(dz_ptr + offsets + place[None, :], mask=row_inside[:, None] & (place < padded)[None, :],
                     other=0.0)  # fmt: skip
        live = tl.load(live_ptr + place, mask=taken, other=0).to(tl.int64)
        head = tl.load(head_ptr + live[:, None] * head_stride + width[None, :] * head_step,
                       mask=taken[:, None] & width_inside[None, :], other=0.0)  # fmt: skip
        sums = tl.dot(dz, head, sums, input_precision="ieee")
    at = rows.to(tl.int64)[:, None] * H + width[None, :]
    tl.store(out_ptr + at, sums, mask=row_inside[:, None] & width_inside[None, :])


@triton.jit(do_not_specialize=SIZES)
def live_head(
    dz_ptr, dz_stride, live_ptr, count_ptr, hidden_ptr, sums_ptr, first_ptr, number, C, H,
    HAS_FIRST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sums [V, H] at the live rows += dzᵀ h, dz [C, count], h [C, H]. Programs of the first grid axis take turns with
    the tiles of live rows; no row of sums is in two of them. HAS_FIRST: rows that no launch before this one, the
    `number`-th, has written are set; programs of the second axis may see the mark of another one of this launch."""
    width = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    width_inside = width < H
    count = tl.load(count_ptr)
    padded = tl.cdiv(count, 16) * 16
    for tile in tl.range(tl.program_id(0), tl.cdiv(count, BLOCK_R), tl.num_programs(0)):
        place = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        taken = place < count
        product = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
        for start in tl.range(0, C, BLOCK_K):
            rows = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
            inside = (rows < C)[:, None]
            dz = tl.load(dz_ptr + rows[:, None] * dz_stride + place[None, :], mask=inside & (place < padded)[None, :],
                         other=0.0)  # fmt: skip
            hidden = tl.load(hidden_ptr + rows[:, None] * H + width[None, :], mask=inside & width_inside[None, :],
                             other=0.0)  # fmt: skip
            product = tl.dot(tl.trans(dz), hidden, product, input_precision="ieee")
        live = tl.load(live_ptr + place, mask=taken, other=0).to(tl.int64)
        at = sums_ptr + live[:, None] * H + width[None, :]
        mask = taken[:, None] & width_inside[None, :]
        before = mask
        if HAS_FIRST:
            first = tl.load(first_ptr + live, mask=taken, other=0)
            tl.store(first_ptr + live, number, mask=taken & (first == 0))
            before = mask & ((first != 0) & (first != number))[:, None]
        tl.store(at, tl.load(at, mask=before, other=0.0) + product, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def label_guess(
    hidden_ptr, head_ptr, head_stride, labels_ptr, old_ptr, inv_temperature_ptr, guess_ptr, C, H,
    HAS_TEMPERATURE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """guess [C] of log sum e^z: the label's logit minus the log-prob that the sampling policy gave it."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    width = tl.arange(0, BLOCK_V)
    row_inside = rows < C
    inside = row_inside[:, None] & (width < H)[None, :]
    labels = tl.load(labels_ptr + rows, mask=row_inside, other=0).to(tl.int64)
    hidden = tl.load(hidden_ptr + rows.to(tl.int64)[:, None] * H + width[None, :], mask=inside, other=0.0)
    head = tl.load(head_ptr + labels[:, None] * head_stride + width[None, :], mask=inside, other=0.0)
    z = tl.sum(hidden.to(tl.float32) * head.to(tl.float32), 1)
    z *= load_inv_temperature(inv_temperature_ptr, rows, row_inside, HAS_TEMPERATURE)
    # A log-prob beyond any use would make the guess infinite; any guess is right, a near one saves work.
    old = tl.load(old_ptr + rows, mask=row_inside, other=0.0)
    tl.store(guess_ptr + rows, z - tl.maximum(tl.minimum(old, 0.0), -60.0), mask=row_inside)


@triton.jit
def _keep(
    z, row_tile, column_tile, labels_ptr, guess_ptr, inv_temperature_ptr, tiles_ptr, taken_ptr, peaks_ptr, C, V, T,
    PEAKS: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """What the sweep stores of one tile of products."""
    rows = row_tile * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = column_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    row_inside, column_inside = rows < C, columns < V
    inverse = load_inv_temperature(inv_temperature_ptr, rows, row_inside, HAS_TEMPERATURE)
    # The temperature is positive, so that the maximum stays where it is; a half without columns has one that is finite.
    top = tl.max(tl.where(column_inside[None, :], z, -1e30), 1)
    below = tl.where(column_inside[None, :], (z - top[:, None]) * inverse[:, None], -100.0)
    exp = tl.exp(below)
    at = column_tile.to(tl.int64) * C + rows
    plane = T.to(tl.int64) * C
    tl.store(tiles_ptr + TOP * plane + at, top * inverse, mask=row_inside)
    tl.store(tiles_ptr + EXP_SUM * plane + at, tl.sum(exp, 1), mask=row_inside)
    tl.store(tiles_ptr + WEIGHTED_SUM * plane + at, tl.sum(exp * below, 1), mask=row_inside)
    # The label's place in this tile, outside of it for most rows.
    place = tl.load(labels_ptr + rows, mask=row_inside, other=-1).to(tl.int32) - column_tile * BLOCK_V
    is_label = tl.arange(0, BLOCK_V)[None, :] == place[:, None]
    taken = tl.sum(tl.where(is_label, below, 0.0), 1) + top * inverse
    tl.store(taken_ptr + rows, taken, mask=row_inside & (place >= 0) & (place < BLOCK_V))
    if PEAKS:
        shift = top * inverse - tl.load(guess_ptr + rows, mask=row_inside, other=float("inf"))
        peak = tl.max(tl.where(is_label, float("-inf"), below + shift[:, None]), 0)
        tl.store(peaks_ptr + row_tile.to(tl.int64) * V + columns, peak, mask=column_inside)


@triton.jit(do_not_specialize=SIZES)
def sweep(
    hidden, head, labels_ptr, guess_ptr, inv_temperature_ptr, tiles_ptr, taken_ptr, peaks_ptr, C, V, H, T,
    PEAKS: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """tiles [3, T, C]: max, sum e^(z - max), sum e^(z - max) (z - max) of each row in each half of a column tile; taken
    [C]: the label's logit; peaks [row blocks, V]: the largest z - guess, labels left out. GROUP row tiles share a
    column tile of the head while it is in the cache; two halves take fewer registers than a whole."""
    row_tiles, column_tiles = tl.cdiv(C, BLOCK_R), tl.cdiv(V, BLOCK_V)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, PROGRAMS, flatten=True):
        first = tile // (GROUP * column_tiles) * GROUP
        size = min(row_tiles - first, GROUP)
        row_tile, column_tile = first + tile % size, (tile % (GROUP * column_tiles)) // size
        z = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
        for k in range(tl.cdiv(H, BLOCK_K)):
            z = tl.dot(hidden.load([row_tile * BLOCK_R, k * BLOCK_K]),
                       head.load([column_tile * BLOCK_V, k * BLOCK_K]).T, z)  # fmt: skip
        left, right = z.reshape(BLOCK_R, 2, BLOCK_V // 2).permute(0, 2, 1).split()
        _keep(left, row_tile, column_tile * 2, labels_ptr, guess_ptr, inv_temperature_ptr, tiles_ptr, taken_ptr,
              peaks_ptr, C, V, T, PEAKS, HAS_TEMPERATURE, BLOCK_R, BLOCK_V // 2)  # fmt: skip
        _keep(right, row_tile, column_tile * 2 + 1, labels_ptr, guess_ptr, inv_temperature_ptr, tiles_ptr, taken_ptr,
              peaks_ptr, C, V, T, PEAKS, HAS_TEMPERATURE, BLOCK_R, BLOCK_V // 2)  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def sweep_reach(
    table_ptr, guess_ptr, taken_ptr, labels_ptr, threshold_ptr, reach_ptr, forced_ptr, C, BLOCK: tl.constexpr
):  # fmt: skip
    """reach [row blocks]: the log of the largest STRENGTH e^(guess - log sum), by which a column's peak becomes a bound
    of STRENGTH p; forced [V]: 1 at labels whose own gradient is not below the threshold."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < C
    top = tl.load(table_ptr + MAX * C + rows, mask=inside, other=0.0)
    log_sum = tl.load(table_ptr + LOG_SUM * C + rows, mask=inside, other=0.0)
    strength = tl.load(table_ptr + STRENGTH * C + rows, mask=inside, other=0.0)
    reach = tl.log(strength) + (tl.load(guess_ptr + rows, mask=inside, other=0.0) - top - log_sum)
    # NaN would be lost in a maximum: it reaches everything.
    reach = tl.where(reach == reach, reach, float("inf"))
    tl.store(reach_ptr + tl.program_id(0), tl.max(tl.where(inside, reach, float("-inf")), 0))
    p = tl.exp(tl.load(taken_ptr + rows, mask=inside, other=0.0) - top - log_sum)
    below = strength * tl.abs(1.0 - p) < tl.load(threshold_ptr)
    labels = tl.load(labels_ptr + rows, mask=inside, other=0)
    tl.store(forced_ptr + labels, rows * 0 + 1, mask=inside & (below == 0))


@triton.jit(do_not_specialize=SIZES)
def gathered_gradient(
    hidden_ptr, head_ptr, head_stride, inv_temperature_ptr, table_ptr, labels_ptr, live_ptr, count_ptr, out_ptr,
    out_stride, sums_ptr, C, H, HAS_TEMPERATURE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As triton_gradients.gradient_column_tiles for score rows, from logits that are formed here."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_inside = rows < C
    inv_temperature = load_inv_temperature(inv_temperature_ptr, rows, row_inside, HAS_TEMPERATURE)[:, None]
    labels = tl.load(labels_ptr + rows, mask=row_inside, other=-1).to(tl.int32)
    top = tl.load(table_ptr + MAX * C + rows, mask=row_inside, other=0.0)[:, None]
    log_sum = tl.load(table_ptr + LOG_SUM * C + rows, mask=row_inside, other=0.0)[:, None]
    slope = tl.load(table_ptr + SLOPE * C + rows, mask=row_inside, other=0.0)[:, None]
    count = tl.load(count_ptr)
    kept = tl.zeros([BLOCK_R], tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    for tile in tl.range(tl.program_id(1), tl.cdiv(count, BLOCK_V), tl.num_programs(1)):
        place = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        taken = place < count
        columns = tl.load(live_ptr + place, mask=taken, other=0)
        z = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
        for start in tl.range(0, H, BLOCK_K):
            width = start + tl.arange(0, BLOCK_K)
            inner = width < H
            hidden = tl.load(hidden_ptr + rows.to(tl.int64)[:, None] * H + width[None, :],
                             mask=row_inside[:, None] & inner[None, :], other=0.0)  # fmt: skip
            head = tl.load(head_ptr + columns.to(tl.int64)[:, None] * head_stride + width[None, :],
                           mask=taken[:, None] & inner[None, :], other=0.0)  # fmt: skip
            z = tl.dot(hidden, tl.trans(head), z, input_precision="ieee")
        inside = row_inside[:, None] & taken[None, :]
        p = tl.exp((z * inv_temperature - top) - log_sum)
        core = tl.where(inside, tl.where(columns[None, :] == labels[:, None], 1.0 - p, -p), 0.0)
        dz = core * slope
        store_live(out_ptr, out_stride, dz, rows, row_inside, place, count)
        kept += tl.sum(tl.abs(core), 1)
        total += tl.sum(dz, 1)
    store_live_sums(sums_ptr, kept, total, rows, row_inside, C)
