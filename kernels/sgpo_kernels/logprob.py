"""Log-probability of the taken token and entropy of its distribution, per row.

What: policy rows for metrics and old log-probs, target selection (no gradient), likelihood losses.
Equation: logp_n = z_n[y_n] - log sum_j exp z_nj; entropy_n = -sum_j p_nj log p_nj; z = (h Wᵀ + b) / temperature.
Source: log pi_theta of arXiv 2606.24064 Eq. 1 and Eq. 4.
Gradient: d logp / dz = onehot - p; d entropy / dz_j = -p_j (log p_j + entropy). Backward recomputes the logits chunk
  by chunk, for the rows whose upstream gradient is not 0.
Memory: 4·C·V·a in forward; the same + V·H·(a + 2s) + 2·N·H·s in backward (`launch.extra_bytes("logprob", ...)`).
  Saved: the inputs.
Precision: float32 logits and statistics (float64 for float64 inputs); dz is cast to the dtype of hidden for the
  products.
Limits: finite logits; first derivatives only; on an accelerator one host sync in backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sgpo_kernels import contracts, launch
from sgpo_kernels.linear_rows import Chunk, Needs, live_index, run, times
from sgpo_kernels.rowmath import entropy, log_softmax_, one_hot_minus_


def linear_logprob(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    impl: launch.Impl = "auto",
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's target and the entropy of its distribution, in nats.

    Args:
        hidden: [N, H] float16, bfloat16, float32 or float64. head: [V, H], same dtype. bias: [V] or None.
        targets: int64 [N], in [0, V).
        temperature: a float > 0, or float32 [N]; logits are divided by it.
        impl: "auto", "triton" or "torch". chunk_rows: rows per chunk, None for the default of `launch`.

    Returns: (logprobs [N], entropy [N]), float32 (float64 for float64 inputs), both differentiable in hidden, head
    and bias.

    Raises: TypeError (dtype), ValueError (shape, device, value), NotImplementedError (impl="triton").
    """
    contracts.check_head(hidden, head, bias)
    contracts.check_targets(targets, hidden)
    contracts.check_live_targets(targets, head.shape[0])
    contracts.check_temperature(temperature, hidden.shape[0], hidden)
    contracts.check_chunk_rows(chunk_rows)
    launch.resolve_impl(impl)
    return _LogprobFunction.apply(hidden, head, bias, targets, temperature, chunk_rows)  # type: ignore[return-value]


class _ScoreRows:
    """Forward: every row, values only."""

    def __init__(self, hidden: Tensor, targets: Tensor, temperature: float | Tensor):
        self.hidden, self.targets, self.temperature = hidden, targets, temperature
        self.index = torch.arange(hidden.shape[0], device=hidden.device)
        self.logprobs = hidden.new_zeros(hidden.shape[0], dtype=launch.accumulate_dtype(hidden.dtype))
        self.entropy = torch.zeros_like(self.logprobs)

    def weights(self) -> Tensor:
        return torch.ones_like(self.logprobs)

    def step(self, chunk: Chunk, logits_CV: Tensor) -> None:
        probs_CV = log_softmax_(logits_CV)
        self.logprobs[chunk.rows] = logits_CV.gather(1, self.targets[chunk.rows].unsqueeze(1)).squeeze(1)
        self.entropy[chunk.rows] = entropy(logits_CV, probs_CV)


class _ScoreGradRows:
    """Backward: the rows with an upstream gradient, logits recomputed."""

    def __init__(
        self, hidden: Tensor, targets: Tensor, temperature: float | Tensor, grad_logprobs: Tensor, grad_entropy: Tensor
    ):
        self.hidden, self.targets, self.temperature = hidden, targets, temperature
        self.grad_logprobs, self.grad_entropy = grad_logprobs, grad_entropy
        self.index = live_index((grad_logprobs != 0) | (grad_entropy != 0))

    def weights(self) -> Tensor:
        return torch.maximum(self.grad_logprobs.abs(), self.grad_entropy.abs())[self.index]

    def step(self, chunk: Chunk, logits_CV: Tensor) -> Tensor | None:
        if chunk.grad_factor is None:
            return None
        rows = chunk.rows
        probs_CV = log_softmax_(logits_CV)
        slope_entropy_C1 = (self.grad_entropy[rows] * chunk.grad_factor).unsqueeze(1)
        entropy_C1 = entropy(logits_CV, probs_CV).unsqueeze(1)
        from_entropy_CV = logits_CV.add_(entropy_C1).mul_(probs_CV).mul_(-slope_entropy_C1)
        slope_C = self.grad_logprobs[rows] * chunk.grad_factor
        return one_hot_minus_(probs_CV, self.targets[rows], slope_C).add_(from_entropy_CV)


class _LogprobFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float | Tensor,
        chunk_rows: int | None,
    ) -> tuple[Tensor, Tensor]:
        rows = _ScoreRows(hidden, targets, temperature)
        run([rows], head, bias, Needs(False, False, (False,)), chunk_rows)
        per_row = temperature if isinstance(temperature, Tensor) else None
        ctx.save_for_backward(hidden, head, bias, targets, per_row)
        ctx.temperature, ctx.chunk_rows = (None if per_row is not None else temperature), chunk_rows
        return rows.logprobs, rows.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, bias, targets, per_row = ctx.saved_tensors
        need_hidden, need_head, need_bias = ctx.needs_input_grad[:3]
        temperature = ctx.temperature if per_row is None else per_row
        rows = _ScoreGradRows(hidden, targets, temperature, grad_logprobs, grad_entropy)
        grads = run([rows], head, bias, Needs(need_head, need_bias, (need_hidden,)), ctx.chunk_rows)
        dhidden, dhead, dbias = (times(grad, grads.scale) for grad in (grads.hidden[0], grads.head, grads.bias))
        return dhidden, dhead, dbias, None, None, None
