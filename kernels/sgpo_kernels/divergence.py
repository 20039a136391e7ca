"""Full-vocabulary divergence between two contexts of one model (or of two), per token, with the hard mask of SGPO.

What: distillation rows: the same completion token under the plain prompt (student) and the guided prompt (teacher).
Equation: loss = sum_n w_n limit(d_n); forward_kl d = KL(p_T || p_S), reverse_kl d = KL(p_S || p_T), js d = (KL(p_S ||
  m) + KL(p_T || m)) / 2, m = (p_S + p_T) / 2; both sides z = (h Wᵀ + b) / temperature, no factor temperature². Where d
  > max_token_kl = delta: mask -> value and gradient 0; clamp -> value delta, gradient 0; scale -> value and gradient
  times the constant delta / d.
Source: arXiv 2606.24064 Eq. 3 (forward KL), Eq. 5 (mask; w_n = alpha / (P |o+|)); reverse KL is its ablation.
Gradient: by the student's logits only: p_S - p_T (forward), p_S (u - d) (reverse), p_S (a - sum p_S a) (js), see
  backend_torch.py. Formed in forward; nothing flows to the teacher's states, head or bias.
Memory: `sizes.extra_bytes("divergence", ...)`, no term in N·V, + V·H·a for a separate half teacher head on the CPU.
  Saved: dH [N, H], dW [V, H] in the input dtype (dW of a float16 head in float32), db [V].
Precision: float32 logits and dz (float64 for float64 inputs); sums of terms >= 0, so equal states give exactly 0 and a
  zero gradient.
Limits: finite logits, but for columns that a bias of -inf closes; first derivatives only; on an accelerator one host
  sync (the count of live rows), with a column
  tolerance two more (vocabulary shards: one per chunk); masked rows of a dense chunk still pay their products.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from sgpo_kernels import custom_op
from sgpo_kernels.custom_op import FusedResult, operator_arguments
from sgpo_kernels.inputs import DistillInputs, Kind, KlLimit, LossOptions, OverLimit
from sgpo_kernels.row_losses import row_losses
from sgpo_kernels.sizes import Impl
from sgpo_kernels.stats import DivergenceStats, divergence_stats


def linear_divergence(
    hidden: Tensor,
    teacher_hidden: Tensor,
    head: Tensor,
    *,
    token_weight: Tensor | None = None,
    kind: Kind = "forward_kl",
    max_token_kl: float | None = None,
    over_limit: OverLimit = "mask",
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    teacher_head: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    logit_softcap: float | None = None,
    column_tolerance: float = 0.0,
    head_grad: Tensor | None = None,
    vocab_group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    impl: Impl = "auto",
    chunk_rows: int | None = None,
) -> tuple[Tensor, DivergenceStats]:
    """Weighted sum of the limited per-token divergence, or with `token_weight=None` the value of each row.

    Args:
        hidden: [N, H] float16, bfloat16, float32 or float64. head: [V, H], same dtype. bias: [V] or None.
        teacher_hidden: [N, H] of the same positions; [N, H_T] with a `teacher_head` [V, H_T]. No gradient.
        token_weight: float32 [N]; a row at 0 is dropped before any product.
        kind: "forward_kl" KL(teacher || student), "reverse_kl" KL(student || teacher), or "js".
        max_token_kl: delta > 0, or None for no limit. over_limit: what happens to a row beyond it.
        temperature: a float > 0, or float32 [N], for both sides; the logits are divided by it.
        teacher_head, teacher_bias: None means the student's, detached; a teacher_head goes with teacher_bias alone.
        logit_softcap: cap > 0 of cap tanh(z / cap), applied before the temperature; None for none.
        column_tolerance: 0 is exact; above 0, backward leaves out vocabulary columns whose gradient is that small.
        head_grad: [V, H] float32 (float64) buffer that takes the head's gradient, unrounded, instead of head.grad.
        vocab_group, vocab_start: the ranks that hold the head's rows in pieces; first token id of this rank's piece.
        impl: "auto" (Triton on CUDA), "triton", "triton-nologits" (backend_sweep.py) or "torch". chunk_rows: rows per
            chunk, None for that of `sizes`.
        More on the last lines at `inputs.LossOptions`.

    Returns: (loss, DivergenceStats): loss 0-d float32 (float64 for float64 inputs), differentiable in hidden, head and
    bias. With token_weight=None: losses [N] after the limit, whose backward takes any upstream gradient and recomputes
    the logits (see row_losses.py); a column tolerance then leaves `dropped` and `column_share` NaN.

    Raises: TypeError (dtype), ValueError (shape, device, value), NotImplementedError (impl="triton" where Triton cannot
    run, head_grad inside torch.compile, forward-mode derivatives), RuntimeError (second derivatives).
    """
    kl_limit = KlLimit(kind, max_token_kl, over_limit)
    rows = DistillInputs(hidden, teacher_hidden, teacher_head, teacher_bias, token_weight, kl_limit)
    options = LossOptions(
        temperature, logit_softcap, column_tolerance, head_grad, vocab_group, vocab_start, impl, chunk_rows
    )
    if token_weight is None:
        losses, values, live = row_losses(head, bias, None, rows, options)
        return losses, divergence_stats(values, live)
    result = FusedResult(*custom_op.fused_loss_op(*operator_arguments(head, bias, None, rows, options)))
    return result.loss, divergence_stats(result.distill_values, result.distill_live)
