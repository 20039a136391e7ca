"""The loss ops as one custom operator: policy rows and distillation rows against one head, gradients formed in forward.

What: `sgpo_kernels::fused_loss` takes both groups of rows (either may be absent) and returns the loss, the row values
  and the gradients for an upstream gradient of 1; its autograd formula multiplies them by the real one. An operator
  with a fake implementation, so that `torch.compile(fullgraph=True)` keeps the graph whole around it, and so that
  clips, limits and weights stay run-time values.
Equation, source: see policy_loss.py, divergence.py, sgpo_loss.py.
Gradient: to hidden states, head and bias of the student; first derivatives only.
Memory: `sizes.extra_bytes`. Saved: one dH [N, H] per group in its dtype, dW [V, H] and db [V] in the accumulation
  dtype.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgpo_kernels import checks, chunk_loop, sizes
from sgpo_kernels.backend_torch import (
    CLIPPED,
    DIVERGENCE,
    DROPPED,
    LOGPROB,
    OVER,
    RATIO,
    ROW_ENTROPY,
    ROW_LOSS,
    SHARE,
    TEACHER_ENTROPY,
    VALUE_ROWS,
    Bounds,
    Rule,
)
from sgpo_kernels.chunk_loop import Call, Chunk, Needs, RowGroup, live_index
from sgpo_kernels.head import Head, Shard


class PolicyStats(NamedTuple):
    """Per row, no gradient; rows that are not live hold zeros. Log-probs and entropy in nats.

    `dropped` bounds sum |d loss / d logit| over the columns that the backward left out, plus the size of their sum (0
    with column_tolerance = 0; see chunk_loop): |error of dH| <= dropped * max |W|;
    `column_share` is the share of the vocabulary's columns that it multiplied for the row's chunk.
    """

    logprobs: Tensor
    entropy: Tensor
    ratio: Tensor
    clipped: Tensor
    live: Tensor
    dropped: Tensor
    column_share: Tensor


class DivergenceStats(NamedTuple):
    """Per row, no gradient, in nats; rows of weight 0 hold zeros. `divergence` is the value before the limit.
    `dropped` and `column_share` as in PolicyStats."""

    divergence: Tensor
    over_limit: Tensor
    live: Tensor
    entropy: Tensor
    teacher_entropy: Tensor
    dropped: Tensor
    column_share: Tensor


class PolicyRows(RowGroup):
    """The policy rows of one call."""

    def __init__(
        self,
        hidden: Tensor,
        targets: Tensor,
        old_logprobs: Tensor | None,
        advantages: Tensor,
        token_weight: Tensor,
        bounds: Bounds,
        temperature: float | Tensor,
    ):
        self.live = (advantages != 0) & (token_weight != 0)
        super().__init__(hidden, live_index(self.live), temperature, targets)
        acc = self.values.dtype
        self.advantages, self.token_weight, self.bounds = advantages.to(acc), token_weight.to(acc), bounds
        self.old_logprobs = None if old_logprobs is None else old_logprobs.to(acc)

    def weights(self) -> Tensor:
        return (self.advantages * self.token_weight)[self.index]

    def settle(self, chunk: Chunk) -> Tensor:
        return chunk.math.settle_policy(
            self.gathered(chunk),
            chunk.shard.rank,
            chunk.targets_C,
            self.old_logprobs,
            self.advantages,
            self.token_weight,
            self.bounds,
            chunk.rows_C,
            chunk.factor_C,
            self.values,
        )


class DivergenceRows(RowGroup):
    """The distillation rows of one call."""

    def __init__(
        self,
        hidden: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Tensor | None,
        teacher_bias: Tensor | None,
        token_weight: Tensor,
        rule: Rule,
        temperature: float | Tensor,
    ):
        self.live = token_weight != 0
        super().__init__(hidden, live_index(self.live), temperature)
        self.token_weight, self.rule, self.kind = token_weight.to(self.values.dtype), rule, rule.kind
        self.teacher_hidden, self.teacher_head, self.teacher_bias = teacher_hidden, teacher_head, teacher_bias
        self._teacher: tuple[Tensor, Head] | None = None

    def teacher(self, head: Head) -> tuple[Tensor, Head]:
        if self._teacher is None:
            own_bias = None if self.teacher_bias is None else self.teacher_bias.detach().to(self.values.dtype)
            if self.teacher_head is not None:
                teacher_head = Head.of(self.teacher_head, self.teacher_bias)
            else:
                teacher_head = head if own_bias is None else Head(head.weight_VH, own_bias)
            self._teacher = self.teacher_hidden, teacher_head
        return self._teacher

    def weights(self) -> Tensor:
        return self.token_weight[self.index]

    def settle(self, chunk: Chunk) -> Tensor:
        math, shard = chunk.math, chunk.shard
        assert chunk.teacher is not None
        both = shard.gather(torch.cat([math.scan(chunk.student, None), math.scan(chunk.teacher, None)]))
        table = math.settle_pair(both, shard.rank, chunk.rows_C, self.values)
        sums_3C = math.divergence_sums(self.kind, chunk.student, chunk.teacher, table)
        # The third row bounds what this shard drops, and stays with it.
        shard.sum_(sums_3C[:2])
        math.settle_divergence(sums_3C, self.token_weight, self.rule, chunk.rows_C, chunk.factor_C, self.values, table)
        return table


class FusedResult(NamedTuple):
    """The outputs of the operator; gradients that are not wanted, and groups that are absent, are empty tensors."""

    loss: Tensor  # 0-d
    policy_values: Tensor  # [VALUE_ROWS, Np]
    policy_live: Tensor  # bool [Np]
    distill_values: Tensor  # [VALUE_ROWS, Nd]
    distill_live: Tensor  # bool [Nd]
    scale: Tensor  # 0-d
    dhead: Tensor
    dbias: Tensor
    dpolicy: Tensor
    ddistill: Tensor


_NAN = float("nan")
# `numbers`: clip_low, clip_high, dual_clip, max_token_kl, temperature, column_tolerance; NaN where one is off.
INPUTS = """Tensor head, Tensor? bias,
    Tensor? policy_hidden, Tensor? distill_hidden,
    Tensor? targets, Tensor? old_logprobs, Tensor? advantages, Tensor? policy_weight,
    Tensor? teacher_hidden, Tensor? teacher_head, Tensor? teacher_bias, Tensor? distill_weight,
    str kind, str over_limit, Tensor numbers, Tensor? row_temperature, float? logit_softcap,
    str impl, int? chunk_rows, str? vocab_group, int vocab_start"""
_SCHEMA = f"""({INPUTS},
    bool need_head, bool need_bias, bool need_policy, bool need_distill,
    Tensor? head_grad
) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"""


def run_losses(
    head: Tensor,
    bias: Tensor | None,
    policy_hidden: Tensor | None,
    distill_hidden: Tensor | None,
    targets: Tensor | None,
    old_logprobs: Tensor | None,
    advantages: Tensor | None,
    policy_weight: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    teacher_bias: Tensor | None,
    distill_weight: Tensor | None,
    kind: str,
    over_limit: str,
    numbers: Tensor,
    row_temperature: Tensor | None,
    logit_softcap: float | None,
    impl: str,
    chunk_rows: int | None,
    vocab_group: str | None,
    vocab_start: int,
    need_head: bool,
    need_bias: bool,
    need_policy: bool,
    need_distill: bool,
    head_grad: Tensor | None,
) -> tuple[Tensor, ...]:
    """What the operator does; see FusedResult."""
    checks.check_temperature_values(row_temperature)
    *gates, temperature, column_tolerance = numbers.tolist()
    clip_low, clip_high, dual_clip, max_token_kl = (None if math.isnan(gate) else gate for gate in gates)
    split = 0 if policy_hidden is None else policy_hidden.shape[0]
    first: float | Tensor = temperature if row_temperature is None else row_temperature[:split]
    second: float | Tensor = temperature if row_temperature is None else row_temperature[split:]
    groups: list[RowGroup] = []
    if policy_hidden is not None:
        assert targets is not None
        assert advantages is not None
        assert policy_weight is not None
        bounds = Bounds(clip_low, clip_high, dual_clip)
        policy = PolicyRows(policy_hidden, targets, old_logprobs, advantages, policy_weight, bounds, first)
        if distill_hidden is not None:
            policy.targets_name = "policy_targets"
        if vocab_group is None:
            checks.check_live_targets(targets[policy.index], head.shape[0], policy.targets_name)
        groups.append(policy)
    if distill_hidden is not None:
        assert teacher_hidden is not None
        assert distill_weight is not None
        rule = Rule(kind, max_token_kl, over_limit)
        groups.append(
            DivergenceRows(distill_hidden, teacher_hidden, teacher_head, teacher_bias, distill_weight, rule, second)
        )
    shard = Shard(vocab_group, vocab_start)
    call = Call(head, bias, logit_softcap, shard, impl, chunk_rows, column_tolerance)
    wanted = [need_policy] * (policy_hidden is not None) + [need_distill] * (distill_hidden is not None)
    grads = chunk_loop.run(groups, call, Needs(need_head, need_bias, tuple(wanted)))

    def present(tensor: Tensor | None) -> Tensor:
        return head.new_empty(0) if tensor is None else tensor

    outputs: list[Tensor] = [torch.stack([group.values[ROW_LOSS].sum() for group in groups]).sum()]
    found = iter(zip(groups, grads.hidden, strict=True))
    hidden_grads = []
    for hidden in (policy_hidden, distill_hidden):
        group, grad = (None, None) if hidden is None else next(found)
        outputs += [present(None), present(None)] if group is None else [group.values, group.live]  # type: ignore[attr-defined]
        hidden_grads.append(present(grad))
    return (*outputs, grads.scale, present(grads.head), present(grads.bias), *hidden_grads)


_fused_loss = torch.library.custom_op("sgpo_kernels::fused_loss", run_losses, mutates_args=(), schema=_SCHEMA)


@_fused_loss.register_fake
def _(
    head: Tensor, bias: Tensor | None, policy_hidden: Tensor | None, distill_hidden: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    need_head, need_bias, need_policy, need_distill, _ = rest[-5:]
    acc = sizes.accumulate_dtype(head.dtype)

    def empty(*shape: Any, dtype: torch.dtype = acc) -> Tensor:
        return head.new_empty(shape, dtype=dtype)

    outputs = [empty()]
    for hidden in (policy_hidden, distill_hidden):
        rows = None if hidden is None else hidden.shape[0]
        outputs += [empty(0), empty(0)] if rows is None else [empty(VALUE_ROWS, rows), empty(rows, dtype=torch.bool)]
    none = head.new_empty(0)
    dhead = empty(*head.shape) if need_head else none
    dbias = empty(*bias.shape) if need_bias and bias is not None else none
    grads = [
        torch.empty_like(hidden) if need and hidden is not None else none
        for hidden, need in ((policy_hidden, need_policy), (distill_hidden, need_distill))
    ]
    return (*outputs, empty(), dhead.clone(), dbias.clone(), *(grad.clone() for grad in grads))


@torch.library.custom_op("sgpo_kernels::scaled", mutates_args=())
def _scaled(grad: Tensor, upstream: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * upstream * scale in `dtype`."""
    return chunk_loop.rescaled(grad, upstream.to(scale.dtype) * scale, dtype)


@_scaled.register_fake
def _(grad: Tensor, upstream: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(grad, dtype=dtype)


_scaled.register_autograd(checks.refuse_second_derivative)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    result = FusedResult(*output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(result.scale, result.dhead, result.dbias, result.dpolicy, result.ddistill)
    ctx.inputs, ctx.wanted, ctx.head_grad = len(inputs), inputs[-5:-1], inputs[-1]
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[:4]]


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    scale, *saved = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * ctx.inputs
    if grad_loss is None:
        return tuple(grads)
    upstream, need = grad_loss.detach(), list(ctx.wanted)
    if ctx.head_grad is not None:
        ctx.head_grad.addcmul_(saved[0], (upstream * scale).reshape(1, 1))
        need[0] = False
    if torch.is_grad_enabled():
        # create_graph: the saved gradients are constants to autograd, so that a second derivative would lack its larger
        # part without a word. This way it raises.
        upstream.requires_grad_()
    for position, (grad, dtype) in enumerate(zip(saved, ctx.dtypes, strict=True)):
        grads[position] = _scaled(grad, upstream, scale, dtype) if need[position] else None
    return tuple(grads)


_fused_loss.register_autograd(_backward, setup_context=_save)


class Options(NamedTuple):
    """The arguments that all loss ops share, in the operator's terms."""

    temperature: float | Tensor
    logit_softcap: float | None
    column_tolerance: float
    head_grad: Tensor | None
    vocab_group: Any
    vocab_start: int
    impl: str
    chunk_rows: int | None


class PolicyInputs(NamedTuple):
    hidden: Tensor
    targets: Tensor
    old_logprobs: Tensor | None
    advantages: Tensor
    token_weight: Tensor | None
    bounds: Bounds


class DistillInputs(NamedTuple):
    hidden: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor | None
    teacher_bias: Tensor | None
    token_weight: Tensor | None
    rule: Rule


def fused_loss(
    head: Tensor, bias: Tensor | None, policy: PolicyInputs | None, distill: DistillInputs | None, options: Options
) -> FusedResult:
    """Checks the inputs that both groups share with the head, and calls the operator."""
    grad, p, d = torch.is_grad_enabled(), policy, distill
    output = _fused_loss(
        *checked_inputs(head, bias, policy, distill, options),
        grad and head.requires_grad,
        grad and bias is not None and bias.requires_grad,
        grad and p is not None and p.hidden.requires_grad,
        grad and d is not None and d.hidden.requires_grad,
        options.head_grad,
    )
    return FusedResult(*output)


def checked_inputs(
    head: Tensor, bias: Tensor | None, policy: PolicyInputs | None, distill: DistillInputs | None, options: Options
) -> tuple[Any, ...]:
    """The arguments named in INPUTS, after the checks of what both groups share with the head."""
    rows = 0
    both = policy is not None and distill is not None
    if policy is not None:
        checks.check_policy(policy.hidden, *policy[1:4], "policy_targets" if both else "targets")
        if both or policy.token_weight is not None:
            weight_name = "policy_weight" if both else "token_weight"
            checks.check_row_values(weight_name, policy.token_weight, policy.hidden)
        checks.check_clips(*policy.bounds)
        rows += policy.hidden.shape[0]
    if distill is not None:
        checks.check_teacher(distill.hidden, distill.teacher_hidden, head, distill.teacher_head, distill.teacher_bias)
        if both or distill.token_weight is not None:
            weight_name = "distill_weight" if both else "token_weight"
            checks.check_row_values(weight_name, distill.token_weight, distill.hidden)
        checks.check_divergence(*distill.rule)
        rows += distill.hidden.shape[0]
    checks.check_options(options, rows, head)
    checks.check_no_tangents(head, bias, *(policy or ())[:5], *(distill or ())[:5])
    heat = options.temperature
    heat_rows = heat if isinstance(heat, Tensor) else None
    group = options.vocab_group
    p, d = policy, distill
    bounds = Bounds(None, None, None) if p is None else p.bounds
    rule = Rule("forward_kl", None, "mask") if d is None else d.rule
    scalars = (*bounds, rule.max_token_kl, 1.0 if isinstance(heat, Tensor) else heat, options.column_tolerance)
    # A float argument would be a constant of a compiled graph; as a tensor on the CPU it can be annealed. Times 1 and
    # not `scalar_tensor`: torch.compile keeps a float as a run-time value through arithmetic only.
    one = torch.ones((), dtype=torch.float64, device="cpu")
    numbers = torch.stack([one * (_NAN if x is None else x) for x in scalars])
    return (
        head,
        bias,
        None if p is None else p.hidden,
        None if d is None else d.hidden,
        *((None,) * 4 if p is None else p[1:5]),
        *((None,) * 4 if d is None else d[1:5]),
        rule.kind,
        rule.over_limit,
        numbers,
        heat_rows,
        options.logit_softcap,
        options.impl,
        options.chunk_rows,
        None if group is None else group.group_name,
        options.vocab_start,
    )


def policy_stats(values: Tensor, live: Tensor) -> PolicyStats:
    """From the group's row values [VALUE_ROWS, N] and its live rows."""
    clipped = values[CLIPPED] != 0
    return PolicyStats(
        values[LOGPROB], values[ROW_ENTROPY], values[RATIO], clipped, live, values[DROPPED], values[SHARE]
    )


def divergence_stats(values: Tensor, live: Tensor) -> DivergenceStats:
    """From the group's row values [VALUE_ROWS, N] and its live rows."""
    over = values[OVER] != 0
    return DivergenceStats(
        values[DIVERGENCE],
        over,
        live,
        values[ROW_ENTROPY],
        values[TEACHER_ENTROPY],
        values[DROPPED],
        values[SHARE],
    )
