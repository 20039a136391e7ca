"""LUFFY (arXiv 2504.14945): one demonstration joins each group, and is learnt through the shaped ratio p / (p + gamma).

Loss = 1 / (P (G + 1) L) times the sum over problems and tokens of -A rho (rollouts) and -A p / (p + gamma) (the
demonstration), with A = R - mean over the G rollouts and the demonstration, which counts as correct; no clip; the
constant L = max_new_tokens in place of each length. The entropy bonus is the loss's, over live rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sgpo.algorithm.advantages import group_advantages
from sgpo.algorithm.grpo import weighted_sequences
from sgpo.algorithm.method import ProblemStep, Scorer, check_completions
from sgpo.types import ScoredGroup, TrainSequence


def luffy_sequences(
    groups: Sequence[ScoredGroup],
    *,
    problems: int,
    score: Scorer,
    total: Callable[[float], float],
    max_new_tokens: int,
    normalize_std: bool = False,
) -> list[ProblemStep]:
    """The demonstration's `distill_weight` holds A x weight; nothing is learnt where all rollouts are correct too."""
    check_completions(groups)
    steps = []
    for group in groups:
        weight = 1.0 / (problems * (len(group.auto) + 1) * max_new_tokens)
        rewards = torch.tensor([*group.auto_rewards, 1.0], dtype=torch.float64)
        *advantages, of_demo = group_advantages(rewards, normalize_std=normalize_std).tolist()
        sequences = weighted_sequences(group, advantages, lambda _, weight=weight: weight)
        if of_demo:
            sequences.append(TrainSequence(group.prompts.plain, group.demo_ids, distill_weight=of_demo * weight))
        steps.append(ProblemStep(group, sequences))
    return steps
