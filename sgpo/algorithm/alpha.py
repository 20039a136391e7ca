"""alpha(q), how strongly a problem is distilled (Eq. 6), and its ablations. Returned with its value before the cap."""

from __future__ import annotations

import torch

from sgpo.algorithm.advantages import group_advantages


def adaptive_alpha(
    p_auto: float, p_guided: float, *, alpha_0: float = 0.5, gamma: float = 0.1, alpha_max: float = 0.8
) -> tuple[float, float]:
    """Eq. 6: alpha_0 (p_guided - p_auto + gamma) / (p_auto + gamma), clipped to [0, alpha_max].

    p_auto and p_guided are the pass rates of the two groups, in [0, 1].
    """
    uncapped = alpha_0 * (p_guided - p_auto + gamma) / (p_auto + gamma)
    return min(max(uncapped, 0.0), alpha_max), uncapped


def group_advantage_alpha(
    auto_rewards: torch.Tensor, target_reward: float, *, alpha_max: float = 0.8, eps: float = 1e-6
) -> tuple[float, float]:
    """Ablation: the advantage of o+ in the group of autonomous rewards [G1] and its own, clipped to [0, alpha_max]."""
    group = torch.cat([auto_rewards.double(), torch.tensor([target_reward], dtype=torch.float64)])
    uncapped = float(group_advantages(group, eps=eps)[-1])
    return min(max(uncapped, 0.0), alpha_max), uncapped
