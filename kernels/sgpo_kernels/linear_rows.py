"""The one chunk loop that all fused-linear ops share.

What: rows h [N, H] of one or several groups meet one head W [V, H]. Per chunk of C live rows the loop forms the
  logits, lets the group turn them into row values and dz, and adds dz to dH, dW and db. Rows that carry no weight
  never enter a product.
Equation: z = (h Wᵀ + b) / temperature; dH = dz W, dW = dzᵀ h, db = sum dz.
Source: the chain rule; arXiv 2606.24064 Eq. 1 and Eq. 3 supply the dz.
Gradient: weights are known in the forward pass, so loss gradients are formed there; backward multiplies by the
  upstream gradient.
Memory: K·C·V·a + V·H·(a + 2s) + 2·N·H·s bytes and, for half dtypes on the CPU, one upcast head V·H·a more
  (`launch.extra_bytes`; a, s = bytes of the accumulation and the input dtype). No term in N·V.
Precision: logits, row values, dz and the dW accumulator are float32 (float64 for float64 inputs). dz is cast to the
  dtype of hidden for the two products; dW is rounded once. Row gradients are divided by a power of two near the
  largest weight before the cast.
Limits: one host sync per group on an accelerator (the count of live rows); first derivatives only; float32 products
  follow torch's own TF32 setting on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sgpo_kernels import launch
from sgpo_kernels.rowmath import power_of_two_scale


def mm(left: Tensor, right: Tensor) -> Tensor:
    """left @ right with a float32 (float64) result; half operands only reach this on CUDA, where torch can widen the
    output."""
    out_dtype = launch.accumulate_dtype(left.dtype)
    return torch.mm(left, right) if left.dtype == out_dtype else torch.mm(left, right, out_dtype=out_dtype)


@dataclass(frozen=True)
class Projection:
    """One head ready for products. CPU torch has no `mm(out_dtype=)`, so half dtypes are upcast there, once per
    call."""

    weight_VH: Tensor
    bias_V: Tensor | None

    @staticmethod
    def of(head: Tensor, bias: Tensor | None) -> Projection:
        acc = launch.accumulate_dtype(head.dtype)
        operand = head.dtype if head.is_cuda else acc
        return Projection(head.detach().to(operand), None if bias is None else bias.detach().to(acc))

    def logits(self, hidden_CH: Tensor, temperature: float | Tensor) -> Tensor:
        """(h Wᵀ + b) / temperature, [C, V] in the accumulation dtype. `temperature` is a float or [C, 1]."""
        logits_CV = mm(hidden_CH.to(self.weight_VH.dtype), self.weight_VH.t())
        if self.bias_V is not None:
            logits_CV.add_(self.bias_V)
        if isinstance(temperature, Tensor) or temperature != 1.0:
            logits_CV.div_(temperature)
        return logits_CV


class Chunk(NamedTuple):
    """One step of the loop: which rows, their temperature, and what a row gradient is multiplied by (None: none is
    wanted)."""

    rows: Tensor
    temperature: float | Tensor
    grad_factor: Tensor | None
    projection: Projection


class RowGroup(Protocol):
    """Rows of one kind. `index` int64 [live] names the rows that count; `step` sees C of them at a time."""

    hidden: Tensor
    index: Tensor
    temperature: float | Tensor

    def weights(self) -> Tensor:
        """The size of the row gradients, [live], any sign."""
        ...

    def step(self, chunk: Chunk, logits_CV: Tensor) -> Tensor | None:
        """Writes the row values of the chunk and returns dz [C, V] times `grad_factor` per row. May overwrite the
        logits."""
        ...


class LossGroup(RowGroup, Protocol):
    def loss(self) -> Tensor:
        """The weighted sum over the rows, 0-d, after the loop."""
        ...


class Needs(NamedTuple):
    """Which inputs want a gradient."""

    head: bool
    bias: bool
    hidden: tuple[bool, ...]

    @property
    def any(self) -> bool:
        return self.head or self.bias or any(self.hidden)


class Grads(NamedTuple):
    """Gradients divided by `scale`, in the dtypes of their inputs; None where none is wanted."""

    scale: Tensor
    head: Tensor | None
    bias: Tensor | None
    hidden: tuple[Tensor | None, ...]


class _Sums:
    """The accumulators of dW [V, H] and db [V], allocated at the first live chunk."""

    def __init__(self, needs: Needs):
        self.needs = needs
        self.head_VH: Tensor | None = None
        self.bias_V: Tensor | None = None

    def add_bias(self, dz_CV: Tensor) -> None:
        if self.needs.bias:
            total = dz_CV.sum(0)
            self.bias_V = total if self.bias_V is None else self.bias_V.add_(total)

    def add_head(self, dz_CV: Tensor, hidden_CH: Tensor) -> None:
        if not self.needs.head:
            return
        acc = launch.accumulate_dtype(dz_CV.dtype)
        if self.head_VH is None:
            shape = (dz_CV.shape[1], hidden_CH.shape[1])
            self.head_VH = torch.zeros(shape, dtype=acc, device=dz_CV.device)
        if dz_CV.dtype == acc:
            self.head_VH.addmm_(dz_CV.t(), hidden_CH)
            return
        # A widening product cannot add in place: block by block, so that no second [V, H] exists.
        block = launch.head_block_rows(hidden_CH.shape[1], acc)
        for dz_CB, sum_BH in zip(dz_CV.split(block, 1), self.head_VH.split(block, 0), strict=True):
            sum_BH.add_(mm(dz_CB.t(), hidden_CH))


def live_index(live: Tensor) -> Tensor:
    """Positions of the rows that count, int64 [live]. On an accelerator this is the op's one host sync."""
    return live.nonzero().squeeze(1)


def of_rows(temperature: float | Tensor, rows: Tensor, dtype: torch.dtype) -> float | Tensor:
    """The temperature of a chunk: the float itself, or [C, 1]."""
    return temperature[rows].to(dtype).unsqueeze(1) if isinstance(temperature, Tensor) else temperature


def run(groups: Sequence[RowGroup], head: Tensor, bias: Tensor | None, needs: Needs, chunk_rows: int | None) -> Grads:
    """Runs every live row of every group through the head once. Call it without gradient tracking."""
    with torch.autocast(head.device.type, enabled=False):
        sums = _Sums(needs)
        acc = launch.accumulate_dtype(head.dtype)
        scale = torch.ones((), dtype=acc, device=head.device)
        hidden_grads = tuple(
            torch.zeros_like(g.hidden) if need else None for g, need in zip(groups, needs.hidden, strict=True)
        )
        if any(group.index.numel() for group in groups):
            projection = Projection.of(head, bias)
            if needs.any:
                scale = power_of_two_scale(torch.cat([group.weights().to(acc) for group in groups]))
            for group, hidden_grad in zip(groups, hidden_grads, strict=True):
                _run_group(group, projection, scale if needs.any else None, sums, hidden_grad, chunk_rows)
        return Grads(
            scale,
            _rounded(sums.head_VH, head) if needs.head else None,
            _rounded(sums.bias_V, bias) if needs.bias and bias is not None else None,
            hidden_grads,
        )


def _run_group(
    group: RowGroup,
    projection: Projection,
    scale: Tensor | None,
    sums: _Sums,
    hidden_grad: Tensor | None,
    chunk_rows: int | None,
) -> None:
    (vocab, width), dtype = projection.weight_VH.shape, group.hidden.dtype
    acc, operand = launch.accumulate_dtype(dtype), projection.weight_VH.dtype
    size = chunk_rows or launch.chunk_rows(group.index.numel(), width, vocab, dtype, group.hidden.device.type)
    for rows in group.index.split(size):
        hidden_CH = group.hidden[rows].to(operand)
        temperature = of_rows(group.temperature, rows, acc)
        factor = None if scale is None else (1.0 / (scale * temperature)).reshape(-1)
        dz_CV = group.step(Chunk(rows, temperature, factor, projection), projection.logits(hidden_CH, temperature))
        if dz_CV is None:
            continue
        sums.add_bias(dz_CV)
        dz_CV = dz_CV.to(dtype).to(operand)
        if hidden_grad is not None:
            hidden_grad[rows] = mm(dz_CV, projection.weight_VH).to(dtype)
        sums.add_head(dz_CV, hidden_CH)


def _rounded(total: Tensor | None, like: Tensor) -> Tensor:
    """The accumulator in the dtype of its input; zeros where no row was live."""
    return torch.zeros_like(like) if total is None else total.to(like.dtype)


def times(grad: Tensor | None, factor: Tensor) -> Tensor | None:
    """grad * factor in the dtype of grad, multiplied in the dtype of factor (a 0-d factor would be cast to half
    first)."""
    return None if grad is None else torch.mul(grad, factor.reshape(1), out=torch.empty_like(grad))


class _LossFunction(torch.autograd.Function):
    """Sum of the losses of all groups. The gradients are formed in forward, while the logits of a chunk exist."""

    @staticmethod
    def forward(
        ctx: Any,
        groups: Sequence[LossGroup],
        chunk_rows: int | None,
        grad_enabled: bool,
        head: Tensor,
        bias: Tensor | None,
        *hidden: Tensor,
    ) -> Tensor:
        need_head, need_bias, *need_hidden = (grad_enabled and need for need in ctx.needs_input_grad[3:])
        grads = run(groups, head, bias, Needs(need_head, need_bias, tuple(need_hidden)), chunk_rows)
        ctx.save_for_backward(grads.scale, grads.head, grads.bias, *grads.hidden)
        return torch.stack([group.loss() for group in groups]).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        scale, *grads = ctx.saved_tensors
        factor = grad_loss.to(scale.dtype) * scale
        return (None, None, None, *(times(grad, factor) for grad in grads))


def weighted_loss(groups: Sequence[LossGroup], head: Tensor, bias: Tensor | None, chunk_rows: int | None) -> Tensor:
    """The summed loss of the groups, 0-d in the accumulation dtype, differentiable in head, bias and each group's
    hidden."""
    apply: Callable[..., Tensor] = _LossFunction.apply  # type: ignore[assignment]
    return apply(groups, chunk_rows, torch.is_grad_enabled(), head, bias, *(group.hidden for group in groups))
