"""HPT (arXiv 2509.04419): per problem SFT on its demonstration, where at most `gate` rollouts are correct, or else RL.

SFT: mean over the demonstration's tokens of -log p. RL: -A rho, A = R - mean, no clip, summed and divided by G L with
the constant L = max_new_tokens. Both are averaged over the problems of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sgpo.algorithm.advantages import group_advantages
from sgpo.algorithm.grpo import weighted_sequences
from sgpo.algorithm.method import ProblemStep, Scorer, check_completions
from sgpo.algorithm.weights import distill_token_weight
from sgpo.types import ScoredGroup, TrainSequence


def hpt_sequences(
    groups: Sequence[ScoredGroup],
    *,
    problems: int,
    score: Scorer,
    total: Callable[[float], float],
    max_new_tokens: int,
    gate: int = 0,
    normalize_std: bool = False,
) -> list[ProblemStep]:
    """Per problem its demonstration or its rollouts, as the gate decides; see the head of the file."""
    check_completions(groups)
    steps = []
    for group in groups:
        if sum(group.auto_correct) <= gate:
            weight = distill_token_weight(alpha=1.0, problems=problems, completions=1, length=len(group.demo_ids))
            demo = TrainSequence(group.prompts.plain, group.demo_ids, distill_weight=weight)
            steps.append(ProblemStep(group, [demo]))
            continue
        weight = 1.0 / (problems * len(group.auto) * max_new_tokens)
        rewards = torch.tensor(group.auto_rewards, dtype=torch.float64)
        advantages = group_advantages(rewards, normalize_std=normalize_std).tolist()
        steps.append(ProblemStep(group, weighted_sequences(group, advantages, lambda _, weight=weight: weight)))
    return steps
