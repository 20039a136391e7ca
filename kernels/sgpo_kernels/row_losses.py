"""Losses per row, for trainers that reduce them on their own: values in forward, gradients by recomputation.

What: `sgpo_kernels::row_losses` gives the losses of one group of rows; its backward takes any upstream gradient g [N]
  and runs the fused operator once more with g as the row weights. Rows where g is 0 are dropped before any product.
Equation: l_n of policy_loss.py, limit(d_n) of divergence.py.
Source: as there.
Gradient: sum_n g_n dl_n; to hidden states, head and bias of the student; first derivatives only. Clips, masks and
  limits are evaluated again there, on the same inputs.
Memory: C·V·a per context in forward; `sizes.extra_bytes` in both, no term in N·V. Saved: the inputs. One matrix
  product per row and context more than the op with weights, which forms its gradients in forward.
Precision: as the ops with weights.
Limits: on an accelerator one host sync in forward and one in backward, with a column tolerance two more in backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgpo_kernels import checks, custom_op, sizes
from sgpo_kernels.backend import DROPPED, ROW_LOSS, SHARE, VALUE_ROWS
from sgpo_kernels.custom_op import FusedResult, OperatorInputs, SavedGrads, WantedGrads
from sgpo_kernels.inputs import DistillInputs, LossOptions, PolicyInputs


def row_losses(
    head: Tensor, bias: Tensor | None, policy: PolicyInputs | None, distill: DistillInputs | None, options: LossOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses [N] with gradient, row values [VALUE_ROWS, N], live [N]) of the one group that is given."""
    checks.check_losses(head, bias, policy, distill, options)
    return _row_losses(*custom_op.pack(head, bias, policy, distill, options), options.head_grad)


def _hidden(inputs: OperatorInputs) -> Tensor:
    """The hidden states of the group that is there."""
    hidden = inputs.distill_hidden if inputs.policy_hidden is None else inputs.policy_hidden
    assert hidden is not None
    return hidden


def _weighted(inputs: OperatorInputs, weight_N: Tensor) -> OperatorInputs:
    """The inputs with weights for the group that is there."""
    if inputs.policy_hidden is None:
        return inputs._replace(distill_weight=weight_N)
    return inputs._replace(policy_weight=weight_N)


@torch.library.custom_op(
    "sgpo_kernels::row_losses",
    mutates_args=(),
    schema=f"({custom_op.schema_of(OperatorInputs)}, Tensor? head_grad) -> (Tensor, Tensor, Tensor)",
)
def _row_losses(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *flat, _ = arguments
    inputs = OperatorInputs(*flat)
    hidden = _hidden(inputs)
    ones_N = hidden.new_ones(hidden.shape[0], dtype=sizes.accumulate_dtype(hidden.dtype))
    no_grads = WantedGrads(head=False, bias=False, policy_hidden=False, distill_hidden=False)
    result = FusedResult(*custom_op.run_losses(*_weighted(inputs, ones_N), *no_grads, None))
    if inputs.policy_hidden is None:
        values, live = result.distill_values, result.distill_live
    else:
        values, live = result.policy_values, result.policy_live
    if custom_op.unpack_numbers(inputs.numbers).column_tolerance > 0:
        # What a tolerance leaves out is only known in backward.
        values[[DROPPED, SHARE]] = torch.where(live, torch.nan, 0.0).to(values.dtype)
    return values[ROW_LOSS].clone(), values, live


@_row_losses.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *flat, _ = arguments
    hidden = _hidden(OperatorInputs(*flat))
    rows, acc = hidden.shape[0], sizes.accumulate_dtype(hidden.dtype)
    values = hidden.new_empty((VALUE_ROWS, rows), dtype=acc)
    return hidden.new_empty(rows, dtype=acc), values, hidden.new_empty(rows, dtype=torch.bool)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    *shared, ctx.head_grad = inputs
    ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in shared))
    ctx.plain = [None if isinstance(value, Tensor) else value for value in shared]


def _backward(ctx: Any, grad_losses: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    arguments = len(ctx.plain) + 1
    if grad_losses is None:
        return (None,) * arguments
    pairs = zip(ctx.plain, ctx.saved_tensors, strict=True)
    inputs = OperatorInputs(*(plain if saved is None else saved for plain, saved in pairs))
    wanted = WantedGrads(*ctx.needs_input_grad[: len(WantedGrads._fields)])
    with torch.no_grad():
        weighted = _weighted(inputs, grad_losses.detach().contiguous())
        result = FusedResult(*custom_op.fused_loss_op(*weighted, *wanted, None))
    dtypes = custom_op.dtypes_of(inputs)
    grads = (result.dhead, result.dhead_rows, result.dbias, result.dpolicy, result.ddistill)
    saved = SavedGrads(result.scale, *grads, dtypes, inputs.impl)
    return custom_op.input_grads(saved, torch.ones_like(result.scale), wanted, ctx.head_grad, arguments)


_row_losses.register_autograd(_backward, setup_context=_save)
