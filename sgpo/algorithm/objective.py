"""The loss of a micro-batch (Eq. 7): clipped policy loss on autonomous rows, distillation or imitation of targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from sgpo_kernels import DivergenceStats, PolicyStats, linear_logprob, linear_policy_loss, sgpo_loss


@dataclass(frozen=True, slots=True)
class ObjectiveStats:
    """Without gradient: row statistics (`divergence` None where nothing is distilled) and both parts of the loss."""

    policy: PolicyStats
    divergence: DivergenceStats | None
    policy_loss: torch.Tensor
    target_loss: torch.Tensor


def sgpo_objective(
    head: torch.Tensor,
    bias: torch.Tensor | None,
    hidden: torch.Tensor,
    teacher_hidden: torch.Tensor | None,
    *,
    targets: torch.Tensor,
    advantages: torch.Tensor,
    policy_weight: torch.Tensor,
    old_logprobs: torch.Tensor | None,
    target_weight: torch.Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    distillation: Literal["forward_kl", "reverse_kl", "js", "sft", "none"] = "forward_kl",
    max_token_kl: float | None = 1.0,
    over_limit: Literal["mask", "clamp", "scale"] = "mask",
    temperature: float = 1.0,
    column_tolerance: float = 0.0,
    impl: Literal["auto", "triton", "torch"] = "auto",
) -> tuple[torch.Tensor, ObjectiveStats]:
    """Sum over rows of weight x loss.

    Args:
        head, bias: output weight [V, H] and optional bias [V].
        hidden: [N_p + N_t, H], policy rows first; teacher_hidden: [N_t, H] of the guided context, or None.
        targets: int64 [N_p + N_t], the token that each row predicts.
        advantages, policy_weight, old_logprobs: fp32 [N_p]; old_logprobs None means a ratio of exactly 1.
        target_weight: fp32 [N_t].
        distillation: divergence of the target rows; "sft" takes their negative log-likelihood instead (ablation).
        column_tolerance, impl: as in `sgpo_kernels.sgpo_loss`; 0 is exact (imitation always is).

    Returns:
        scalar fp32 loss, and row statistics.
    """
    split = len(advantages)
    clips = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}
    policy = {"old_logprobs": old_logprobs, "advantages": advantages, **clips, "temperature": temperature}
    policy |= {"column_tolerance": column_tolerance, "impl": impl}
    if teacher_hidden is not None and distillation != "sft" and distillation != "none":
        loss, stats = sgpo_loss(
            hidden[:split],
            targets[:split],
            hidden[split:],
            teacher_hidden,
            head,
            policy_weight=policy_weight,
            distill_weight=target_weight,
            kind=distillation,
            max_token_kl=max_token_kl,
            over_limit=over_limit,
            bias=bias,
            **policy,
        )
        return loss, ObjectiveStats(stats.policy, stats.divergence, stats.policy_loss, stats.distill_loss)
    if distillation != "sft" and len(hidden) > split:
        raise ValueError(f"{len(hidden) - split} target rows without teacher_hidden: pass it, or distillation='sft'")
    policy_loss, stats = linear_policy_loss(
        hidden[:split], head, targets[:split], token_weight=policy_weight, bias=bias, **policy
    )
    target_loss, _ = imitation_objective(head, bias, hidden[split:], targets[split:], target_weight, temperature, impl)
    return policy_loss + target_loss, ObjectiveStats(stats, None, policy_loss.detach(), target_loss.detach())


def imitation_objective(
    head: torch.Tensor,
    bias: torch.Tensor | None,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor,
    temperature: float = 1.0,
    impl: Literal["auto", "triton", "torch"] = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted negative log-likelihood of given tokens: (sum of weight x nll, nll [N] without gradient)."""
    logprobs, _ = linear_logprob(hidden, head, targets, temperature=temperature, bias=bias, impl=impl)
    return -(weight * logprobs).sum(), -logprobs.detach()
