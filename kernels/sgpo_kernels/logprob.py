"""Log-probability of the taken token and entropy of its distribution, per row.

What: policy rows for metrics and old log-probs, target selection (no gradient), likelihood losses.
Equation: logp_n = z_n[y_n] - log sum_j exp z_nj; entropy_n = -sum_j p_nj log p_nj; z = (h Wᵀ + b) / temperature.
Source: log pi_theta of arXiv 2606.24064 Eq. 1 and Eq. 4.
Gradient: d logp / dz = onehot - p; d entropy / dz_j = -p_j (log p_j + entropy). Backward recomputes the logits chunk
  by chunk, for the rows whose upstream gradient is not 0.
Memory: C·V·a in forward; `sizes.extra_bytes("logprob", ...)` in both, no term in N·V. Saved: the inputs.
Precision: float32 logits and statistics (float64 for float64 inputs); dz is cast to the dtype of hidden for the
  products.
Limits: finite logits, but for columns that a bias of -inf closes; first derivatives only; on an accelerator one host
  sync in backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sgpo_kernels import checks, chunk_loop, sizes
from sgpo_kernels.backend import LOGPROB, ROW_ENTROPY
from sgpo_kernels.chunk_loop import NeedsGrad, SharedInputs
from sgpo_kernels.head import Shard
from sgpo_kernels.row_groups import ScoreRows


def linear_logprob(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    logit_softcap: float | None = None,
    vocab_group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    impl: sizes.Impl = "auto",
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's target and the entropy of its distribution, in nats.

    Args:
        hidden: [N, H] float16, bfloat16, float32 or float64. head: [V, H], same dtype. bias: [V] or None.
        targets: int64 [N], in [0, V).
        temperature: a float > 0, or float32 [N]; logits are divided by it.
        logit_softcap: cap > 0 of cap tanh(z / cap), applied before the temperature; None for none.
        vocab_group, vocab_start: the process group over which the head's rows are sharded, and the first token id of
            this rank's piece (see `linear_policy_loss`).
        impl: "auto" (Triton on CUDA), "triton", "triton-nologits" (backend_sweep.py) or "torch". chunk_rows: rows per
            chunk, None for that of `sizes`.

    Returns: (logprobs [N], entropy [N]), float32 (float64 for float64 inputs), both differentiable in hidden, head
    and bias.

    Raises: TypeError (dtype), ValueError (shape, device, value; on the CPU also ids outside [0, V)),
    NotImplementedError (impl="triton" where Triton cannot run, forward-mode derivatives), RuntimeError (second
    derivatives). On CUDA an id outside is a device-side assertion.
    """
    checks.check_head(hidden, head, bias)
    checks.check_labels(targets, hidden)
    checks.check_temperature(temperature, hidden.shape[0], hidden)
    checks.check_softcap(logit_softcap)
    checks.check_shard(vocab_group, vocab_start)
    checks.check_choice("impl", impl, sizes.IMPLS)
    checks.check_chunk_rows(chunk_rows)
    checks.check_no_tangents(hidden, head, bias)
    row_temperature = temperature if isinstance(temperature, Tensor) else None
    group = None if vocab_group is None else vocab_group.group_name
    return _linear_logprob(
        hidden,
        head,
        bias,
        targets,
        1.0 if isinstance(temperature, Tensor) else float(temperature),
        row_temperature,
        logit_softcap,
        group,
        vocab_start,
        impl,
        chunk_rows,
    )


@torch.library.custom_op("sgpo_kernels::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    logit_softcap: float | None,
    vocab_group: str | None,
    vocab_start: int,
    impl: str,
    chunk_rows: int | None,
) -> tuple[Tensor, Tensor]:
    checks.check_temperature_values(row_temperature)
    if vocab_group is None:
        checks.check_live_labels(labels, head.shape[0])
    rows = ScoreRows(hidden, labels, temperature if row_temperature is None else row_temperature)
    shared = SharedInputs(head, bias, logit_softcap, Shard(vocab_group, vocab_start), impl, chunk_rows)
    chunk_loop.run([rows], shared, NeedsGrad(head=False, bias=False, hidden=(False,)))
    return rows.values[LOGPROB].clone(), rows.values[ROW_ENTROPY].clone()


@_linear_logprob.register_fake
def _(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    acc = sizes.accumulate_dtype(hidden.dtype)
    return hidden.new_empty(hidden.shape[0], dtype=acc), hidden.new_empty(hidden.shape[0], dtype=acc)


@torch.library.custom_op("sgpo_kernels::linear_logprob_backward", mutates_args=())
def _linear_logprob_backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    logit_softcap: float | None,
    vocab_group: str | None,
    vocab_start: int,
    impl: str,
    chunk_rows: int | None,
    need_hidden: bool,
    need_head: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    each = temperature if row_temperature is None else row_temperature
    rows = ScoreRows(hidden, labels, each, (grad_logprobs, grad_entropy))
    shared = SharedInputs(head, bias, logit_softcap, Shard(vocab_group, vocab_start), impl, chunk_rows)
    grads = chunk_loop.run([rows], shared, NeedsGrad(need_head, need_bias, (need_hidden,)))
    found = zip((grads.hidden[0], grads.head, grads.bias), (hidden, head, bias), strict=True)
    return tuple(
        head.new_empty(0) if grad is None or like is None else chunk_loop.rescaled(grad, grads.scale, like.dtype, impl)
        for grad, like in found
    )  # type: ignore[return-value]


@_linear_logprob_backward.register_fake
def _(
    grad_logprobs: Tensor, grad_entropy: Tensor, hidden: Tensor, head: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_, need_hidden, need_head, need_bias = rest
    wanted = zip((hidden, head, bias), (need_hidden, need_head, need_bias), strict=True)
    return tuple(torch.empty_like(x) if need and x is not None else head.new_empty(0) for x, need in wanted)  # type: ignore[return-value]


_linear_logprob_backward.register_autograd(checks.refuse_second_derivative)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, head, bias, labels, temperature, row_temperature, *ctx.rest = inputs
    ctx.save_for_backward(hidden, head, bias, labels, row_temperature)
    ctx.temperature = temperature


def _backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
    hidden, head, bias, labels, row_temperature = ctx.saved_tensors
    need_hidden, need_head, need_bias, *_ = ctx.needs_input_grad
    dhidden, dhead, dbias = _linear_logprob_backward(
        grad_logprobs.contiguous(),
        grad_entropy.contiguous(),
        hidden,
        head,
        bias,
        labels,
        ctx.temperature,
        row_temperature,
        *ctx.rest,
        need_hidden,
        need_head,
        need_bias,
    )
    grads = (dhidden if need_hidden else None, dhead if need_head else None, dbias if need_bias else None)
    return (*grads, *[None] * (len(ctx.needs_input_grad) - len(grads)))


_linear_logprob.register_autograd(_backward, setup_context=_save)
