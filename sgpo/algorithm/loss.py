"""The loss of a micro-batch (Eq. 7): clipped policy loss on autonomous rows, distillation or imitation on the others.

A method is its training sequences and its `LossSettings`; `SgpoLoss(settings)` is the loss itself, an object that can
be named, printed and stepped into. It is called where the model holds its head (sgpo.model.policy.LossHead).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from sgpo_kernels import DivergenceStats, PolicyStats, linear_logprob, linear_policy_loss, sgpo_loss


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """What a model makes of the products x = h Wᵀ + b of its head: logits = cap tanh(scale x / cap), or scale x."""

    scale: float = 1.0
    softcap: float | None = None

    def options(self, temperature: float) -> dict[str, Any]:
        """The kernels' arguments for the softmax of logits / temperature. They bend first and divide then:
        cap tanh(scale x / cap) / T = c tanh(x / c) / t with c = cap / scale and t = T / scale."""
        cap = None if self.softcap is None else self.softcap / self.scale
        return {"temperature": temperature / self.scale, "logit_softcap": cap}


PLAIN = LogitTransform()


@dataclass(frozen=True, slots=True)
class LossSettings:
    """Every number and switch of the loss. None is off.

    Args:
        clip_low, clip_high: the ratio stays within [1 - clip_low, 1 + clip_high].
        dual_clip: bound of the policy loss where the advantage is negative, in multiples of it.
        entropy_coef: bonus on the policy rows, weight x entropy of their distribution.
        distillation: divergence of the distilled rows from the teacher; "sft": their negative log-likelihood instead,
            without a teacher; None: there are no such rows.
        max_token_kl: delta of Eq. 5 in nats; a row of a larger divergence is dropped ("mask"), held at the limit
            without gradient ("clamp") or scaled to it ("scale"), by over_limit.
        demo_shaping: with "sft": gamma of LUFFY's loss -p / (p + gamma) in place of -log p, p = pi(token).
        temperature: of the softmax, as in sampling.
        column_tolerance, impl: as in `sgpo_kernels.sgpo_loss`; 0 is exact (imitation always is).
    """

    clip_low: float | None
    clip_high: float | None
    dual_clip: float | None = None
    entropy_coef: float | None = None
    distillation: Literal["forward_kl", "reverse_kl", "js", "sft"] | None = "forward_kl"
    max_token_kl: float | None = 1.0
    over_limit: Literal["mask", "clamp", "scale"] = "mask"
    demo_shaping: float | None = None
    temperature: float = 1.0
    column_tolerance: float = 0.0
    impl: Literal["auto", "triton", "triton-nologits", "torch"] = "auto"


class LossRows(Protocol):
    """What the loss reads of a micro-batch: policy rows first (N_p), then those distilled or imitated (N_t)."""

    @property
    def labels(self) -> torch.Tensor:
        """int64 [N_p + N_t]: the token that each row predicts."""
        ...

    @property
    def advantages(self) -> torch.Tensor:
        """fp32 [N_p]."""
        ...

    @property
    def policy_weight(self) -> torch.Tensor:
        """fp32 [N_p], final: no later division."""
        ...

    @property
    def old_logprobs(self) -> torch.Tensor | None:
        """fp32 [N_p]; None means a ratio of exactly 1."""
        ...

    @property
    def distill_weight(self) -> torch.Tensor:
        """fp32 [N_t], final: no later division."""
        ...


class LossStats(NamedTuple):
    """Without gradient: row statistics (`divergence` None where nothing is distilled) and both parts of the loss."""

    policy: PolicyStats
    divergence: DivergenceStats | None
    policy_loss: torch.Tensor
    distill_loss: torch.Tensor


@dataclass(frozen=True, slots=True)
class SgpoLoss:
    """The sum over the rows of a micro-batch of weight x row loss, by `settings`."""

    settings: LossSettings

    def __call__(
        self,
        head: torch.Tensor,
        bias: torch.Tensor | None,
        hidden: torch.Tensor,
        teacher_hidden: torch.Tensor | None,
        rows: LossRows,
        *,
        logits: LogitTransform = PLAIN,
    ) -> tuple[torch.Tensor, LossStats]:
        """
        Args:
            head, bias: output weight [V, H] and optional bias [V].
            hidden: [N_p + N_t, H], in the order of `rows`.
            teacher_hidden: [N_t, H] of the same completions after the guided prompt; None: nothing is distilled.
            logits: what the model makes of the head's products, in both contexts.

        Returns: scalar fp32 loss, and row statistics.

        Raises ValueError where rows to distil have no teacher.
        """
        chosen, split = self.settings, len(rows.advantages)
        policy_hidden, policy_labels = hidden[:split], rows.labels[:split]
        if teacher_hidden is not None and chosen.distillation is not None and chosen.distillation != "sft":
            loss, fused = sgpo_loss(
                policy_hidden,
                policy_labels,
                hidden[split:],
                teacher_hidden,
                head,
                old_logprobs=rows.old_logprobs,
                advantages=rows.advantages,
                policy_weight=rows.policy_weight,
                distill_weight=rows.distill_weight,
                clip_low=chosen.clip_low,
                clip_high=chosen.clip_high,
                dual_clip=chosen.dual_clip,
                kind=chosen.distillation,
                max_token_kl=chosen.max_token_kl,
                over_limit=chosen.over_limit,
                bias=bias,
                column_tolerance=chosen.column_tolerance,
                impl=chosen.impl,
                **logits.options(chosen.temperature),
            )
            stats = LossStats(fused.policy, fused.divergence, fused.policy_loss, fused.distill_loss)
        else:
            loss, stats = self._without_teacher(head, bias, hidden, rows, logits)
        if chosen.entropy_coef is not None:
            options = logits.options(chosen.temperature)
            _, entropy = linear_logprob(policy_hidden, head, policy_labels, bias=bias, impl=chosen.impl, **options)
            loss = loss - chosen.entropy_coef * (rows.policy_weight * entropy).sum()
        return loss, stats

    def _without_teacher(
        self,
        head: torch.Tensor,
        bias: torch.Tensor | None,
        hidden: torch.Tensor,
        rows: LossRows,
        logits: LogitTransform,
    ) -> tuple[torch.Tensor, LossStats]:
        """Policy loss, and imitation of the rows behind the policy's."""
        chosen, split = self.settings, len(rows.advantages)
        if chosen.distillation != "sft" and len(hidden) > split:
            raise ValueError(f"{len(hidden) - split} rows to distil without teacher_hidden: pass it, or use 'sft'")
        policy_loss, policy = linear_policy_loss(
            hidden[:split],
            head,
            rows.labels[:split],
            old_logprobs=rows.old_logprobs,
            advantages=rows.advantages,
            token_weight=rows.policy_weight,
            clip_low=chosen.clip_low,
            clip_high=chosen.clip_high,
            dual_clip=chosen.dual_clip,
            bias=bias,
            column_tolerance=chosen.column_tolerance,
            impl=chosen.impl,
            **logits.options(chosen.temperature),
        )
        imitated, _ = imitation_loss(
            head,
            bias,
            hidden[split:],
            rows.labels[split:],
            rows.distill_weight,
            temperature=chosen.temperature,
            shaping=chosen.demo_shaping,
            logits=logits,
            impl=chosen.impl,
        )
        return policy_loss + imitated, LossStats(policy, None, policy_loss.detach(), imitated.detach())


def imitation_loss(
    head: torch.Tensor,
    bias: torch.Tensor | None,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor,
    *,
    temperature: float = 1.0,
    shaping: float | None = None,
    logits: LogitTransform = PLAIN,
    impl: Literal["auto", "triton", "triton-nologits", "torch"] = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted negative log-likelihood of given tokens: (sum of weight x nll, nll [N] without gradient).

    With `shaping` gamma the row loss is -p / (p + gamma) in place of -log p, p = pi(token) (LUFFY's policy shaping).
    """
    logprobs, _ = linear_logprob(hidden, head, labels, bias=bias, impl=impl, **logits.options(temperature))
    gain = logprobs if shaping is None else logprobs.exp() / (logprobs.exp() + shaping)
    return -(weight * gain).sum(), -logprobs.detach()


@dataclass(frozen=True, slots=True)
class ImitationLoss:
    """The loss of the warm-up: weighted negative log-likelihood of every row's label. Called as SgpoLoss is."""

    temperature: float = 1.0

    def __call__(
        self,
        head: torch.Tensor,
        bias: torch.Tensor | None,
        hidden: torch.Tensor,
        teacher_hidden: torch.Tensor | None,
        rows: LossRows,
        *,
        logits: LogitTransform = PLAIN,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(scalar fp32 loss, negative log-likelihood [N] without gradient)."""
        return imitation_loss(
            head, bias, hidden, rows.labels, rows.distill_weight, temperature=self.temperature, logits=logits
        )


class ScoredRows(Protocol):
    """Rows that are only scored: what `LabelLogprobs` reads."""

    @property
    def labels(self) -> torch.Tensor:
        """int64 [N]: the token that each row predicts."""
        ...


@dataclass(frozen=True, slots=True)
class LabelLogprobs:
    """log pi(label) of every row, a "loss" that only scores: called as SgpoLoss is."""

    temperature: float = 1.0
    impl: Literal["auto", "triton", "triton-nologits", "torch"] = "auto"

    def __call__(
        self,
        head: torch.Tensor,
        bias: torch.Tensor | None,
        hidden: torch.Tensor,
        teacher_hidden: torch.Tensor | None,
        rows: ScoredRows,
        *,
        logits: LogitTransform = PLAIN,
    ) -> torch.Tensor:
        """[N], differentiable in head, bias and hidden."""
        options = logits.options(self.temperature)
        return linear_logprob(hidden, head, rows.labels, bias=bias, impl=self.impl, **options)[0]
