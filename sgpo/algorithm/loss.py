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
    clip_low: float | None,
    clip_high: float | None,
    dual_clip: float | None = None,
    entropy_coef: float = 0.0,
    distillation: Literal["forward_kl", "reverse_kl", "js", "sft", "none"] = "forward_kl",
    max_token_kl: float | None = 1.0,
    over_limit: Literal["mask", "clamp", "scale"] = "mask",
    demo_shaping: float | None = None,
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
        entropy_coef: bonus on the policy rows, weight x entropy of their distribution.
        distillation: divergence of the target rows; "sft" takes their negative log-likelihood instead (ablation).
        demo_shaping: with "sft", as in `imitation_objective`.
        column_tolerance, impl: as in `sgpo_kernels.sgpo_loss`; 0 is exact (imitation always is).

    Returns:
        scalar fp32 loss, and row statistics.
    """
    split = len(advantages)
    rows = {"temperature": temperature, "bias": bias, "impl": impl}
    clips = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}
    policy = {"old_logprobs": old_logprobs, "advantages": advantages, **clips, "column_tolerance": column_tolerance}
    if teacher_hidden is not None and distillation != "sft" and distillation != "none":
        loss, fused = sgpo_loss(
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
            **policy,
            **rows,
        )
        stats = ObjectiveStats(fused.policy, fused.divergence, fused.policy_loss, fused.distill_loss)
    elif distillation != "sft" and len(hidden) > split:
        raise ValueError(f"{len(hidden) - split} target rows without teacher_hidden: pass it, or distillation='sft'")
    else:
        policy_loss, of_policy = linear_policy_loss(
            hidden[:split], head, targets[:split], token_weight=policy_weight, **policy, **rows
        )
        target_loss, _ = imitation_objective(
            head, bias, hidden[split:], targets[split:], target_weight, temperature, impl, demo_shaping
        )
        loss = policy_loss + target_loss
        stats = ObjectiveStats(of_policy, None, policy_loss.detach(), target_loss.detach())
    if entropy_coef:
        _, entropy = linear_logprob(hidden[:split], head, targets[:split], **rows)
        loss = loss - entropy_coef * (policy_weight * entropy).sum()
    return loss, stats


def imitation_objective(
    head: torch.Tensor,
    bias: torch.Tensor | None,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor,
    temperature: float = 1.0,
    impl: Literal["auto", "triton", "torch"] = "auto",
    shaping: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted negative log-likelihood of given tokens: (sum of weight x nll, nll [N] without gradient).

    With `shaping` gamma the row loss is -p / (p + gamma) in place of -log p, p = pi(token) (LUFFY's policy shaping).
    """
    logprobs, _ = linear_logprob(hidden, head, targets, temperature=temperature, bias=bias, impl=impl)
    gain = logprobs if shaping is None else logprobs.exp() / (logprobs.exp() + shaping)
    return -(weight * gain).sum(), -logprobs.detach()
