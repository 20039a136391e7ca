"""The SGPO loss head: policy rows and distillation rows against one head, in one call.

What: the objective of a micro-batch; the two groups share the head's product operand and one dW accumulator.
Equation: loss = linear_policy_loss(policy rows) + linear_divergence(distillation rows).
Source: arXiv 2606.24064 Eq. 7, with 1/P, 1/G1, 1/|o| and alpha(q) inside the per-row weights.
Gradient: the sum of the two (see policy_loss.py and divergence.py), formed in forward.
Memory: `sizes.extra_bytes("sgpo", ...)`, N the rows of both groups, no term in N·V. Saved: one dH per group, one dW,
  one db.
Precision: as in the two ops; dW is summed over both groups in float32 and rounded once.
Limits: as in the two ops; on an accelerator two host syncs (the counts of live rows).
"""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from sgpo_kernels import checks, sizes
from sgpo_kernels.backend_torch import ROW_LOSS, Bounds, Rule
from sgpo_kernels.custom_op import (
    DistillInputs,
    DivergenceStats,
    Options,
    PolicyInputs,
    PolicyStats,
    divergence_stats,
    fused_loss,
    policy_stats,
)
from sgpo_kernels.divergence import Kind, OverLimit


class SgpoStats(NamedTuple):
    """Statistics of both groups and the two parts of the loss (0-d), all without gradient."""

    policy: PolicyStats
    divergence: DivergenceStats
    policy_loss: Tensor
    distill_loss: Tensor


def sgpo_loss(
    policy_hidden: Tensor,
    policy_targets: Tensor,
    distill_hidden: Tensor,
    teacher_hidden: Tensor,
    head: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    advantages: Tensor,
    policy_weight: Tensor,
    distill_weight: Tensor,
    clip_low: float | None,
    clip_high: float | None,
    dual_clip: float | None = None,
    kind: Kind = "forward_kl",
    max_token_kl: float | None = None,
    over_limit: OverLimit = "mask",
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    logit_softcap: float | None = None,
    column_tolerance: float = 0.0,
    head_grad: Tensor | None = None,
    vocab_group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    impl: sizes.Impl = "auto",
    chunk_rows: int | None = None,
) -> tuple[Tensor, SgpoStats]:
    """Policy loss plus divergence, each with its per-row weights.

    Args:
        policy_hidden: [Np, H]; policy_targets: int64 [Np].
        old_logprobs (or None), advantages, policy_weight: float32 [Np].
        distill_hidden, teacher_hidden: [Nd, H]; distill_weight: float32 [Nd]. Either group may have 0 rows.
        head: [V, H], the dtype of the hidden states. bias: [V] or None.
        temperature: a float > 0, or float32 [Np + Nd], policy rows first.
        The other arguments are those of `linear_policy_loss` and `linear_divergence`.

    Returns: (loss, SgpoStats): loss 0-d float32 (float64 for float64 inputs), differentiable in policy_hidden,
    distill_hidden, head, bias.

    Raises: as `linear_policy_loss`.
    """
    checks.check_head(policy_hidden, head, bias, ("policy_hidden", "head", "bias"))
    checks.check_matrix("distill_hidden", distill_hidden, head.shape[1], head)
    policy = PolicyInputs(
        policy_hidden, policy_targets, old_logprobs, advantages, policy_weight, Bounds(clip_low, clip_high, dual_clip)
    )
    distill = DistillInputs(
        distill_hidden, teacher_hidden, None, None, distill_weight, Rule(kind, max_token_kl, over_limit)
    )
    options = Options(
        temperature, logit_softcap, column_tolerance, head_grad, vocab_group, vocab_start, impl, chunk_rows
    )
    result = fused_loss(head, bias, policy, distill, options)
    parts = result.policy_values[ROW_LOSS].sum(), result.distill_values[ROW_LOSS].sum()
    stats = policy_stats(result.policy_values, result.policy_live)
    return result.loss, SgpoStats(stats, divergence_stats(result.distill_values, result.distill_live), *parts)
