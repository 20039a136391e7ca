"""The clipped policy-gradient surrogate on taken tokens.

What: GRPO / PPO loss of the autonomous completions, with the log-probs, entropies and clip statistics of the same
  pass.
Equation: loss = sum_n w_n l_n, l_n = -min(r_n A_n, clip(r_n, 1 - clip_low, 1 + clip_high) A_n), r_n = exp(logp_n -
  old_n); with a dual clip and A_n < 0, l_n = min(l_n, dual_clip |A_n|). old = None means exactly on-policy: r_n = 1
  with gradient A_n d logp_n.
Source: arXiv 2606.24064 Eq. 1 (w_n = 1 / (P G1 |o_i|)); dual clip: arXiv 1912.09729.
Gradient: dl/dz = -A r (onehot - p) / temperature, 0 where a bound is active. Formed in forward.
Memory: `sizes.extra_bytes("policy", ...)`, no term in N·V. Saved: dH [N, H], dW [V, H] in the
  input dtype (dW of a float16 head in float32), db [V].
Precision: float32 logits, ratio and dz (float64 for float64 inputs); dz is cast to the dtype of hidden for the
  products.
Limits: finite logits, but for columns that a bias of -inf closes; first derivatives only; on an accelerator one host
  sync (the count of live rows), with a column
  tolerance two more (vocabulary shards: one per chunk). Advantages, weights and old log-probs are constants.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from sgpo_kernels import custom_op
from sgpo_kernels.custom_op import FusedResult, operator_arguments
from sgpo_kernels.inputs import ClipRange, LossOptions, PolicyInputs
from sgpo_kernels.row_losses import row_losses
from sgpo_kernels.sizes import Impl
from sgpo_kernels.stats import PolicyStats, policy_stats


def linear_policy_loss(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    advantages: Tensor,
    token_weight: Tensor | None = None,
    clip_low: float | None,
    clip_high: float | None,
    dual_clip: float | None = None,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    logit_softcap: float | None = None,
    column_tolerance: float = 0.0,
    head_grad: Tensor | None = None,
    vocab_group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    impl: Impl = "auto",
    chunk_rows: int | None = None,
) -> tuple[Tensor, PolicyStats]:
    """Weighted sum of the clipped surrogate over the rows, or with `token_weight=None` the surrogate of each row.

    Args:
        hidden: [N, H] float16, bfloat16, float32 or float64. head: [V, H], same dtype. bias: [V] or None.
        targets: int64 [N], the sampled tokens; ids of rows that are not live are never looked at.
        old_logprobs: float32 [N] at the same temperature, or None when the rows are exactly on-policy.
        advantages, token_weight: float32 [N]. A row with either at 0 is not live: it is dropped before any product.
        clip_low, clip_high: the ratio stays in [1 - clip_low, 1 + clip_high]; None switches a side off.
        dual_clip: > 1, the largest ratio that counts where the advantage is negative; None for none.
        temperature: a float > 0, or float32 [N]; the logits are divided by it.
        logit_softcap: cap > 0 of cap tanh(z / cap), applied before the temperature; None for none.
        column_tolerance: 0 is exact; above 0, backward leaves out vocabulary columns whose gradient is that small.
        head_grad: [V, H] float32 (float64) buffer that takes the head's gradient, unrounded, instead of head.grad.
        vocab_group, vocab_start: the ranks that hold the head's rows in pieces; first token id of this rank's piece.
        impl: "auto" (Triton on CUDA), "triton", "triton-nologits" (backend_sweep.py) or "torch". chunk_rows: rows per
            chunk, None for that of `sizes`.
        More on the last lines at `inputs.LossOptions`.

    Returns: (loss, PolicyStats): loss 0-d float32 (float64 for float64 inputs), differentiable in hidden, head and
    bias. With token_weight=None: losses [N], 0 where the advantage is 0, whose backward takes any upstream gradient and
    recomputes the logits (see row_losses.py); a column tolerance then leaves `dropped` and `column_share` NaN.

    Raises: TypeError (dtype), ValueError (shape, device, value; on the CPU also ids outside [0, V) and float16 row
    gradients beyond 65504 times the largest weight), NotImplementedError (impl="triton" where Triton cannot run,
    head_grad inside torch.compile, forward-mode derivatives), RuntimeError (second derivatives). On CUDA an id outside
    is a device-side assertion.
    """
    clip_range = ClipRange(clip_low, clip_high, dual_clip)
    rows = PolicyInputs(hidden, targets, old_logprobs, advantages, token_weight, clip_range)
    options = LossOptions(
        temperature, logit_softcap, column_tolerance, head_grad, vocab_group, vocab_start, impl, chunk_rows
    )
    if token_weight is None:
        losses, values, live = row_losses(head, bias, rows, None, options)
        return losses, policy_stats(values, live)
    result = FusedResult(*custom_op.fused_loss_op(*operator_arguments(head, bias, rows, None, options)))
    return result.loss, policy_stats(result.policy_values, result.policy_live)
