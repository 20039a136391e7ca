"""Full-vocabulary divergence between two contexts of one model (or of two), per token, with the hard mask of SGPO.

What: distillation rows: the same completion token under the plain prompt (student) and the guided prompt (teacher).
Equation: loss = sum_n w_n limit(d_n); forward_kl d = KL(p_T || p_S), reverse_kl d = KL(p_S || p_T), js d = (KL(p_S ||
  m) + KL(p_T || m)) / 2, m = (p_S + p_T) / 2; both sides z = (h Wᵀ + b) / temperature, no factor temperature². Where d
  > max_token_kl = delta: mask -> value and gradient 0; clamp -> value delta, gradient 0; scale -> value and gradient
  times the constant delta / d.
Source: arXiv 2606.24064 Eq. 3 (forward KL), Eq. 5 (mask; w_n = alpha / (P |o+|)); reverse KL is its ablation.
Gradient: by the student's logits only: p_S - p_T (forward), p_S (u - d) (reverse), p_S (a - sum p_S a) (js), see
  rowmath. Formed in forward; nothing flows to the teacher's states, head or bias.
Memory: 9·C·V·a + V·H·(a + 2s) + 2·N·H·s (`launch.extra_bytes("divergence", ...)`), + V·H·a for a separate half teacher
  head on the CPU. Saved: dH [N, H], dW [V, H], db [V] in the input dtype.
Precision: float32 logits and dz (float64 for float64 inputs); sums of terms >= 0, so equal states give exactly 0 and a
  zero gradient.
Limits: finite logits; first derivatives only; on an accelerator one host sync (the count of live rows); masked rows
  still pay their products.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sgpo_kernels import contracts, launch
from sgpo_kernels.linear_rows import Chunk, Projection, live_index, weighted_loss
from sgpo_kernels.rowmath import DIVERGENCES, entropy, log_softmax_

Kind = Literal["forward_kl", "reverse_kl", "js"]
OverLimit = Literal["mask", "clamp", "scale"]


class DivergenceStats(NamedTuple):
    """Per row, no gradient, in nats; rows of weight 0 hold zeros. `divergence` is the value before the limit."""

    divergence: Tensor
    over_limit: Tensor
    live: Tensor
    entropy: Tensor
    teacher_entropy: Tensor


def linear_divergence(
    hidden: Tensor,
    teacher_hidden: Tensor,
    head: Tensor,
    *,
    token_weight: Tensor,
    kind: Kind = "forward_kl",
    max_token_kl: float | None = None,
    over_limit: OverLimit = "mask",
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    teacher_head: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    impl: launch.Impl = "auto",
    chunk_rows: int | None = None,
) -> tuple[Tensor, DivergenceStats]:
    """Weighted sum of the limited per-token divergence over the rows.

    Args:
        hidden: [N, H] float16, bfloat16, float32 or float64. head: [V, H], same dtype. bias: [V] or None.
        teacher_hidden: [N, H] of the same positions; [N, H_T] with a `teacher_head` [V, H_T]. No gradient.
        token_weight: float32 [N]; a row at 0 is dropped before any product.
        max_token_kl: delta > 0, or None for no limit. over_limit: what happens to a row beyond it.
        temperature: a float > 0, or float32 [N], for both sides.
        teacher_head, teacher_bias: None means the student's, detached; a teacher_head goes with teacher_bias alone.
        chunk_rows: rows per chunk, None for the default of `launch`.

    Returns: (loss, DivergenceStats): loss 0-d float32 (float64 for float64 inputs), differentiable in hidden, head
    and bias.

    Raises: TypeError (dtype), ValueError (shape, device, value), NotImplementedError (impl="triton").
    """
    contracts.check_head(hidden, head, bias)
    contracts.check_temperature(temperature, hidden.shape[0], hidden)
    contracts.check_chunk_rows(chunk_rows)
    launch.resolve_impl(impl)
    rows = DivergenceRows(
        hidden,
        teacher_hidden,
        head,
        token_weight,
        DivergenceRule(kind, max_token_kl, over_limit),
        temperature,
        teacher_head,
        teacher_bias,
    )
    return weighted_loss([rows], head, bias, chunk_rows), rows.stats()


class DivergenceRule(NamedTuple):
    kind: str
    max_token_kl: float | None
    over_limit: str


def limited(divergence: Tensor, rule: DivergenceRule) -> tuple[Tensor, Tensor, Tensor]:
    """(value, gradient factor, over the limit) per row."""
    if rule.max_token_kl is None:
        return divergence, torch.ones_like(divergence), torch.zeros_like(divergence, dtype=torch.bool)
    over = divergence > rule.max_token_kl
    value_over = 0.0 if rule.over_limit == "mask" else rule.max_token_kl
    factor_over = rule.max_token_kl / divergence if rule.over_limit == "scale" else torch.zeros_like(divergence)
    return torch.where(over, value_over, divergence), torch.where(over, factor_over, 1.0), over


class DivergenceRows:
    """The distillation rows of one call: constants, row results, and what a chunk of logits turns into."""

    def __init__(
        self,
        hidden: Tensor,
        teacher_hidden: Tensor,
        head: Tensor,
        token_weight: Tensor,
        rule: DivergenceRule,
        temperature: float | Tensor,
        teacher_head: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ):
        contracts.check_teacher(hidden, teacher_hidden, head, teacher_head, teacher_bias)
        contracts.check_row_values("token_weight", token_weight, hidden)
        contracts.check_divergence(*rule)
        self.hidden, self.teacher_hidden = hidden, teacher_hidden
        self.teacher_head, self.teacher_bias = teacher_head, teacher_bias
        self.rule, self.temperature = rule, temperature
        self.token_weight = token_weight.to(launch.accumulate_dtype(hidden.dtype))
        self.live = token_weight != 0
        self.index = live_index(self.live)
        self.row_loss, self.divergence, self.entropy, self.teacher_entropy = (
            torch.zeros_like(self.token_weight) for _ in range(4)
        )
        self.over_limit = torch.zeros_like(self.live)
        self._teacher: Projection | None = None

    def weights(self) -> Tensor:
        return self.token_weight[self.index]

    def step(self, chunk: Chunk, logits_CV: Tensor) -> Tensor | None:
        rows = chunk.rows
        # A product of its own, of the student's shape: equal states then give bitwise equal logits, and exactly 0.
        teacher_CV = self._teacher_projection(chunk.projection).logits(self.teacher_hidden[rows], chunk.temperature)
        probs_CV, teacher_probs_CV = log_softmax_(logits_CV), log_softmax_(teacher_CV)
        self.entropy[rows] = entropy(logits_CV, probs_CV)
        self.teacher_entropy[rows] = entropy(teacher_CV, teacher_probs_CV)
        divergence, dz_CV = DIVERGENCES[self.rule.kind](logits_CV, probs_CV, teacher_CV, teacher_probs_CV)
        value, factor, over = limited(divergence, self.rule)
        self.divergence[rows], self.over_limit[rows] = divergence, over
        self.row_loss[rows] = value * self.token_weight[rows]
        if chunk.grad_factor is None:
            return None
        return dz_CV.mul_((factor * self.token_weight[rows] * chunk.grad_factor).unsqueeze(1))

    def _teacher_projection(self, student: Projection) -> Projection:
        if self._teacher is None:
            if self.teacher_head is not None:
                self._teacher = Projection.of(self.teacher_head, self.teacher_bias)
            elif self.teacher_bias is not None:
                self._teacher = dataclasses.replace(
                    student, bias_V=self.teacher_bias.detach().to(self.token_weight.dtype)
                )
            else:
                self._teacher = student
        return self._teacher

    def loss(self) -> Tensor:
        return self.row_loss.sum()

    def stats(self) -> DivergenceStats:
        return DivergenceStats(self.divergence, self.over_limit, self.live, self.entropy, self.teacher_entropy)
