"""Names for use inside Triton kernels: the planes of backend.py and the codes of kinds, as compile-time constants.

What: `SLOPE` in a kernel and `backend.SLOPE` in torch are the same plane, because the one is made of the other.
  Kernels import the names themselves: Triton's cache keys hold the values of globals, but not of a module's attributes.
Limits: nothing that is annealed during training is here; those numbers are run-time arguments.
"""

from __future__ import annotations

import triton.language as tl

from sgpo_kernels import backend

# Arguments that vary from chunk to chunk: no variant of their own for 1 or for multiples of 16.
SIZES = ("C", "N", "T", "rank", "row_step", "tile_step", "number")
# Codes that the host passes: the kind of the rows, what `label_row_values` is asked for, what happens over the limit.
KINDS = {"score": 0, "forward_kl": 1, "reverse_kl": 2, "js": 3}
MODES = {"values": 0, "upstream": 1, "policy": 2}
LIMITS = {"mask": 0, "clamp": 1, "scale": 2}

SCORE = tl.constexpr(KINDS["score"])
FORWARD_KL = tl.constexpr(KINDS["forward_kl"])
REVERSE_KL = tl.constexpr(KINDS["reverse_kl"])
JS = tl.constexpr(KINDS["js"])
UPSTREAM = tl.constexpr(MODES["upstream"])
POLICY = tl.constexpr(MODES["policy"])
MASK = tl.constexpr(LIMITS["mask"])
SCALE = tl.constexpr(LIMITS["scale"])

# Statistics of a context, and of a tile, which has the first three.
TOP = tl.constexpr(backend.TOP)
EXP_SUM = tl.constexpr(backend.EXP_SUM)
WEIGHTED_SUM = tl.constexpr(backend.WEIGHTED_SUM)
LABEL_LOGIT = tl.constexpr(backend.LABEL_LOGIT)
STAT_ROWS = tl.constexpr(backend.STAT_ROWS)
PAIR_ROWS = tl.constexpr(2 * backend.STAT_ROWS)

# The table.
MAX = tl.constexpr(backend.MAX)
LOG_SUM = tl.constexpr(backend.LOG_SUM)
SLOPE = tl.constexpr(backend.SLOPE)
STRENGTH = tl.constexpr(backend.STRENGTH)
ENTROPY_SLOPE = tl.constexpr(backend.ENTROPY_SLOPE)
CENTRE = tl.constexpr(backend.CENTRE)
ENTROPY = tl.constexpr(backend.ENTROPY)
TEACHER_MAX = tl.constexpr(backend.TEACHER_MAX)
TEACHER_LOG_SUM = tl.constexpr(backend.TEACHER_LOG_SUM)
TOTAL = tl.constexpr(backend.TOTAL)

# The values.
LOGPROB = tl.constexpr(backend.LOGPROB)
ROW_ENTROPY = tl.constexpr(backend.ROW_ENTROPY)
RATIO = tl.constexpr(backend.RATIO)
CLIPPED = tl.constexpr(backend.CLIPPED)
ROW_LOSS = tl.constexpr(backend.ROW_LOSS)
DIVERGENCE = tl.constexpr(backend.DIVERGENCE)
TEACHER_ENTROPY = tl.constexpr(backend.TEACHER_ENTROPY)
OVER = tl.constexpr(backend.OVER)
DROPPED = tl.constexpr(backend.DROPPED)
SHARE = tl.constexpr(backend.SHARE)

# The sums of a divergence.
DIVERGENCE_SUM = tl.constexpr(backend.DIVERGENCE_SUM)
CENTRE_SUM = tl.constexpr(backend.CENTRE_SUM)
SIZE_SUM = tl.constexpr(backend.SIZE_SUM)
