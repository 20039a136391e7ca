"""Triton kernels that multiply: dz of the live columns by the head and by the hidden states, and the policy rows' sweep
over the head that leaves statistics and no logits.

What: `live_hidden` and `live_head` form dH and dW from live columns whose number only the device knows. `sweep` keeps
  of each tile of logits the row statistics and per block of rows the largest logit of each column, and
  `gathered_gradient` forms the logits of the live columns again, and dz from them.
Equation: dH = dz_A W_A, dW_A += dz_Aᵀ h; sweep: z = h Wᵀ / temperature, p <= e^(z - guess) e^(guess - log sum).
Source: the chain rule; online softmax statistics (arXiv 1805.02867) per tile.
Gradient: gathered_gradient: dz = SLOPE (onehot - p), as triton_gradients.py.
Memory: sweep: [3, T, C] tile statistics and [C / BLOCK_R, V] peaks; no logits.
Precision: half operands are multiplied on tensor cores with float32 sums, float32 ones exactly (no TF32). Sums have a
  fixed order: no atomics.
Limits: sweep reads hidden and head by TMA descriptors: rows of a multiple of 16 bytes; no bias, soft-cap or shards.
"""

# Triton reads these functions, Python does not: the rules of its types do not hold.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from sgpo_kernels.triton_constants import (
    SIZES,
)


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
    offsets = rows.to(tl.int64)[:, None] * dz_stride
    sums = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    for start in tl.range(0, count, BLOCK_K):
        place = start + tl.arange(0, BLOCK_K)
        taken = place < count
        dz = tl.load(dz_ptr + offsets + place[None, :], mask=row_inside[:, None] & taken[None, :], other=0.0)
        live = tl.load(live_ptr + place, mask=taken, other=0).to(tl.int64)
        head = tl.load(head_ptr + live[:, None] * head_stride + width[None, :] * head_step,
                       mask=taken[:, None] & width_inside[None, :], other=0.0)  # fmt: skip
        sums = tl.dot(dz, head, sums, input_precision="ieee")
    at = rows.to(tl.int64)[:, None] * H + width[None, :]
    tl.store(out_ptr + at, sums, mask=row_inside[:, None] & width_inside[None, :])


@triton.jit(do_not_specialize=SIZES)
def live_head(
    dz_ptr, dz_stride, live_ptr, count_ptr, hidden_ptr, sums_ptr, C, H,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sums [V, H] at the live rows += dzᵀ h, dz [C, count], h [C, H]. Programs of the first grid axis take turns with
    the tiles of live rows; no row of sums is in two of them."""
    width = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    width_inside = width < H
    count = tl.load(count_ptr)
    for tile in tl.range(tl.program_id(0), tl.cdiv(count, BLOCK_R), tl.num_programs(0)):
        place = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        taken = place < count
        product = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
        for start in tl.range(0, C, BLOCK_K):
            rows = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
            inside = (rows < C)[:, None]
            dz = tl.load(dz_ptr + rows[:, None] * dz_stride + place[None, :], mask=inside & taken[None, :], other=0.0)
            hidden = tl.load(hidden_ptr + rows[:, None] * H + width[None, :], mask=inside & width_inside[None, :],
                             other=0.0)  # fmt: skip
            product = tl.dot(tl.trans(dz), hidden, product, input_precision="ieee")
        live = tl.load(live_ptr + place, mask=taken, other=0).to(tl.int64)
        at = sums_ptr + live[:, None] * H + width[None, :]
        mask = taken[:, None] & width_inside[None, :]
        tl.store(at, tl.load(at, mask=mask, other=0.0) + product, mask=mask)
