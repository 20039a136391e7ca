"""Group-relative advantages (Eq. 1)."""

from __future__ import annotations

import torch


def group_advantages(rewards: torch.Tensor, *, normalize_std: bool = True, eps: float = 1e-6) -> torch.Tensor:
    """A_i = (R_i - mean) / (std + eps) within each group.

    Args:
        rewards: [..., G] raw rewards.
        normalize_std: False leaves out the division (Dr.GRPO). The standard deviation is the sample's (G - 1).

    Returns:
        fp64 [..., G]; exactly 0 in a group of equal rewards, so that its rows are known to carry no gradient.
    """
    rewards = rewards.double()
    centred = rewards - rewards.mean(-1, keepdim=True)
    if normalize_std and rewards.shape[-1] > 1:
        centred = centred / (rewards.std(-1, keepdim=True) + eps)
    equal = (rewards == rewards[..., :1]).all(-1, keepdim=True)
    return centred.masked_fill(equal, 0.0)
