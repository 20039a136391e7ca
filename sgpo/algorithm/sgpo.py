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
from sgpo.algorithm.method import Guidance, ProblemStep, Scorer, check_completions
from sgpo.algorithm.selection import most_reachable, selection_score
from sgpo.algorithm.weights import distill_token_weight
from sgpo.types import Rollout, ScoredGroup, TrainSequence


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
    check_completions(groups)
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
    live = [_could_learn(group, settings) for group in groups]
    correct = [_correct_guided(group) if learns else [] for group, learns in zip(groups, live, strict=True)]
    candidates = [rollouts if len(rollouts) > 1 and settings.selection != "all" else [] for rollouts in correct]
    contexts = [
        (group.prompts.plain, rollout.completion_ids)
        for group, rollouts in zip(groups, candidates, strict=True)
        for rollout, _ in rollouts
    ]
    logprobs = iter(score(contexts))
    guidance = []
    for group, targets, scored in zip(groups, correct, candidates, strict=True):
        value = None
        if scored and settings.selection != "all":
            values = [next(logprobs) for _ in scored]
            best = most_reachable(values, score=settings.selection)
            targets, value = [scored[best]], selection_score(values[best], score=settings.selection)
        guidance.append(_guidance(group, targets, value, settings))
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


def _correct_guided(group: ScoredGroup) -> list[tuple[Rollout, float]]:
    """The correct rollouts with strategy, each with its reward."""
    judged = zip(group.guided, group.guided_results, strict=True)
    return [(rollout, result.reward) for rollout, result in judged if result.is_correct]


def _could_learn(group: ScoredGroup, settings: SgpoSettings) -> bool:
    """Whether alpha would be above 0 with the best of the correct rollouts as o+; it grows with R(o+), if at all."""
    rewards = [reward for _, reward in _correct_guided(group)]
    return bool(rewards) and settings.distillation is not None and _alpha(group, max(rewards), settings)[0] > 0


def _guidance(
    group: ScoredGroup, targets: Sequence[tuple[Rollout, float]], score: float | None, settings: SgpoSettings
) -> Guidance:
    """alpha with the chosen o+ (with several: the mean of their rewards); where alpha is 0, nothing is distilled."""
    rewards = [reward for _, reward in targets or _correct_guided(group)]
    if not rewards or settings.distillation is None:
        return Guidance()
    alpha, uncapped = _alpha(group, sum(rewards) / len(rewards), settings)
    if not targets or alpha == 0:
        return Guidance(alpha_uncapped=uncapped)
    return Guidance(alpha, uncapped, tuple(rollout for rollout, _ in targets), score)


def _alpha(group: ScoredGroup, target_reward: float, settings: SgpoSettings) -> tuple[float, float]:
    """(alpha, alpha before the cap) of a group with a correct guided rollout; `target_reward` is R(o+)."""
    if settings.alpha == "fixed":
        return settings.alpha_fixed, settings.alpha_fixed
    if settings.alpha == "group_advantage":
        return group_advantage_alpha(
            torch.tensor(group.auto_rewards, dtype=torch.float64), target_reward, alpha_max=settings.alpha_max
        )
    return adaptive_alpha(
        _share(group.auto_correct),
        _share(group.guided_correct),
        alpha_0=settings.alpha_0,
        gamma=settings.alpha_gamma,
        alpha_max=settings.alpha_max,
    )


def _share(correct: Sequence[bool]) -> float:
    return sum(correct) / len(correct)
