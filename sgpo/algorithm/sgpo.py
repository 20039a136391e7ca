"""SGPO (Algorithm 1): GRPO on the autonomous rollouts, distillation of the most reachable correct guided one.

Every ablation of the paper is one field of `SgpoSettings`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from sgpo.algorithm.alpha import adaptive_alpha, group_advantage_alpha
from sgpo.algorithm.grpo import policy_sequences
from sgpo.algorithm.method import Guidance, ProblemStep, Scorer
from sgpo.algorithm.selection import most_reachable, selection_score
from sgpo.algorithm.weights import distill_token_weight
from sgpo.types import ScoredGroup, TrainSequence


@dataclass(frozen=True, slots=True)
class SgpoSettings:
    """The switches of the method; the defaults are the paper's."""

    autonomous_grpo: bool = True
    normalize_std: bool = True
    distillation: Literal["forward_kl", "reverse_kl", "js", "sft"] | None = "forward_kl"
    selection: Literal["sum", "mean", "all"] = "sum"
    alpha: Literal["adaptive", "fixed", "group_advantage"] = "adaptive"
    alpha_0: float = 0.5
    alpha_gamma: float = 0.1
    alpha_max: float = 0.8
    alpha_fixed: float = 1.0


def sgpo_sequences(
    groups: Sequence[ScoredGroup],
    settings: SgpoSettings,
    *,
    problems: int,
    score: Scorer,
    total: Callable[[float], float] = float,
) -> list[ProblemStep]:
    """The live training sequences of each group, and the guidance decided for it.

    Args:
        problems: number of problems of the optimizer step over all ranks, the P of Eq. 7.
        score: log-probs under the plain prompt; called exactly once, because under ZeRO-3 it is collective.
        total: not used here; see `sgpo.algorithm.method.Method`.
    """
    steps = []
    for group, chosen in zip(groups, choose_teacher_completions(groups, settings, score), strict=True):
        sequences = distill_sequences(group, chosen, problems=problems, with_teacher=settings.distillation != "sft")
        if settings.autonomous_grpo:
            policy = policy_sequences(group, problems=problems, normalize_std=settings.normalize_std)
            sequences = policy + sequences
        steps.append(ProblemStep(group, sequences, chosen))
    return steps


def choose_teacher_completions(groups: Sequence[ScoredGroup], settings: SgpoSettings, score: Scorer) -> list[Guidance]:
    """alpha(q) and o+ of every group; only groups with a choice between several correct rollouts are scored."""
    alphas = [_alpha(group, settings) if settings.distillation is not None else (0.0, 0.0) for group in groups]
    correct = [
        [r for r, reward in zip(g.guided, g.guided_rewards, strict=True) if reward > 0] if alpha > 0 else []
        for g, (alpha, _) in zip(groups, alphas, strict=True)
    ]
    candidates = [rollouts if len(rollouts) > 1 and settings.selection != "all" else [] for rollouts in correct]
    contexts = [
        (group.prompts.plain, rollout.completion_ids)
        for group, rollouts in zip(groups, candidates, strict=True)
        for rollout in rollouts
    ]
    logprobs = iter(score(contexts))
    guidance = []
    for (alpha, uncapped), rollouts, scored in zip(alphas, correct, candidates, strict=True):
        value = None
        if scored and settings.selection != "all":
            values = [next(logprobs) for _ in scored]
            best = most_reachable(values, score=settings.selection)
            rollouts, value = [scored[best]], selection_score(values[best], score=settings.selection)
        guidance.append(Guidance(alpha if rollouts else 0.0, uncapped, tuple(rollouts), value))
    return guidance


def distill_sequences(
    group: ScoredGroup, guidance: Guidance, *, problems: int, with_teacher: bool = True
) -> list[TrainSequence]:
    """o+ (or all correct guided completions, Eq. 2) after the plain prompt, with the guided prompt as the teacher's."""
    return [
        TrainSequence(
            prompt_ids=group.prompts.plain,
            completion_ids=rollout.completion_ids,
            distill_weight=distill_token_weight(
                alpha=guidance.alpha,
                problems=problems,
                completions=len(guidance.teacher_completions),
                length=len(rollout.completion_ids),
            ),
            teacher_prompt_ids=rollout.request.prompt_ids if with_teacher else None,
        )
        for rollout in guidance.teacher_completions
    ]


def _alpha(group: ScoredGroup, settings: SgpoSettings) -> tuple[float, float]:
    """(alpha, alpha before the cap); (0, 0) where no guided rollout is correct."""
    if not any(reward > 0 for reward in group.guided_rewards):
        return 0.0, 0.0
    if settings.alpha == "fixed":
        return settings.alpha_fixed, settings.alpha_fixed
    if settings.alpha == "group_advantage":
        return group_advantage_alpha(
            torch.tensor(group.auto_rewards), max(group.guided_rewards), alpha_max=settings.alpha_max
        )
    return adaptive_alpha(
        _pass_rate(group.auto_rewards),
        _pass_rate(group.guided_rewards),
        alpha_0=settings.alpha_0,
        gamma=settings.alpha_gamma,
        alpha_max=settings.alpha_max,
    )


def _pass_rate(rewards: Sequence[float]) -> float:
    return sum(reward > 0 for reward in rewards) / len(rewards)
