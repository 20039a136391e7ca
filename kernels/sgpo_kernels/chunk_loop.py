"""The one chunk loop that all fused-linear ops share.

What: rows h [N, H] of one or several groups meet one head W [V, H]. Per chunk of C live rows the loop forms the
  logits, lets the group turn them into row values and a table of slopes, and adds dz to dH, dW and db. Rows that carry
  no weight never enter a product.
Equation: z = softcap(h Wᵀ + b) / temperature; dH = dz W, dW = dzᵀ h, db = sum dz.
Source: the chain rule; arXiv 2606.24064 Eq. 1 and Eq. 3 supply the dz.
Gradient: weights are known in the forward pass, so loss gradients are formed there; backward multiplies by the
  upstream gradient.
Memory: `sizes.extra_bytes`. No term in N·V.
Precision: logits, row values and the dW accumulator are float32 (float64 for float64 inputs). dz is rounded to the
  dtype of hidden for the two products. Row gradients are divided by a power of two near the largest weight before
  they are rounded. dW and db stay in the accumulation dtype until they are multiplied back, and are rounded once: one
  pass over dW, and a sum over rows of such quotients cannot overflow float16.
Limits: host syncs on an accelerator: one per group (the count of live rows); with a column tolerance and impl="torch"
  one per chunk (the count of live columns, which Triton's kernels leave on the device). First derivatives only; float32
  products follow torch's own TF32 setting on CUDA, but for Triton's with live columns, which are exact.

Live columns: on a confident model dz is almost empty. With column_tolerance > 0 a column of the chunk is multiplied
  only where |dz| >= tolerance * (the row's weight) * min(1, the chunk's largest sum |dz| / weight) for some row; what
  each row loses is returned as a bound on sum |dz| over its dropped columns, in units of d loss / d logit. Where more
  than half of the columns live, the chunk is dense and drops nothing.

Centring: dz of a row sums to 0, so the sum of what it dropped is known. dH gets it back, multiplied by one mean head
  row (of the columns below the threshold in the group's first chunk, weighted by their largest |dz|); on a real model
  this makes the error of dH several times smaller. The returned bound then includes the sum's size, so that in either
  case |error of dH| <= dropped * max |W|. Not with a soft-cap or a vocabulary shard, whose dz does not sum to 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from sgpo_kernels import backend_torch, checks, sizes
from sgpo_kernels.backend import DROPPED, SHARE, SLOPE, Backend, LiveColumns, Logits, Sweep
from sgpo_kernels.backend_torch import power_of_two_scale
from sgpo_kernels.head import Head, Shard, add_mm, bmm, capturing, mm, read_later
from sgpo_kernels.row_groups import Chunk, RowGroup

# Head rows that one program sums for the mean head row.
MEAN_ROWS = 512


class NeedsGrad(NamedTuple):
    """Which inputs want a gradient; `hidden` has one entry per group. `whole_head`: rows of dW that nothing was added
    to are zeros, too; if not, they may hold anything."""

    head: bool
    bias: bool
    hidden: tuple[bool, ...]
    whole_head: bool = True

    @property
    def any(self) -> bool:
        """Whether there is anything to do in backward."""
        return self.head or self.bias or any(self.hidden)


class Grads(NamedTuple):
    """Gradients divided by `scale`: of hidden in its dtype, of head and bias in the accumulation dtype, to be rounded
    once, when they are multiplied back (`rescaled`); None where none is wanted. `head_rows` int32 [V]: 0 for rows of
    the head's that nothing was added to; None: all rows hold their gradient."""

    scale: Tensor
    head: Tensor | None
    head_rows: Tensor | None
    bias: Tensor | None
    hidden: tuple[Tensor | None, ...]


@dataclass(frozen=True)
class SharedInputs:
    """What all rows of one call have in common: head [V, H], bias [V], soft-cap, this rank's shard, and how to run."""

    head: Tensor
    bias: Tensor | None
    softcap: float | None = None
    shard: Shard = field(default_factory=Shard)
    impl: str = "auto"
    chunk_rows: int | None = None
    column_tolerance: float = 0.0


def load_backend(impl: str, device_type: str, dtype: torch.dtype) -> Backend:
    """The row arithmetic for an `impl`; Triton is imported only where it runs. Raises as `sizes.resolve_impl`."""
    if sizes.resolve_impl(impl, device_type, dtype) == "triton":
        from sgpo_kernels import backend_triton

        return backend_triton
    return backend_torch


def run(groups: Sequence[RowGroup], shared: SharedInputs, needs: NeedsGrad) -> Grads:
    """Runs every live row of every group through the head once: row values into the groups, gradients returned. Call it
    without gradient tracking."""
    head, bias = shared.head, shared.bias
    with torch.autocast(head.device.type, enabled=False):
        scale = torch.ones((), dtype=sizes.accumulate_dtype(head.dtype), device=head.device)
        hidden_grads = tuple(
            torch.zeros_like(g.hidden) if need else None for g, need in zip(groups, needs.hidden, strict=True)
        )
        dhead, head_rows, dbias = None, None, None
        if any(group.index.numel() for group in groups):
            if needs.any:
                scale = power_of_two_scale(torch.cat([group.weights().to(scale.dtype) for group in groups]))
            loop = _ChunkLoop(groups, shared, needs, scale)
            for group, hidden_grad in zip(groups, hidden_grads, strict=True):
                if not group.index.numel():
                    continue
                loop.begin_group(group)
                for rows_C in group.index.split(loop.chunk):
                    loop.run_chunk(group, rows_C, hidden_grad)
                loop.end_group(group)
            dhead, head_rows, dbias = loop.finish()
        if needs.head:
            dhead = torch.zeros_like(head, dtype=scale.dtype) if dhead is None else dhead
        if needs.bias and bias is not None and dbias is None:
            dbias = torch.zeros_like(bias, dtype=scale.dtype)
        return Grads(scale, dhead, head_rows, dbias, hidden_grads)


def rescaled(grad: Tensor, factor: Tensor, dtype: torch.dtype, impl: str, rows: Tensor | None = None) -> Tensor:
    """grad * factor (0-d) in `dtype`, multiplied in that of factor (a 0-d factor would be cast to half first), by the
    implementation of the call: Triton's kernel is for contiguous tensors on CUDA. With `rows`, as Grads.head_rows, of
    a matrix: zeros where they are 0."""
    contiguous = rows is not None or (grad.is_cuda and grad.is_contiguous())
    return load_backend(impl if contiguous else "torch", grad.device.type, grad.dtype).rescaled(
        grad, factor, dtype, rows
    )


class _ChunkLoop:
    """The buffers and accumulators of one call: products [C, V], dW [V, H], db [V] and, where operands are narrower
    than accumulators, a slab of dz rows, so that dW is updated once per several chunks."""

    def __init__(self, groups: Sequence[RowGroup], shared: SharedInputs, needs: NeedsGrad, scale: Tensor):
        self.shared, self.needs = shared, needs
        self.backend = load_backend(shared.impl, shared.head.device.type, shared.head.dtype)
        self.head = Head.of(shared.head, shared.bias)
        self.scale = scale if needs.any else None
        self.acc, self.operand = scale.dtype, self.head.weight_VH.dtype
        rows = max(group.index.numel() for group in groups)
        vocab, width = shared.head.shape
        self.chunk = min(rows, shared.chunk_rows or self._default_chunk(rows, width, vocab))
        self.factors_C = (1.0 / scale).repeat(self.chunk)
        self.products: dict[str, Tensor] = {}
        self.head_VH: Tensor | None = None
        # By which sparse chunk a row of head_VH was first written; None: all rows hold their sums.
        self.first_V: Tensor | None = None
        self.sparse_chunks = 0
        self.bias_V: Tensor | None = None
        total = sum(group.index.numel() for group in groups)
        self.slab_rows = sizes.slab_rows(total, self.chunk) if needs.head else self.chunk
        self.slab: tuple[Tensor, Tensor] | None = None
        self.filled = 0
        self.centred = shared.softcap is None and shared.shard.group_name is None
        self.centre_H: Tensor | None = None
        self.sweeps: Backend | None = None
        self.diffuse = False
        self.late_counts: list[Callable[[], int]] = []

    def _default_chunk(self, rows: int, width: int, vocab: int) -> int:
        device = self.shared.head.device.type
        chunk = sizes.chunk_rows(rows, width, vocab, self.shared.head.dtype, device)
        # It depends on this rank's columns on a CPU only, and all ranks must take the same steps.
        return self.shared.shard.smallest(chunk) if device == "cpu" else chunk

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.acc, device=self.shared.head.device)

    def _zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self._empty(*shape, dtype=dtype).zero_()

    def begin_group(self, group: RowGroup) -> None:
        """Before the chunks of a group, whose mean head row is its own."""
        group.values[SHARE].index_fill_(0, group.index, 1.0)
        self.centre_H, self.diffuse = None, False
        self.late_counts.clear()
        self.sweeps = self._backend_without_logits(group) if self.shared.impl == "triton-nologits" else None

    def _backend_without_logits(self, group: RowGroup) -> Backend | None:
        """The arithmetic of rows that need no logits; None where they do."""
        from sgpo_kernels import backend_sweep

        plain = self.centred and self.shared.bias is None and group.kind == "score"
        kept = self.scale is None or (self.shared.column_tolerance > 0 and group.old_logprobs is not None)
        readable = backend_sweep.takes(self.head.weight_VH)
        return cast(Backend, backend_sweep) if plain and kept and readable else None

    def run_chunk(self, group: RowGroup, rows_C: Tensor, hidden_grad: Tensor | None) -> None:
        """Logits, row values and gradients of some live rows of a group."""
        hidden_CH = group.hidden[rows_C].to(self.operand)
        sparse = self.shared.column_tolerance > 0 and self.scale is not None and not self._is_diffuse()
        chunk = self._open(group, rows_C, hidden_CH, self.sweeps if sparse or self.scale is None else None)
        table = group.row_values(chunk)
        if chunk.factor_C is None:
            return
        checks.check_half_range(table[SLOPE], group.hidden.dtype)
        live = self._live_columns(group, chunk, table) if sparse else None
        if live is None:
            self._dense(group, chunk, table, hidden_CH, hidden_grad)
        else:
            self._sparse(group, chunk, table, live, hidden_CH, hidden_grad)

    def _is_diffuse(self) -> bool:
        """Whether every column lived in the chunk before the last one or an earlier one of the group. The host hears of
        it that late, so that it never waits for what it has just launched; a dense product then costs less."""
        if not self.diffuse and len(self.late_counts) > 1:
            self.diffuse = self.late_counts[-2]() == self.shared.head.shape[0]
        return self.diffuse

    def end_group(self, group: RowGroup) -> None:
        """After them: what all shards dropped, and nothing in rows that only a captured graph has run."""
        if self.shared.column_tolerance:
            self.shared.shard.sum_(group.values[DROPPED])
        if group.live is not None and capturing(group.live):
            group.values.masked_fill_(~group.live, 0.0)

    def _open(self, group: RowGroup, rows_C: Tensor, hidden_CH: Tensor, sweeps: Backend | None) -> Chunk:
        """The chunk with the products of both contexts: two of one shape, so that equal states give equal bits. With
        `sweeps`, with what they would be made of."""
        inverse = None if group.inv_temperature is None else group.inv_temperature[rows_C]
        if sweeps is not None:
            old = None if self.scale is None or group.old_logprobs is None else group.old_logprobs[rows_C]
            student: Any = Sweep(hidden_CH, self.head.weight_VH, inverse, old, {})
        else:
            student = self._logits("student", hidden_CH, self.head, inverse)
        side, teacher = group.teacher(self.head), None
        if side is not None:
            teacher = self._logits("teacher", side[0][rows_C], side[1], inverse)
        labels = None if group.labels is None else group.labels[rows_C]
        if labels is not None:
            labels = self.shared.shard.local(labels, self.shared.head.shape[0])
        factor = None
        if self.scale is not None:
            factor = self.factors_C[: len(rows_C)] if inverse is None else inverse * self.factors_C[0]
        return Chunk(sweeps or self.backend, self.shared.shard, rows_C, student, teacher, labels, factor)

    def _logits(self, context: str, hidden_CH: Tensor, head: Head, inverse_C: Tensor | None) -> Logits:
        """The products of a context, in the buffer that it has for the whole call."""
        if context not in self.products:
            vocab = self.shared.head.shape[0]
            self.products[context] = sizes.padded_empty(self.chunk, vocab, like=hidden_CH, dtype=self.acc)
        products_CV = head.products(hidden_CH, self.products[context][: len(hidden_CH)])
        return Logits(products_CV, head.bias_V, self.shared.softcap, inverse_C, {})

    def _live_columns(self, group: RowGroup, chunk: Chunk, table: Tensor) -> LiveColumns | None:
        """The columns to multiply; None means all of them. The group's first chunk also fixes the mean head row."""
        threshold = self.backend.column_threshold(table, self.shared.column_tolerance)
        first = self.centred and self.centre_H is None
        live, dropped_V = chunk.backend.live_columns(
            group.kind, chunk.student, chunk.teacher, table, chunk.labels_C, threshold, all_peaks=first
        )
        if first:
            self.centre_H = self._mean_head_row(dropped_V)
        if live.taken is not None and not capturing(live.taken):
            self.late_counts.append(read_later(live.taken))
        if live.taken is None and live.columns_A.numel() > sizes.dense_limit(dropped_V.numel()):
            return None
        return live

    def _mean_head_row(self, weights_V: Tensor) -> Tensor:
        """The weighted mean of the head's rows, [H]; 0 where all weights are. One pass over the head, block by block:
        a product of one row over the whole vocabulary would run on a few processors of an accelerator."""
        tiny = torch.finfo(weights_V.dtype).tiny
        weights_V = (weights_V / weights_V.amax().clamp(min=tiny)).to(self.operand)
        head_VH = self.head.weight_VH
        whole = len(weights_V) // MEAN_ROWS * MEAN_ROWS
        blocks_BRH = head_VH[:whole].view(-1, MEAN_ROWS, head_VH.shape[1])
        sums_BH = bmm(weights_V[:whole].view(-1, 1, MEAN_ROWS), blocks_BRH).squeeze(1)
        total_H = sums_BH.sum(0) + mm(weights_V[whole:].unsqueeze(0), head_VH[whole:]).squeeze(0)
        return total_H / weights_V.sum(dtype=self.acc).clamp(min=tiny)

    def _dense(
        self, group: RowGroup, chunk: Chunk, table: Tensor, hidden_CH: Tensor, hidden_grad: Tensor | None
    ) -> None:
        narrow = self.operand != self.acc
        out_CV = self._slab_rows(hidden_CH) if narrow else None
        dz_CV = self.backend.gradient(
            group.kind, chunk.student, chunk.teacher, table, chunk.labels_C, out_CV, with_entropy=group.with_entropy
        )
        self._add_bias(None, dz_CV)
        if not narrow:
            dz_CV = dz_CV.to(group.hidden.dtype).to(self.operand)
        if hidden_grad is not None:
            self._store(hidden_grad, chunk, mm(dz_CV, self.head.weight_VH))
        if self.needs.head and not narrow:
            self._add_to_head(dz_CV, hidden_CH)

    def _sparse(
        self,
        group: RowGroup,
        chunk: Chunk,
        table: Tensor,
        live: LiveColumns,
        hidden_CH: Tensor,
        hidden_grad: Tensor | None,
    ) -> None:
        dz_CA, kept_C, sum_C = chunk.backend.gradient_columns(
            group.kind, chunk.student, chunk.teacher, table, chunk.labels_C, live, group.hidden.dtype
        )
        assert self.scale is not None
        self.backend.finish_columns(
            table, kept_C, sum_C if self.centre_H is not None else None, live, self.scale, chunk.rows_C,
            self.shared.head.shape[0], group.values,
        )  # fmt: skip
        self._add_bias(live, dz_CA)
        dz_CA = dz_CA.to(self.operand)
        if self.needs.head:
            self._add_live_to_head(dz_CA, hidden_CH, live)
        if hidden_grad is not None:
            dhidden_CH = self.backend.live_hidden(dz_CA, self.head.weight_VH, live)
            if self.centre_H is not None:
                dhidden_CH.addr_(sum_C, self.centre_H, alpha=-1)
            self._store(hidden_grad, chunk, dhidden_CH)

    def _store(self, hidden_grad: Tensor, chunk: Chunk, dhidden_CH: Tensor) -> None:
        dhidden_CH = self.shared.shard.sum_(dhidden_CH)
        checks.check_half_range(dhidden_CH, hidden_grad.dtype)
        hidden_grad.index_copy_(0, chunk.rows_C, dhidden_CH.to(hidden_grad.dtype))

    def _add_live_to_head(self, dz_CA: Tensor, hidden_CH: Tensor, live: LiveColumns) -> None:
        """To its live rows only: where Triton runs, the others are not even set to 0."""
        if self.head_VH is None:
            partly = live.taken is not None and not self.needs.whole_head
            self.head_VH = (self._empty if partly else self._zeros)(*self.shared.head.shape)
            self.first_V = self._zeros(len(self.head_VH), dtype=torch.int32) if partly else None
        self.sparse_chunks += 1
        self.backend.add_live_head(self.head_VH, self.first_V, self.sparse_chunks, dz_CA, hidden_CH, live)

    def _add_to_head(self, dz_SV: Tensor, hidden_SH: Tensor) -> None:
        if self.head_VH is None:
            self.head_VH = mm(dz_SV.t(), hidden_SH)
            return
        if self.first_V is not None:
            self.head_VH.masked_fill_((self.first_V == 0).unsqueeze(1), 0.0)
            self.first_V = None
        block = sizes.head_block_rows(hidden_SH.shape[1], self.acc, hidden_SH.device.type)
        add_mm(self.head_VH, dz_SV.t(), hidden_SH, block)

    def _add_bias(self, live: LiveColumns | None, dz_CK: Tensor) -> None:
        if not self.needs.bias:
            return
        if self.bias_V is None:
            self.bias_V = dz_CK.new_zeros(self.shared.head.shape[0], dtype=self.acc)
        total_K = dz_CK.sum(0, dtype=self.acc)
        if live is None:
            self.bias_V.add_(total_K)
            return
        if live.taken is not None:
            total_K = torch.where(torch.arange(len(total_K), device=total_K.device) < live.taken, total_K, 0.0)
        self.bias_V.index_add_(0, live.columns_A, total_K)

    def _slab_rows(self, hidden_CH: Tensor) -> Tensor:
        """Where the dz of these rows goes, beside their hidden states."""
        rows = hidden_CH.shape[0]
        if self.slab is None:
            vocab, width = self.shared.head.shape
            self.slab = (
                self._empty(self.slab_rows, vocab, dtype=self.operand),
                hidden_CH.new_empty(self.slab_rows, width),
            )
        if self.filled + rows > self.slab_rows or not self.needs.head:
            self._flush()
        dz_SV, hidden_SH = self.slab
        self.filled += rows
        hidden_SH[self.filled - rows : self.filled] = hidden_CH
        return dz_SV[self.filled - rows : self.filled]

    def _flush(self) -> None:
        """dW += dzᵀ h of the slab."""
        if self.slab is not None and self.filled and self.needs.head:
            dz_SV, hidden_SH = (part[: self.filled] for part in self.slab)
            self._add_to_head(dz_SV, hidden_SH)
        self.filled = 0

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dW, which of its rows hold something, db), as in `Grads`; dW and db are None where no row was live."""
        self._flush()
        self.slab = None
        self.products.clear()
        return self.head_VH, self.first_V, self.bias_V
