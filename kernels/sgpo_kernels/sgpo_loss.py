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

import torch.distributed as dist
from torch import Tensor

from sgpo_kernels import custom_op
from sgpo_kernels.backend import ROW_LOSS
from sgpo_kernels.custom_op import FusedResult, operator_arguments
from sgpo_kernels.inputs import ClipRange, DistillInputs, Kind, KlLimit, LossOptions, OverLimit, PolicyInputs
from sgpo_kernels.sizes import Impl
from sgpo_kernels.stats import SgpoStats, divergence_stats, policy_stats


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
    impl: Impl = "auto",
    chunk_rows: int | None = None,
) -> tuple[Tensor, SgpoStats]:
    """Policy loss plus divergence, each with its per-row weights.

    Args:
        policy_hidden: [Np, H] float16, bfloat16, float32 or float64. policy_targets: int64 [Np].
        old_logprobs (or None), advantages, policy_weight: float32 [Np].
        distill_hidden, teacher_hidden: [Nd, H]; distill_weight: float32 [Nd]. Either group may have 0 rows.
        head: [V, H], the dtype of the hidden states. bias: [V] or None.
        temperature: a float > 0, or float32 [Np + Nd], policy rows first.
        The other arguments are those of `linear_policy_loss` and `linear_divergence`.

    Returns: (loss, SgpoStats): loss 0-d float32 (float64 for float64 inputs), differentiable in policy_hidden,
    distill_hidden, head, bias.

    Raises: as `linear_policy_loss`.
    """
    clip_range, kl_limit = ClipRange(clip_low, clip_high, dual_clip), KlLimit(kind, max_token_kl, over_limit)
    policy = PolicyInputs(policy_hidden, policy_targets, old_logprobs, advantages, policy_weight, clip_range)
    distill = DistillInputs(distill_hidden, teacher_hidden, None, None, distill_weight, kl_limit)
    options = LossOptions(
        temperature, logit_softcap, column_tolerance, head_grad, vocab_group, vocab_start, impl, chunk_rows
    )
    result = FusedResult(*custom_op.fused_loss_op(*operator_arguments(head, bias, policy, distill, options)))
    stats = SgpoStats(
        policy=policy_stats(result.policy_values, result.policy_live),
        divergence=divergence_stats(result.distill_values, result.distill_live),
        policy_loss=result.policy_values[ROW_LOSS].sum(),
        distill_loss=result.distill_values[ROW_LOSS].sum(),
    )
    return result.loss, stats
