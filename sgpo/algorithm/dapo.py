"""DAPO (arXiv 2503.14476): GRPO with the token mean over the batch, a penalty on overlong answers, and no group to
waste: those that all or none of the rollouts solve are dropped, and `algorithm.refill_rounds` samples others instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sgpo.algorithm.advantages import group_advantages
from sgpo.algorithm.grpo import weighted_sequences
from sgpo.algorithm.method import ProblemStep, Scorer, check_completions
from sgpo.types import Rollout, ScoredGroup


def dapo_sequences(
    groups: Sequence[ScoredGroup],
    *,
    problems: int,
    score: Scorer,
    total: Callable[[float], float],
    max_new_tokens: int,
    overlong_share: float = 0.2,
    normalize_std: bool = True,
) -> list[ProblemStep]:
    """Weight 1 / (tokens of all kept completions) for every token; A over rewards less the overlong penalty."""
    check_completions(groups)
    kept = [group for group in groups if is_informative(group)]
    tokens = total(float(sum(len(rollout.completion_ids) for group in kept for rollout in group.auto)))

    def learnt(group: ScoredGroup) -> ProblemStep:
        if not is_informative(group):
            return ProblemStep(group, [])
        rewards = [
            reward - overlong_penalty(rollout, max_new_tokens=max_new_tokens, share=overlong_share)
            for rollout, reward in zip(group.auto, group.auto_rewards, strict=True)
        ]
        of_group = torch.tensor(rewards, dtype=torch.float64)
        advantages = group_advantages(of_group, normalize_std=normalize_std).tolist()
        return ProblemStep(group, weighted_sequences(group, advantages, lambda _: 1.0 / tokens))

    return [learnt(group) for group in groups]


def is_informative(group: ScoredGroup) -> bool:
    """Some rollouts are correct, but not all."""
    return 0 < sum(group.auto_correct) < len(group.auto)


def overlong_penalty(rollout: Rollout, *, max_new_tokens: int, share: float) -> float:
    """0 up to the last `share` of the length limit, then rising linearly to 1 at the limit (DAPO Eq. 13)."""
    zone = share * max_new_tokens
    over = len(rollout.completion_ids) - (max_new_tokens - zone)
    return min(max(over / zone, 0.0), 1.0) if zone else 0.0
