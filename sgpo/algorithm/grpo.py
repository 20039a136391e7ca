"""GRPO: the autonomous completions with their group-relative advantages (Eq. 1). No guided rollout enters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sgpo.algorithm.advantages import group_advantages
from sgpo.algorithm.weights import policy_token_weight
from sgpo.types import ScoredGroup, TrainSequence


def policy_sequences(group: ScoredGroup, *, problems: int, normalize_std: bool = True) -> list[TrainSequence]:
    """One sequence per autonomous rollout; empty where all rewards are equal, for nothing would be learnt.

    `problems` is the number of problems that the optimizer step averages over, on all ranks.
    """
    rewards = torch.tensor(group.auto_rewards, dtype=torch.float64)
    advantages = group_advantages(rewards, normalize_std=normalize_std).tolist()
    size = len(group.auto)
    return weighted_sequences(
        group, advantages, lambda length: policy_token_weight(problems=problems, group_size=size, length=length)
    )


def weighted_sequences(
    group: ScoredGroup, advantages: Sequence[float], token_weight: Callable[[int], float]
) -> list[TrainSequence]:
    """The autonomous rollouts whose advantage is not 0; `token_weight` maps a completion's length to its weight."""
    return [
        TrainSequence(
            prompt_ids=rollout.request.prompt_ids,
            completion_ids=rollout.completion_ids,
            advantage=advantage,
            policy_weight=token_weight(len(rollout.completion_ids)),
            rollout_logprobs=rollout.rollout_logprobs,
        )
        for rollout, advantage in zip(group.auto, advantages, strict=True)
        if advantage != 0.0
    ]
