"""Truncated importance weights: policy gradients from a sampler that is not quite the trainer's policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal


def truncated_importance(
    policy_logprobs: Sequence[float],
    rollout_logprobs: Sequence[float],
    *,
    cap: float,
    level: Literal["token", "sequence"] = "token",
) -> list[float]:
    """min(pi / mu, cap) of every token of one completion, pi the trainer's policy and mu what was sampled from.

    Args:
        policy_logprobs, rollout_logprobs: of the same tokens, in nats; mu is after temperature and top-p.
        level: "token" takes each token's own ratio, "sequence" that of the whole completion for all of its tokens.
    """
    gaps = [policy - rollout for policy, rollout in zip(policy_logprobs, rollout_logprobs, strict=True)]
    if level == "sequence":
        gaps = [sum(gaps)] * len(gaps)
    return [min(math.exp(min(gap, 50.0)), cap) for gap in gaps]


def gap_statistics(policy_logprobs: Sequence[float], rollout_logprobs: Sequence[float]) -> tuple[float, float, float]:
    """(sum of |gap|, largest |gap|, sum of the k3 estimates of KL(mu || pi)) over tokens, gap = log pi - log mu."""
    gaps = [policy - rollout for policy, rollout in zip(policy_logprobs, rollout_logprobs, strict=True)]
    k3 = sum(math.expm1(min(gap, 50.0)) - gap for gap in gaps)
    return sum(abs(gap) for gap in gaps), max((abs(gap) for gap in gaps), default=0.0), k3
