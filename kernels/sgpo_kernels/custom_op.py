"""The losses as one custom operator: policy rows and distillation rows against one head, gradients formed in forward.

What: `sgpo_kernels::fused_loss` takes both groups of rows (either may be absent) and returns the loss, the row values
  and the gradients for an upstream gradient of 1; its autograd formula multiplies them by the real one. An operator
  with a fake implementation, so that `torch.compile(fullgraph=True)` keeps the graph whole around it, and so that
  clips, limits and weights stay run-time values.
Equation: loss = sum of the policy rows' losses + sum of the distillation rows', each times its weight.
Source: see policy_loss.py, divergence.py, sgpo_loss.py.
Gradient: to hidden states, head and bias of the student; first derivatives only.
Memory: `sizes.extra_bytes`. Saved: one dH [N, H] per group in its dtype, dW [V, H] and db [V] in the accumulation
  dtype.
Precision: as the chunk loop; a gradient is rounded once, when backward multiplies it.
Limits: an operator takes flat arguments only. `pack` and `unpack` are the one place where records become such
  arguments and come back; everything else names fields.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from sgpo_kernels import checks, chunk_loop, sizes
from sgpo_kernels.backend import ROW_LOSS, VALUE_ROWS
from sgpo_kernels.chunk_loop import NeedsGrad, SharedInputs
from sgpo_kernels.head import Shard
from sgpo_kernels.inputs import ClipRange, DistillInputs, KlLimit, LossOptions, PolicyInputs
from sgpo_kernels.row_groups import DivergenceRows, PolicyRows

# The border: records on the one side, flat arguments on the other.


class Numbers(NamedTuple):
    """The numbers of a call that may change from step to step; None means off (temperature: it is given per row)."""

    clip_low: float | None
    clip_high: float | None
    dual_clip: float | None
    max_token_kl: float | None
    temperature: float | None
    column_tolerance: float


class OperatorInputs(NamedTuple):
    """The flat arguments that the operators share, in the order of their schema; those with a gradient come first."""

    head: Tensor
    bias: Tensor | None
    policy_hidden: Tensor | None
    distill_hidden: Tensor | None
    labels: Tensor | None
    old_logprobs: Tensor | None
    advantages: Tensor | None
    policy_weight: Tensor | None
    teacher_hidden: Tensor | None
    teacher_head: Tensor | None
    teacher_bias: Tensor | None
    distill_weight: Tensor | None
    kind: str
    over_limit: str
    numbers: Tensor  # `Numbers` as float64 on the CPU
    row_temperature: Tensor | None  # policy rows first
    logit_softcap: float | None
    impl: str
    chunk_rows: int | None
    vocab_group: str | None
    vocab_start: int


class WantedGrads(NamedTuple):
    """Which of the inputs want a gradient: the first fields of OperatorInputs, by the same names."""

    head: bool
    bias: bool
    policy_hidden: bool
    distill_hidden: bool


class FusedResult(NamedTuple):
    """The outputs of the operator; gradients that are not wanted, and groups that are absent, are empty tensors. The
    gradients, divided by `scale`, are those of the fields of WantedGrads."""

    loss: Tensor  # 0-d
    policy_values: Tensor  # [VALUE_ROWS, Np]
    policy_live: Tensor  # bool [Np]
    distill_values: Tensor  # [VALUE_ROWS, Nd]
    distill_live: Tensor  # bool [Nd]
    scale: Tensor  # 0-d
    dhead: Tensor  # [V, H]
    dhead_rows: Tensor  # int32 [V], 0 for rows of dhead that hold no gradient
    dbias: Tensor  # [V]
    dpolicy: Tensor  # [Np, H]
    ddistill: Tensor  # [Nd, H]


class LossInputs(NamedTuple):
    """What `unpack` brings back: the rows of both groups, each with its temperature, and what they share."""

    shared: SharedInputs
    policy: PolicyInputs | None
    policy_temperature: float | Tensor
    distill: DistillInputs | None
    distill_temperature: float | Tensor


_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    str: "str",
    str | None: "str?",
    int: "int",
    int | None: "int?",
    float | None: "float?",
    bool: "bool",
}


def schema_of(record: Any) -> str:
    """The fields of a NamedTuple as arguments of an operator's schema."""
    return ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(record).items())


def pack(
    head: Tensor, bias: Tensor | None, policy: PolicyInputs | None, distill: DistillInputs | None, options: LossOptions
) -> OperatorInputs:
    """The records as flat arguments. Of an absent group every field is None, and its limits are those that are off."""
    clip_range = ClipRange(None, None, None) if policy is None else policy.clip_range
    kl_limit = KlLimit("forward_kl", None, "mask") if distill is None else distill.kl_limit
    per_row = options.temperature if isinstance(options.temperature, Tensor) else None
    numbers = Numbers(
        clip_low=clip_range.clip_low,
        clip_high=clip_range.clip_high,
        dual_clip=clip_range.dual_clip,
        max_token_kl=kl_limit.max_token_kl,
        temperature=None if isinstance(options.temperature, Tensor) else options.temperature,
        column_tolerance=options.column_tolerance,
    )
    return OperatorInputs(
        head=head,
        bias=bias,
        policy_hidden=None if policy is None else policy.hidden,
        distill_hidden=None if distill is None else distill.hidden,
        labels=None if policy is None else policy.labels,
        old_logprobs=None if policy is None else policy.old_logprobs,
        advantages=None if policy is None else policy.advantages,
        policy_weight=None if policy is None else policy.token_weight,
        teacher_hidden=None if distill is None else distill.teacher_hidden,
        teacher_head=None if distill is None else distill.teacher_head,
        teacher_bias=None if distill is None else distill.teacher_bias,
        distill_weight=None if distill is None else distill.token_weight,
        kind=kl_limit.kind,
        over_limit=kl_limit.over_limit,
        numbers=pack_numbers(numbers),
        row_temperature=per_row,
        logit_softcap=options.logit_softcap,
        impl=options.impl,
        chunk_rows=options.chunk_rows,
        vocab_group=None if options.vocab_group is None else options.vocab_group.group_name,
        vocab_start=options.vocab_start,
    )


def unpack(inputs: OperatorInputs) -> LossInputs:
    """The records that `pack` was given, inside the operator."""
    x, numbers = inputs, unpack_numbers(inputs.numbers)
    policy, distill = None, None
    if x.policy_hidden is not None:
        assert x.labels is not None
        assert x.advantages is not None
        clip_range = ClipRange(numbers.clip_low, numbers.clip_high, numbers.dual_clip)
        policy = PolicyInputs(x.policy_hidden, x.labels, x.old_logprobs, x.advantages, x.policy_weight, clip_range)
    if x.distill_hidden is not None:
        assert x.teacher_hidden is not None
        kl_limit = KlLimit(x.kind, numbers.max_token_kl, x.over_limit)
        distill = DistillInputs(
            x.distill_hidden, x.teacher_hidden, x.teacher_head, x.teacher_bias, x.distill_weight, kl_limit
        )
    shared = SharedInputs(
        head=x.head,
        bias=x.bias,
        softcap=x.logit_softcap,
        shard=Shard(x.vocab_group, x.vocab_start),
        impl=x.impl,
        chunk_rows=x.chunk_rows,
        column_tolerance=numbers.column_tolerance,
    )
    if x.row_temperature is not None:
        split = 0 if policy is None else policy.hidden.shape[0]
        return LossInputs(shared, policy, x.row_temperature[:split], distill, x.row_temperature[split:])
    assert numbers.temperature is not None
    return LossInputs(shared, policy, numbers.temperature, distill, numbers.temperature)


def pack_numbers(numbers: Numbers) -> Tensor:
    """float64, one per field, NaN for None. A float argument would be a constant of a compiled graph; as a tensor on
    the CPU it can be annealed. Times 1 and not `scalar_tensor`: torch.compile keeps a float as a run-time value
    through arithmetic only."""
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return torch.stack([one * (math.nan if x is None else x) for x in numbers])


def unpack_numbers(packed: Tensor) -> Numbers:
    """What `pack_numbers` was given."""
    return Numbers(*(None if math.isnan(x) else x for x in packed.tolist()))  # type: ignore[arg-type]


def split_arguments(arguments: Sequence[Any]) -> tuple[OperatorInputs, WantedGrads, Tensor | None]:
    """The three parts of the operator's arguments; the last is `head_grad`."""
    count = len(OperatorInputs._fields)
    *wanted, head_grad = arguments[count:]
    return OperatorInputs(*arguments[:count]), WantedGrads(*wanted), head_grad


# The operator.


def operator_arguments(
    head: Tensor, bias: Tensor | None, policy: PolicyInputs | None, distill: DistillInputs | None, options: LossOptions
) -> tuple[Any, ...]:
    """What `fused_loss_op` takes for the loss over both groups (either may be None), after all inputs are checked."""
    checks.check_losses(head, bias, policy, distill, options)
    inputs = pack(head, bias, policy, distill, options)
    differentiable = (inputs.head, inputs.bias, inputs.policy_hidden, inputs.distill_hidden)
    tracking = torch.is_grad_enabled()
    wanted = WantedGrads(*(tracking and tensor is not None and tensor.requires_grad for tensor in differentiable))
    return (*inputs, *wanted, options.head_grad)


def run_losses(*arguments: Any) -> tuple[Tensor, ...]:
    """What the operator does. Arguments: the fields of OperatorInputs, those of WantedGrads, head_grad; returns the
    fields of FusedResult."""
    inputs, wanted, head_grad = split_arguments(arguments)
    checks.check_temperature_values(inputs.row_temperature)
    shared, policy_inputs, policy_temperature, distill_inputs, distill_temperature = unpack(inputs)
    policy, distill = None, None
    if policy_inputs is not None:
        labels_name = "targets" if distill_inputs is None else "policy_targets"
        policy = PolicyRows(policy_inputs, policy_temperature, labels_name)
        if shared.shard.group_name is None:
            checks.check_live_labels(policy_inputs.labels[policy.index], shared.head.shape[0], labels_name)
    if distill_inputs is not None:
        distill = DivergenceRows(distill_inputs, distill_temperature)
    both = ((policy, wanted.policy_hidden), (distill, wanted.distill_hidden))
    groups = [group for group, _ in both if group is not None]
    hidden = tuple(need for group, need in both if group is not None)
    needs = NeedsGrad(wanted.head, wanted.bias, hidden, whole_head=head_grad is not None)
    grads = chunk_loop.run(groups, shared, needs)

    def present(tensor: Tensor | None) -> Tensor:
        return shared.head.new_empty(0) if tensor is None else tensor

    hidden_grads = iter(grads.hidden)
    return tuple(
        FusedResult(
            loss=torch.stack([group.values[ROW_LOSS].sum() for group in groups]).sum(),
            policy_values=present(policy and policy.values),
            policy_live=present(policy and policy.live),
            distill_values=present(distill and distill.values),
            distill_live=present(distill and distill.live),
            scale=grads.scale,
            dhead=present(grads.head),
            dhead_rows=_rows_of(grads),
            dbias=present(grads.bias),
            dpolicy=present(policy and next(hidden_grads)),
            ddistill=present(distill and next(hidden_grads)),
        )
    )


def _rows_of(grads: chunk_loop.Grads) -> Tensor:
    """Grads.head_rows, ones for None; empty where there is no gradient of the head."""
    if grads.head_rows is not None:
        return grads.head_rows
    return grads.scale.new_ones(0 if grads.head is None else len(grads.head), dtype=torch.int32)


fused_loss_op = torch.library.custom_op(
    "sgpo_kernels::fused_loss",
    run_losses,
    mutates_args=(),
    schema=f"({schema_of(OperatorInputs)}, {', '.join(f'bool need_{name}' for name in WantedGrads._fields)}, "
    f"Tensor? head_grad) -> ({', '.join(['Tensor'] * len(FusedResult._fields))})",
)


@fused_loss_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, wanted, _ = split_arguments(arguments)
    head, acc = inputs.head, sizes.accumulate_dtype(inputs.head.dtype)

    def values(hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        if hidden is None:
            return head.new_empty(0), head.new_empty(0)
        rows = hidden.shape[0]
        return head.new_empty((VALUE_ROWS, rows), dtype=acc), head.new_empty(rows, dtype=torch.bool)

    def grad(like: Tensor | None, need: bool, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty_like(like, dtype=dtype) if need and like is not None else head.new_empty(0)

    policy_values, policy_live = values(inputs.policy_hidden)
    distill_values, distill_live = values(inputs.distill_hidden)
    return tuple(
        FusedResult(
            loss=head.new_empty((), dtype=acc),
            policy_values=policy_values,
            policy_live=policy_live,
            distill_values=distill_values,
            distill_live=distill_live,
            scale=head.new_empty((), dtype=acc),
            dhead=head.new_empty(head.shape, dtype=acc) if wanted.head else head.new_empty(0),
            dhead_rows=head.new_empty(len(head) if wanted.head else 0, dtype=torch.int32),
            dbias=grad(inputs.bias, wanted.bias, acc),
            dpolicy=grad(inputs.policy_hidden, wanted.policy_hidden),
            ddistill=grad(inputs.distill_hidden, wanted.distill_hidden),
        )
    )


# Its gradient.


@torch.library.custom_op("sgpo_kernels::scaled", mutates_args=())
def scaled_op(
    grad: Tensor, rows: Tensor | None, upstream: Tensor, scale: Tensor, dtype: torch.dtype, impl: str
) -> Tensor:
    """grad * upstream * scale in `dtype`; upstream and scale 0-d; rows as in `chunk_loop.rescaled`."""
    return chunk_loop.rescaled(grad, upstream.to(scale.dtype) * scale, dtype, impl, rows)


@scaled_op.register_fake
def _(grad: Tensor, rows: Tensor | None, upstream: Tensor, scale: Tensor, dtype: torch.dtype, impl: str) -> Tensor:
    return torch.empty_like(grad, dtype=dtype)


scaled_op.register_autograd(checks.refuse_second_derivative)


class SavedGrads(NamedTuple):
    """What backward needs of a result: the gradients of the fields of WantedGrads, the scale that they were divided
    by, the dtypes that they are rounded to (None where the input is absent), and the implementation that does it."""

    scale: Tensor
    dhead: Tensor
    dhead_rows: Tensor
    dbias: Tensor
    dpolicy: Tensor
    ddistill: Tensor
    dtypes: tuple[torch.dtype | None, ...]
    impl: str


def dtypes_of(inputs: OperatorInputs) -> tuple[torch.dtype | None, ...]:
    """The dtypes of the inputs that WantedGrads names."""
    tensors = (inputs.head, inputs.bias, inputs.policy_hidden, inputs.distill_hidden)
    return tuple(None if tensor is None else tensor.dtype for tensor in tensors)


def input_grads(
    result: SavedGrads, upstream: Tensor, wanted: WantedGrads, head_grad: Tensor | None, arguments: int
) -> tuple[Tensor | None, ...]:
    """What the backward of an operator returns whose first of so many arguments are OperatorInputs: the wanted
    gradients times `upstream` (0-d), None for the rest. The head's goes to `head_grad` instead where that is given."""
    if head_grad is not None:
        head_grad.addcmul_(result.dhead, (upstream * result.scale).reshape(1, 1))
        wanted = wanted._replace(head=False)
    if torch.is_grad_enabled():
        # create_graph: the saved gradients are constants to autograd, so that a second derivative would lack its larger
        # part without a word. This way it raises.
        upstream.requires_grad_()
    grads = (result.dhead, result.dbias, result.dpolicy, result.ddistill)
    parts = zip(wanted, grads, (result.dhead_rows, None, None, None), result.dtypes, strict=True)
    found = [
        scaled_op(grad, rows, upstream, result.scale, dtype, result.impl) if need else None
        for need, grad, rows, dtype in parts
    ]
    return (*found, *[None] * (arguments - len(found)))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    result = FusedResult(*output)
    given, ctx.wanted, ctx.head_grad = split_arguments(inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    grads = (result.dhead, result.dhead_rows, result.dbias, result.dpolicy, result.ddistill)
    ctx.save_for_backward(result.scale, *grads)
    ctx.dtypes, ctx.impl, ctx.arguments = dtypes_of(given), given.impl, len(inputs)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * ctx.arguments
    saved = SavedGrads(*ctx.saved_tensors, dtypes=ctx.dtypes, impl=ctx.impl)
    return input_grads(saved, grad_loss.detach(), ctx.wanted, ctx.head_grad, ctx.arguments)


fused_loss_op.register_autograd(_backward, setup_context=_save)
