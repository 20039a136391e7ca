"""What Triton kernels share: how a tile of logits is read from the products, and dz of live columns written.

What: `load_tile` gives the logits of a tile [BLOCK_R, BLOCK_V] of float32 products and, for the soft-cap, d logit /
  d product; `store_live` and `store_live_sums` write what the kernels of live columns leave.
Equation: z = softcap(product + b) * inv_temperature, softcap(x) = cap tanh(x / cap).
Gradient: the second result, without the temperature, which SLOPE holds.
Precision: float32 throughout; -inf outside the vocabulary.
Limits: finite logits; row offsets are 64-bit.
"""

# Triton reads these functions, Python does not: the rules of its types do not hold.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """From the exponential; 1 and -1 for arguments of any size."""
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))


@triton.jit
def _logits(products, inside, bias_ptr, columns, column_inside, inv_temperature, softcap, HAS_BIAS: tl.constexpr,
            HAS_SOFTCAP: tl.constexpr):  # fmt: skip
    """(logits, d logit / d (product + bias) without the temperature); -inf outside the vocabulary."""
    z = products
    if HAS_BIAS:
        z += tl.load(bias_ptr + columns, mask=column_inside, other=0.0)[None, :]
    chain = 1.0 + 0.0 * z
    if HAS_SOFTCAP:
        bent = tanh(z / softcap)
        z = tl.where(inside, softcap * bent, float("-inf"))
        chain = 1.0 - bent * bent
    return z * inv_temperature[:, None], chain


@triton.jit
def load_tile(products_ptr, stride, rows, row_inside, columns, column_inside, bias_ptr, inv_temperature, softcap,
              HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):  # fmt: skip
    """(logits, d logit / d (product + bias) without the temperature) of a tile; logits -inf outside."""
    inside = row_inside[:, None] & column_inside[None, :]
    offsets = rows.to(tl.int64)[:, None] * stride + columns.to(tl.int64)[None, :]
    products = tl.load(products_ptr + offsets, mask=inside, other=float("-inf"))
    return _logits(products, inside, bias_ptr, columns, column_inside, inv_temperature, softcap, HAS_BIAS, HAS_SOFTCAP)


@triton.jit
def load_inv_temperature(inv_temperature_ptr, rows, row_inside, HAS_TEMPERATURE: tl.constexpr):
    """1 / temperature of each row, 1 without."""
    if HAS_TEMPERATURE:
        inverse = tl.load(inv_temperature_ptr + rows, mask=row_inside, other=1.0)
    else:
        inverse = tl.where(row_inside, 1.0, 1.0)
    return inverse


@triton.jit
def store_live(out_ptr, out_stride, dz, rows, row_inside, place, count):
    """dz of a tile of live columns (0 outside of them) into out, up to the next multiple of 16 columns."""
    offsets = rows.to(tl.int64)[:, None] * out_stride + place[None, :]
    stored = row_inside[:, None] & (place < tl.cdiv(count, 16) * 16)[None, :]
    tl.store(out_ptr + offsets, dz.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit
def store_live_sums(sums_ptr, kept, total, rows, row_inside, C):
    """What this program's live columns hold of TOTAL, and their sum of dz, into sums [2, C, programs]."""
    at = rows.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums_ptr + at, kept, mask=row_inside)
    tl.store(sums_ptr + C.to(tl.int64) * tl.num_programs(1) + at, total, mask=row_inside)
