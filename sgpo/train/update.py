"""What a step learns from its groups: the method chooses and weighs, old log-probs are fixed where they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from sgpo.algorithm.importance import truncated_importance
from sgpo.algorithm.method import ProblemStep, all_sequences
from sgpo.config import RolloutConfig
from sgpo.engine.step import score_contexts
from sgpo.engine.zero import lr_factor
from sgpo.train.session import Session
from sgpo.train.step_metrics import Clock
from sgpo.types import ScoredGroup, TrainSequence
from sgpo.utils import distributed


def choose_sequences(
    s: Session, groups: Sequence[ScoredGroup], clock: Clock
) -> tuple[list[ProblemStep], list[list[TrainSequence]]]:
    """What is decided for each problem of the step, and the weighted sequences of each of its mini-batches."""
    config, batches = s.config, s.config.algorithm.mini_batches
    score = partial(score_contexts, s.engine, **s.batching, temperature=config.rollout.temperature)
    s.display.stage("select")
    mini_batches = [
        s.method(
            groups[len(groups) * i // batches : len(groups) * (i + 1) // batches],
            problems=config.rollout.problems_per_step // batches,
            score=score,
            total=lambda value: sum(distributed.gather(value)),
        )
        for i in range(batches)
    ]
    learnt = [all_sequences(problems) for problems in mini_batches]
    if batches > 1 or config.rollout.importance_cap is not None:
        learnt = [_with_old_logprobs(sequences, score, config.rollout) for sequences in learnt]
    clock.stage("target")
    return [problem for mini_batch in mini_batches for problem in mini_batch], learnt


def step_lr(s: Session, step: int) -> float:
    """The learning rate of 0-based `step`."""
    optim = s.config.optim
    return optim.lr * lr_factor(step, s.total_steps, warmup_ratio=optim.warmup_ratio, schedule=optim.schedule)


def _with_old_logprobs(sequences: Sequence[TrainSequence], score: Any, rollout: RolloutConfig) -> list[TrainSequence]:
    """Fixes pi_old before an optimizer step moves the policy, and how far the sampler was from it."""
    policy = [i for i, s in enumerate(sequences) if s.policy_weight and s.advantage]
    logprobs = score([(sequences[i].prompt_ids, sequences[i].completion_ids) for i in policy])
    fixed = list(sequences)
    for i, row in zip(policy, logprobs, strict=True):
        fixed[i] = replace(fixed[i], old_logprobs=tuple(row), importance=_importance(fixed[i], row, rollout))
    return fixed


def _importance(sequence: TrainSequence, logprobs: Sequence[float], rollout: RolloutConfig) -> tuple[float, ...] | None:
    if rollout.importance_cap is None or sequence.rollout_logprobs is None:
        return None
    return tuple(
        truncated_importance(
            logprobs, sequence.rollout_logprobs, cap=rollout.importance_cap, level=rollout.importance_level
        )
    )
