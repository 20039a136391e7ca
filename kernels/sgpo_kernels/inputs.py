"""The frozen records that the ops hand down. `None` means off, or absent; tensors are as the caller gave them.

`PolicyInputs` and `DistillInputs` are the two groups of rows, `LossOptions` what both have in common. Nothing here
imports another module with arithmetic, so that checks, operator and chunk loop can all name these types.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from torch import Tensor

from sgpo_kernels.sizes import Impl

Kind = Literal["forward_kl", "reverse_kl", "js"]
OverLimit = Literal["mask", "clamp", "scale"]


class ClipRange(NamedTuple):
    """Bounds of the policy ratio r: it counts as at least 1 - clip_low and at most 1 + clip_high, and for negative
    advantages as at most dual_clip."""

    clip_low: float | None
    clip_high: float | None
    dual_clip: float | None


class KlLimit(NamedTuple):
    """Which divergence a row has, and what happens where it exceeds `max_token_kl`: "mask" sets value and gradient to
    0, "clamp" keeps the limit as the value without a gradient, "scale" multiplies both down to the limit."""

    kind: str
    max_token_kl: float | None
    over_limit: str


class PolicyInputs(NamedTuple):
    """Rows with a sampled token each: hidden [N, H], labels int64 [N] (the ids of those tokens), the rest float32 [N].
    token_weight None: the losses are wanted per row (see row_losses.py)."""

    hidden: Tensor
    labels: Tensor
    old_logprobs: Tensor | None
    advantages: Tensor
    token_weight: Tensor | None
    clip_range: ClipRange


class DistillInputs(NamedTuple):
    """Rows seen from two contexts: hidden [N, H] of the student, teacher_hidden [N, H] or, with a teacher_head [V, H_T]
    and teacher_bias [V] of its own, [N, H_T]. token_weight as in PolicyInputs."""

    hidden: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor | None
    teacher_bias: Tensor | None
    token_weight: Tensor | None
    kl_limit: KlLimit


class LossOptions(NamedTuple):
    """The arguments that all losses have in common.

    temperature: the logits are divided by it; a float > 0, or float32 [N] with one value per row.
    logit_softcap: the logits are bent to cap tanh(z / cap), before the temperature.
    column_tolerance: 0 is exact. Above 0, backward multiplies only those vocabulary columns whose |dz| reaches the
        tolerance times the row's weight for some row of the chunk (see chunk_loop.py); the statistic `dropped` bounds
        what that leaves out.
    head_grad: a buffer [V, H], float32 (float64 for float64 inputs), to which backward adds the head's gradient
        unrounded; head.grad then stays as it is.
    vocab_group, vocab_start: the torch.distributed process group whose ranks each hold a contiguous piece of the
        head's rows, and the first token id of this rank's piece. Every rank passes the same rows; losses, statistics
        and hidden gradients are then whole on every rank.
    impl: "auto" takes Triton on CUDA and plain torch elsewhere. chunk_rows: rows per chunk, None for that of `sizes`.
    """

    temperature: float | Tensor
    logit_softcap: float | None
    column_tolerance: float
    head_grad: Tensor | None
    vocab_group: Any
    vocab_start: int
    impl: Impl
    chunk_rows: int | None
