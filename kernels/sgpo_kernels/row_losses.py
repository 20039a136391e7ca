"""Losses per row, for trainers that reduce them on their own: values in forward, gradients by recomputation.

What: `sgpo_kernels::row_losses` gives the losses of one group of rows; its backward takes any upstream gradient g [N]
  and runs the fused operator once more with g as the row weights. Rows where g is 0 are dropped before any product.
Equation, source: l_n of policy_loss.py, limit(d_n) of divergence.py.
Gradient: sum_n g_n dl_n; to hidden states, head and bias of the student; first derivatives only. Clips, masks and
  limits are evaluated again there, on the same inputs.
Memory: C·V·a per context in forward; `sizes.extra_bytes` in both, no term in N·V. Saved: the inputs. One matrix
  product per row and context more than the op with weights, which forms its gradients in forward.
Precision: as the ops with weights.
Limits: on an accelerator one host sync in forward and one in backward, with a column tolerance one per chunk of
  backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sgpo_kernels import custom_op, sizes
from sgpo_kernels.backend_torch import DROPPED, ROW_LOSS, SHARE, VALUE_ROWS
from sgpo_kernels.custom_op import DistillInputs, FusedResult, Options, PolicyInputs

# Positions in custom_op.INPUTS.
_POLICY_HIDDEN, _DISTILL_HIDDEN, _POLICY_WEIGHT, _DISTILL_WEIGHT, _NUMBERS = 2, 3, 7, 11, 14
_FORWARD_ONLY = [False, False, False, False, None]


def row_losses(
    head: Tensor, bias: Tensor | None, policy: PolicyInputs | None, distill: DistillInputs | None, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses [N] with gradient, row values [VALUE_ROWS, N], live [N]) of the one group that is given."""
    inputs = custom_op.checked_inputs(head, bias, policy, distill, options)
    return _row_losses(*inputs, options.head_grad)


def _hidden(inputs: Sequence[Any]) -> Tensor:
    policy = inputs[_POLICY_HIDDEN]
    return inputs[_DISTILL_HIDDEN] if policy is None else policy


def _weighted(inputs: Sequence[Any], weight_N: Tensor) -> list[Any]:
    """The inputs with the weights of their group."""
    filled = list(inputs)
    filled[_DISTILL_WEIGHT if filled[_POLICY_HIDDEN] is None else _POLICY_WEIGHT] = weight_N
    return filled


@torch.library.custom_op(
    "sgpo_kernels::row_losses",
    mutates_args=(),
    schema=f"({custom_op.INPUTS}, Tensor? head_grad) -> (Tensor, Tensor, Tensor)",
)
def _row_losses(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs = arguments[:-1]
    hidden = _hidden(inputs)
    ones_N = hidden.new_ones(hidden.shape[0], dtype=sizes.accumulate_dtype(hidden.dtype))
    result = FusedResult(*custom_op.run_losses(*(_weighted(inputs, ones_N) + _FORWARD_ONLY)))
    if inputs[_POLICY_HIDDEN] is None:
        values, live = result.distill_values, result.distill_live
    else:
        values, live = result.policy_values, result.policy_live
    if inputs[_NUMBERS][-1] > 0:
        # What a tolerance leaves out is only known in backward.
        values[[DROPPED, SHARE]] = torch.where(live, torch.nan, 0.0).to(values.dtype)
    return values[ROW_LOSS].clone(), values, live


@_row_losses.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden = _hidden(arguments)
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
    grads: list[Tensor | None] = [None] * (len(ctx.plain) + 1)
    if grad_losses is None:
        return tuple(grads)
    inputs = [plain if saved is None else saved for plain, saved in zip(ctx.plain, ctx.saved_tensors, strict=True)]
    need = list(ctx.needs_input_grad[:4])
    with torch.no_grad():
        weighted = _weighted(inputs, grad_losses.detach().contiguous())
        result = FusedResult(*custom_op._fused_loss(*weighted, *need, None))
    if ctx.head_grad is not None:
        ctx.head_grad.addcmul_(result.dhead, result.scale.reshape(1, 1))
        need[0] = False
    one = torch.ones_like(result.scale)
    if torch.is_grad_enabled():
        one.requires_grad_()  # create_graph: as in custom_op._backward, a second derivative raises
    found = (result.dhead, result.dbias, result.dpolicy, result.ddistill)
    for position, grad in enumerate(found):
        grads[position] = custom_op._scaled(grad, one, result.scale, inputs[position].dtype) if need[position] else None
    return tuple(grads)


_row_losses.register_autograd(_backward, setup_context=_save)
