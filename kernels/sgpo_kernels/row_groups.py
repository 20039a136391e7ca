"""The three kinds of rows that the chunk loop knows, each with its step from statistics to row values.

What: `ScoreRows` (log-prob and entropy), `PolicyRows` (clipped surrogate) and `DivergenceRows` (student against
  teacher). A group says which of its rows are live, how large their gradients are, and turns a chunk's products into
  row values and the table that dz is computed from.
Equation, source, gradient: see logprob.py, policy_loss.py and divergence.py; the arithmetic is that of `Backend`.
Memory: values [VALUE_ROWS, N] per group in the accumulation dtype.
Precision: values and per-row constants are float32 (float64 for float64 inputs).
Limits: on an accelerator finding the live rows is one host sync per group. While a CUDA graph is captured the host
  must not wait: then every row goes through the head, and those that do not count with zeros in place of their inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sgpo_kernels import checks, sizes
from sgpo_kernels.backend import LABEL_LOGIT, SIZE_SUM, VALUE_ROWS, Backend, Logits
from sgpo_kernels.head import Head, Shard, capturing
from sgpo_kernels.inputs import DistillInputs, PolicyInputs


@dataclass(frozen=True)
class Chunk:
    """The rows of one step of the loop, `rows_C` of their group, with the products of both contexts. `labels_C`:
    columns of this shard, -1 for none; `factor_C`: what a row gradient is multiplied by (None: none is wanted)."""

    backend: Backend
    shard: Shard
    rows_C: Tensor
    student: Logits
    teacher: Logits | None
    labels_C: Tensor | None
    factor_C: Tensor | None


class RowGroup:
    """Rows of one kind, hidden [N, H]. `index` int64 [live] names the rows that count, `values` [VALUE_ROWS, N] takes
    the results; `labels` are token ids, under the name that the public op has for them."""

    kind = "score"
    with_entropy = False  # dz has an entropy part (upstream gradients of linear_logprob)
    old_logprobs: Tensor | None = None  # [N], of the sampling policy
    live: Tensor | None = None  # bool [N], where some rows do not count

    def __init__(
        self,
        hidden: Tensor,
        index: Tensor,
        temperature: float | Tensor,
        labels: Tensor | None = None,
        labels_name: str = "targets",
    ):
        acc = sizes.accumulate_dtype(hidden.dtype)
        self.hidden, self.index, self.labels, self.labels_name = hidden, index, labels, labels_name
        self.values = torch.zeros(VALUE_ROWS, hidden.shape[0], dtype=acc, device=hidden.device)
        if isinstance(temperature, Tensor):
            self.inv_temperature: Tensor | None = temperature.to(acc).reciprocal()
        else:
            same = temperature == 1.0
            self.inv_temperature = None if same else self.values.new_full((hidden.shape[0],), 1.0 / temperature)

    def teacher(self, head: Head) -> tuple[Tensor, Head] | None:
        """(hidden states, head) of the same rows' other context, where there is one."""
        return None

    def weights(self) -> Tensor:
        """The size of the row gradients, [live], any sign."""
        raise NotImplementedError

    def row_values(self, chunk: Chunk) -> Tensor:
        """Writes the values of the chunk's rows and returns the chunk's table [TABLE_ROWS, C]."""
        raise NotImplementedError

    def _statistics(self, chunk: Chunk) -> Tensor:
        """The student's statistics from all shards, [ranks, STAT_ROWS, C]."""
        parts_R4C = chunk.shard.gather(chunk.backend.scan(chunk.student, chunk.labels_C))
        if chunk.shard.group_name is not None:
            checks.check_found_labels(parts_R4C[:, LABEL_LOGIT].amax(0), self.labels_name)
        return parts_R4C


class ScoreRows(RowGroup):
    """Every row, values only; with `slopes`, the upstream gradients [N] of log-prob and entropy (in backward), the
    rows where one of the two is not 0."""

    with_entropy = True

    def __init__(
        self,
        hidden: Tensor,
        labels: Tensor,
        temperature: float | Tensor,
        slopes: tuple[Tensor, Tensor] | None = None,
    ):
        if slopes is None:
            index = torch.arange(hidden.shape[0], device=hidden.device)
        else:
            self.live = (slopes[0] != 0) | (slopes[1] != 0)
            index = live_index(self.live)
            hidden, labels = without_dead_rows(hidden, self.live), without_dead_rows(labels, self.live)
        super().__init__(hidden, index, temperature, labels)
        self.slopes = slopes

    def weights(self) -> Tensor:
        """The larger of the two upstream gradients of each row."""
        assert self.slopes is not None
        return torch.maximum(self.slopes[0].abs(), self.slopes[1].abs())[self.index]

    def row_values(self, chunk: Chunk) -> Tensor:
        """Log-prob and entropy, or the table for the upstream gradients."""
        assert chunk.labels_C is not None
        parts, rank = self._statistics(chunk), chunk.shard.rank
        return chunk.backend.score_row_values(
            parts, rank, chunk.labels_C, self.slopes, chunk.rows_C, chunk.factor_C, self.values
        )


class PolicyRows(RowGroup):
    """Policy rows; live are those whose weight and advantage are not 0."""

    def __init__(self, inputs: PolicyInputs, temperature: float | Tensor, labels_name: str):
        assert inputs.token_weight is not None
        self.live = (inputs.advantages != 0) & (inputs.token_weight != 0)
        index = live_index(self.live)
        hidden, labels, advantages, weight = (
            without_dead_rows(x, self.live)
            for x in (inputs.hidden, inputs.labels, inputs.advantages, inputs.token_weight)
        )
        super().__init__(hidden, index, temperature, labels, labels_name)
        acc = self.values.dtype
        self.advantages, self.token_weight = advantages.to(acc), weight.to(acc)
        if inputs.old_logprobs is not None:
            self.old_logprobs = without_dead_rows(inputs.old_logprobs, self.live).to(acc)
        self.clip_range = inputs.clip_range

    def weights(self) -> Tensor:
        """Advantage times weight."""
        return (self.advantages * self.token_weight)[self.index]

    def row_values(self, chunk: Chunk) -> Tensor:
        """Ratio, clips and loss."""
        assert chunk.labels_C is not None
        return chunk.backend.policy_row_values(
            self._statistics(chunk),
            chunk.shard.rank,
            chunk.labels_C,
            self.old_logprobs,
            self.advantages,
            self.token_weight,
            self.clip_range,
            chunk.rows_C,
            chunk.factor_C,
            self.values,
        )


class DivergenceRows(RowGroup):
    """Distillation rows; live are those whose weight is not 0."""

    def __init__(self, inputs: DistillInputs, temperature: float | Tensor):
        assert inputs.token_weight is not None
        self.live = inputs.token_weight != 0
        index = live_index(self.live)
        hidden, teacher = (without_dead_rows(x, self.live) for x in (inputs.hidden, inputs.teacher_hidden))
        super().__init__(hidden, index, temperature)
        self.inputs = inputs._replace(teacher_hidden=teacher)
        self.token_weight = inputs.token_weight.to(self.values.dtype)
        self.kind = inputs.kl_limit.kind
        self._teacher: tuple[Tensor, Head] | None = None

    def teacher(self, head: Head) -> tuple[Tensor, Head]:
        """The teacher's states with its own head, or with the student's (and, where it has one, its own bias)."""
        if self._teacher is None:
            teacher_head, bias = self.inputs.teacher_head, self.inputs.teacher_bias
            if teacher_head is not None:
                head = Head.of(teacher_head, bias)
            elif bias is not None:
                head = head.with_bias(bias)
            self._teacher = self.inputs.teacher_hidden, head
        return self._teacher

    def weights(self) -> Tensor:
        """The row weights."""
        return self.token_weight[self.index]

    def row_values(self, chunk: Chunk) -> Tensor:
        """Divergence, limit and loss."""
        backend, shard = chunk.backend, chunk.shard
        assert chunk.teacher is not None
        parts = shard.gather(torch.cat([backend.scan(chunk.student, None), backend.scan(chunk.teacher, None)]))
        table = backend.pair_row_values(parts, shard.rank, chunk.rows_C, self.values)
        sums_3C = backend.divergence_sums(self.kind, chunk.student, chunk.teacher, table)
        # SIZE_SUM, the last, bounds what this shard drops, and stays with it.
        shard.sum_(sums_3C[:SIZE_SUM])
        backend.divergence_row_values(
            sums_3C, self.token_weight, self.inputs.kl_limit, chunk.rows_C, chunk.factor_C, self.values, table
        )
        return table


def live_index(live: Tensor) -> Tensor:
    """Positions of the rows that count, int64 [live], from a bool mask; of all rows while a CUDA graph is captured. A
    host sync on an accelerator otherwise."""
    if capturing(live):
        return torch.arange(len(live), device=live.device)
    return live.nonzero().squeeze(1)


def without_dead_rows(values: Tensor, live: Tensor) -> Tensor:
    """[N, ...] with zeros in rows that do not count, where `live_index` names them nevertheless."""
    return values.where(live.view(-1, *[1] * (values.dim() - 1)), 0) if capturing(live) else values
