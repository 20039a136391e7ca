"""What a step learns from its groups: the method chooses and weighs, the engine makes the optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from sgpo.algorithm.importance import truncated_importance
from sgpo.algorithm.method import ProblemStep, all_sequences
from sgpo.config import RolloutConfig
from sgpo.engine.step import MicroBatchResult, optimizer_step, score_contexts
from sgpo.engine.zero import lr_factor
from sgpo.train.session import Session
from sgpo.train.step_metrics import Clock
from sgpo.types import ScoredGroup, TrainSequence
from sgpo.utils import distributed
from sgpo.utils.distributed import Meter


def update_policy(
    s: Session, step: int, groups: Sequence[ScoredGroup], meter: Meter, clock: Clock
) -> tuple[list[ProblemStep], list[MicroBatchResult]]:
    """Targets and weights of the whole step, then one optimizer step per mini-batch."""
    config, batches = s.config, s.config.algorithm.mini_batches
    sizes: dict[str, Any] = {"token_budget": config.engine.micro_batch_tokens, "pad_id": s.tokenizer.pad_token_id}
    score = partial(score_contexts, s.engine, **sizes, temperature=config.rollout.temperature)
    s.display.stage("target")
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

    s.display.stage("train")
    lr = config.optim.lr * lr_factor(
        step, s.total_steps, warmup_ratio=config.optim.warmup_ratio, schedule=config.optim.schedule
    )
    loss = 0.0
    passes: list[MicroBatchResult] = []
    meter.declare(maxima=["grad_norm"])
    for sequences in learnt:
        result = optimizer_step(s.engine, sequences, s.objective, lr=lr, **sizes)
        loss += result.loss
        passes += result.passes
        if result.grad_norm is not None:
            meter.max("grad_norm", result.grad_norm)
    clock.stage("train")
    meter.sum("loss", loss / batches)
    meter.max("lr", lr)
    return [problem for mini_batch in mini_batches for problem in mini_batch], passes


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
