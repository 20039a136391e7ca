"""Checks at the public border: TypeError for a dtype, ValueError for the rest, each with expected / got / what to do.

Shapes, dtypes, devices and plain numbers are always checked. Values inside tensors would cost a host sync on an
accelerator. Token ids are checked there by a device-side assertion, as torch's own indexing does (the process then
needs a restart); temperatures, and what float16 cannot hold, are checked on the CPU only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sgpo_kernels.inputs import ClipRange, DistillInputs, KlLimit, LossOptions, PolicyInputs
from sgpo_kernels.sizes import IMPLS

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
KINDS = ("forward_kl", "reverse_kl", "js")
LIMITS = ("mask", "clamp", "scale")


def _fail(what: str, expected: str, got: object, advice: str) -> str:
    return f"{what}: expected {expected}, got {got}; {advice}."


def _tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(_fail(name, "a torch.Tensor", type(value).__name__, "pass a tensor"))
    return value


def _same_device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(_fail(f"{name}.device", str(device), value.device, "move all inputs to one device"))


def check_matrix(name: str, value: Tensor, columns: int | None = None, like: Tensor | None = None) -> None:
    """A 2-d float tensor, with `columns` columns and the dtype and device of `like` where those are given."""
    _tensor(name, value)
    if value.dtype not in FLOATS:
        raise TypeError(_fail(f"{name}.dtype", "float16, bfloat16, float32 or float64", value.dtype, "cast it"))
    if value.dim() != 2:
        raise ValueError(_fail(f"{name}.shape", "two dimensions", tuple(value.shape), "flatten the leading dimensions"))
    if columns is not None and value.shape[1] != columns:
        raise ValueError(_fail(f"{name}.shape", f"[*, {columns}]", tuple(value.shape), "hidden sizes must agree"))
    if like is not None:
        if value.dtype != like.dtype:
            raise TypeError(
                _fail(f"{name}.dtype", str(like.dtype), value.dtype, "cast hidden states and head to one dtype")
            )
        _same_device(name, value, like.device)


def check_head(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    names: tuple[str, str, str] = ("hidden", "head", "bias"),
) -> None:
    """hidden [N, H], head [V, H], bias [V]: one dtype for the first two, one device for all, V >= 1."""
    hidden_name, head_name, bias_name = names
    check_matrix(hidden_name, hidden)
    check_matrix(head_name, head, hidden.shape[1], hidden)
    vocab = head.shape[0]
    if vocab == 0:
        raise ValueError(_fail(f"{head_name}.shape", "at least one row", tuple(head.shape), "pass the head [V, H]"))
    if bias is None:
        return
    _tensor(bias_name, bias)
    if bias.dtype not in FLOATS:
        raise TypeError(_fail(f"{bias_name}.dtype", "a float dtype", bias.dtype, "cast it"))
    if tuple(bias.shape) != (vocab,):
        raise ValueError(_fail(f"{bias_name}.shape", f"[{vocab}]", tuple(bias.shape), "one value per token id"))
    _same_device(bias_name, bias, head.device)


def check_teacher(
    hidden: Tensor, teacher_hidden: Tensor, head: Tensor, teacher_head: Tensor | None, teacher_bias: Tensor | None
) -> None:
    """teacher_hidden [N, H] for the student's head, or [N, H_T] for teacher_head [V, H_T]; same dtype and device."""
    check_matrix("teacher_hidden", teacher_hidden, hidden.shape[1] if teacher_head is None else None, hidden)
    if teacher_hidden.shape[0] != hidden.shape[0]:
        got = tuple(teacher_hidden.shape)
        raise ValueError(
            _fail("teacher_hidden.shape", f"{hidden.shape[0]} rows as in hidden", got, "align the positions")
        )
    names = ("teacher_hidden", "head" if teacher_head is None else "teacher_head", "teacher_bias")
    check_head(teacher_hidden, head if teacher_head is None else teacher_head, teacher_bias, names)
    if teacher_head is not None and teacher_head.shape[0] != head.shape[0]:
        got = tuple(teacher_head.shape)
        raise ValueError(_fail("teacher_head.shape", f"{head.shape[0]} rows as in head", got, "share one vocabulary"))


def check_row_values(name: str, value: object, hidden: Tensor) -> None:
    """A per-row constant: float32 [N] (or float64 beside float64 hidden states), same device, without gradient."""
    value = _tensor(name, value)
    allowed = (torch.float32, torch.float64) if hidden.dtype == torch.float64 else (torch.float32,)
    if value.dtype not in allowed:
        raise TypeError(_fail(f"{name}.dtype", "float32", value.dtype, "keep per-row values in float32"))
    if tuple(value.shape) != (hidden.shape[0],):
        raise ValueError(
            _fail(f"{name}.shape", f"[{hidden.shape[0]}]", tuple(value.shape), "one value per row of hidden")
        )
    _same_device(name, value, hidden.device)
    if value.requires_grad:
        raise ValueError(
            _fail(name, "a constant", "a tensor that requires grad", "detach it: the op does not differentiate it")
        )


def check_labels(labels: Tensor, hidden: Tensor, name: str = "targets") -> None:
    """Token ids int64 [N] on the device of hidden."""
    _tensor(name, labels)
    if labels.dtype != torch.int64:
        raise TypeError(_fail(f"{name}.dtype", "int64", labels.dtype, "call .long()"))
    if tuple(labels.shape) != (hidden.shape[0],):
        raise ValueError(
            _fail(f"{name}.shape", f"[{hidden.shape[0]}]", tuple(labels.shape), "one id per row of hidden")
        )
    _same_device(name, labels, hidden.device)


_NO_IGNORE_INDEX = "give padding rows weight 0 instead of an ignore index"


def check_live_labels(labels: Tensor, vocab: int, name: str = "targets") -> None:
    """Ids of the rows that count lie in [0, V). Inside the operator; a device-side assertion on CUDA, launched before
    the kernels that would read past a row."""
    expected = f"token ids in [0, {vocab})"
    if labels.is_cuda:
        message = _fail(name, expected, "an id outside", _NO_IGNORE_INDEX)
        torch.ops.aten._assert_async.msg(((labels >= 0) & (labels < vocab)).all(), message)
    elif labels.device.type == "cpu" and labels.numel():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= vocab:
            raise ValueError(_fail(name, expected, f"ids from {low} to {high}", _NO_IGNORE_INDEX))


def check_found_labels(logits_C: Tensor, name: str = "targets") -> None:
    """With a sharded head only all ranks together know the vocabulary: a label that no rank holds has a logit of
    -inf everywhere. All ranks see the same values and fail alike; on CUDA by a device-side assertion."""
    found = logits_C != -math.inf
    message = _fail(name, "token ids that lie on some rank's piece of the head", "an id on none", _NO_IGNORE_INDEX)
    if logits_C.is_cuda:
        torch.ops.aten._assert_async.msg(found.all(), message)
    elif logits_C.device.type == "cpu" and not bool(found.all()):
        raise ValueError(message)


def check_half_range(values: Tensor, dtype: torch.dtype) -> None:
    """Row gradients, divided by the power of two near the largest weight, fit into float16; checked on the CPU only.
    Elsewhere the gradient overflows to inf or NaN, which a gradient scaler sees."""
    if dtype == torch.float16 and values.device.type == "cpu":
        largest = float(values.abs().nan_to_num(nan=0.0, posinf=math.inf).amax()) if values.numel() else 0.0
        if largest > torch.finfo(dtype).max:
            got = f"{largest:.1e} times it"
            advice = "set dual_clip against ratios of this size, or use bfloat16"
            raise ValueError(_fail("float16 row gradient", "at most 65504 times the largest weight", got, advice))


def check_no_tangents(*tensors: object) -> None:
    """The ops have no forward-mode derivative; without this check a tangent would be lost silently. Nor do they take
    part in `torch.func.grad` and its kin, where torch itself would raise a sentence about its own insides."""
    if torch.compiler.is_compiling():
        return
    functorch: Any = torch._C._functorch  # type: ignore[attr-defined]
    if any(layer.key() == functorch.TransformType.Grad for layer in functorch.get_interpreter_stack() or ()):
        raise NotImplementedError(
            "sgpo_kernels: the ops do not run inside torch.func.grad, vjp, jacrev or hessian: use backward() or "
            "torch.autograd.grad, or `reference`."
        )
    if forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                "sgpo_kernels: the ops have no forward-mode derivative (jvp): use reverse mode, or `reference`."
            )


def refuse_second_derivative(ctx: object, *grads: object) -> None:
    """The backward of what the ops call in their own backward."""
    raise RuntimeError("sgpo_kernels: the ops have first derivatives only: leave out create_graph, or use `reference`.")


def check_temperature(temperature: float | Tensor, rows: int, hidden: Tensor) -> None:
    """A float > 0, or float32 [rows] of such."""
    if isinstance(temperature, Tensor):
        if temperature.dtype not in (torch.float32, torch.float64):
            raise TypeError(_fail("temperature.dtype", "float32", temperature.dtype, "cast it"))
        if tuple(temperature.shape) != (rows,):
            raise ValueError(
                _fail("temperature.shape", f"[{rows}]", tuple(temperature.shape), "a float, or one value per row")
            )
        _same_device("temperature", temperature, hidden.device)
        if temperature.requires_grad:
            raise ValueError(_fail("temperature", "a constant", "a tensor that requires grad", "detach it"))
    else:
        check_number("temperature", temperature, low=0.0, open_low=True)


def check_temperature_values(temperature: Tensor | None) -> None:
    """Values > 0; checked on the CPU only, and inside the operator."""
    if temperature is not None and temperature.device.type == "cpu" and not bool((temperature > 0).all()):
        low = f"minimum {float(temperature.min())}"
        raise ValueError(_fail("temperature", "values > 0", low, "use greedy scores elsewhere"))


def check_number(name: str, value: object, *, low: float, high: float = math.inf, open_low: bool = False) -> None:
    """A finite real number in [low, high], or (low, high] with `open_low`."""
    bracket = "(" if open_low else "["
    wanted = f"a finite number in {bracket}{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(_fail(name, wanted, type(value).__name__, "pass a Python number"))
    # Comparisons alone: torch.compile traces them where the number is a run-time value.
    if not -math.inf < value < math.inf or value < low or value > high or (open_low and value == low):
        raise ValueError(_fail(name, wanted, value, "correct the setting"))


def check_clip_range(clip_range: ClipRange) -> None:
    """clip_low in [0, 1], clip_high >= 0, dual_clip > 1; None switches a bound off."""
    if clip_range.clip_low is not None:
        check_number("clip_low", clip_range.clip_low, low=0.0, high=1.0)
    if clip_range.clip_high is not None:
        check_number("clip_high", clip_range.clip_high, low=0.0)
    if clip_range.dual_clip is not None:
        check_number("dual_clip", clip_range.dual_clip, low=1.0, open_low=True)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """One of the names in `choices`."""
    if value not in choices:
        raise ValueError(_fail(name, "one of " + ", ".join(choices), repr(value), "correct the spelling"))


def check_kl_limit(kl_limit: KlLimit) -> None:
    """A known kind and limit; max_token_kl > 0 or None."""
    check_choice("kind", kl_limit.kind, KINDS)
    check_choice("over_limit", kl_limit.over_limit, LIMITS)
    if kl_limit.max_token_kl is not None:
        check_number("max_token_kl", kl_limit.max_token_kl, low=0.0, open_low=True)


def check_chunk_rows(chunk_rows: int | None) -> None:
    """A positive int, or None for the default."""
    if chunk_rows is None:
        return
    if isinstance(chunk_rows, bool) or not isinstance(chunk_rows, int):
        raise TypeError(_fail("chunk_rows", "a positive int or None", type(chunk_rows).__name__, "pass an int"))
    if chunk_rows < 1:
        raise ValueError(_fail("chunk_rows", "a positive int or None", chunk_rows, "pass None for the default"))


def check_policy(inputs: PolicyInputs, labels_name: str, weight_name: str | None) -> None:
    """Labels, per-row constants and bounds of policy rows. The names are those of the public op's arguments;
    weight_name None: there is no weight, the losses are wanted per row."""
    check_labels(inputs.labels, inputs.hidden, labels_name)
    check_row_values("advantages", inputs.advantages, inputs.hidden)
    if inputs.old_logprobs is not None:
        check_row_values("old_logprobs", inputs.old_logprobs, inputs.hidden)
    if weight_name is not None:
        check_row_values(weight_name, inputs.token_weight, inputs.hidden)
    check_clip_range(inputs.clip_range)


def check_distill(inputs: DistillInputs, head: Tensor, weight_name: str | None) -> None:
    """Teacher, weight and limit of distillation rows; weight_name as in check_policy."""
    check_teacher(inputs.hidden, inputs.teacher_hidden, head, inputs.teacher_head, inputs.teacher_bias)
    if weight_name is not None:
        check_row_values(weight_name, inputs.token_weight, inputs.hidden)
    check_kl_limit(inputs.kl_limit)


def check_losses(
    head: Tensor, bias: Tensor | None, policy: PolicyInputs | None, distill: DistillInputs | None, options: LossOptions
) -> None:
    """All that a loss is given. With both groups it is `sgpo_loss`, whose names for the arguments differ; with one
    group a token_weight of None asks for losses per row."""
    first, both, rows = policy or distill, policy is not None and distill is not None, 0
    assert first is not None
    check_head(first.hidden, head, bias, ("policy_hidden" if both else "hidden", "head", "bias"))
    if both and distill is not None:
        check_matrix("distill_hidden", distill.hidden, head.shape[1], head)
    if policy is not None:
        one = None if policy.token_weight is None else "token_weight"
        check_policy(policy, "policy_targets" if both else "targets", "policy_weight" if both else one)
        rows += policy.hidden.shape[0]
    if distill is not None:
        one = None if distill.token_weight is None else "token_weight"
        check_distill(distill, head, "distill_weight" if both else one)
        rows += distill.hidden.shape[0]
    check_options(options, rows, head)
    check_no_tangents(head, bias, *(policy or ()), *(distill or ()))


def check_shard(vocab_group: object, vocab_start: int) -> None:
    """A torch.distributed process group (or None), and the first token id of this rank's head rows."""
    if isinstance(vocab_start, bool) or not isinstance(vocab_start, int) or vocab_start < 0:
        raise ValueError(_fail("vocab_start", "an int >= 0", vocab_start, "pass the first token id of the shard"))
    if vocab_group is None and vocab_start:
        raise ValueError(_fail("vocab_start", "0 without vocab_group", vocab_start, "pass the group of the shards"))
    if vocab_group is not None and not hasattr(vocab_group, "group_name"):
        got = type(vocab_group).__name__
        raise TypeError(_fail("vocab_group", "a torch.distributed process group", got, "pass a group or None"))


def check_softcap(logit_softcap: float | None) -> None:
    """A number > 0, or None for none."""
    if logit_softcap is not None:
        check_number("logit_softcap", logit_softcap, low=0.0, open_low=True)


def check_options(options: LossOptions, rows: int, head: Tensor) -> None:
    """The arguments that all loss ops share."""
    check_temperature(options.temperature, rows, head)
    check_softcap(options.logit_softcap)
    check_number("column_tolerance", options.column_tolerance, low=0.0, high=1.0)
    check_shard(options.vocab_group, options.vocab_start)
    check_choice("impl", options.impl, IMPLS)
    check_chunk_rows(options.chunk_rows)
    if options.head_grad is not None:
        check_head_grad(options.head_grad, head)


def check_head_grad(head_grad: Tensor, head: Tensor) -> None:
    """A buffer of the accumulation dtype, of the head's shape and device, that takes no gradient itself."""
    check_matrix("head_grad", head_grad, head.shape[1])
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "head_grad is not available inside torch.compile: call the op outside, or leave it out."
        )
    wanted = torch.float64 if head.dtype == torch.float64 else torch.float32
    if head_grad.dtype != wanted:
        raise TypeError(_fail("head_grad.dtype", str(wanted), head_grad.dtype, "keep the gradient buffer wide"))
    if head_grad.shape != head.shape:
        got = tuple(head_grad.shape)
        raise ValueError(_fail("head_grad.shape", str(tuple(head.shape)), got, "give it the head's shape"))
    _same_device("head_grad", head_grad, head.device)
    if head_grad.requires_grad:
        raise ValueError(_fail("head_grad", "a plain buffer", "a tensor that requires grad", "detach it"))
    if _overlap(head_grad, head):
        raise ValueError(_fail("head_grad", "memory of its own", "memory of the head", "allocate a buffer"))
    if not head.requires_grad:
        raise ValueError(_fail("head_grad", "a head that requires grad", "a frozen head", "leave head_grad out"))


def _overlap(left: Tensor, right: Tensor) -> bool:
    """Whether the memory between the first and the last element of two tensors meets."""
    if left.untyped_storage()._cdata != right.untyped_storage()._cdata or not left.numel() or not right.numel():
        return False
    (first, last), (start, end) = (_extent(tensor) for tensor in (left, right))
    return first < end and start < last


def _extent(tensor: Tensor) -> tuple[int, int]:
    size = tensor.element_size()
    steps = sum((count - 1) * stride for count, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset()) * size, (int(tensor.storage_offset()) + int(steps) + 1) * size
