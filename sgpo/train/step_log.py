"""What is written down of a step: its metrics, a few of its rollouts, one distilled completion token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from sgpo.algorithm.method import Guidance, ProblemStep
from sgpo.engine.step import StepResult
from sgpo.engine.weight_sync import SyncReport
from sgpo.rewards.scoring import completion_text
from sgpo.train.session import Session
from sgpo.train.step_metrics import (
    Clock,
    distilled_trajectory,
    is_teacher_completion,
    record_groups,
    record_guidance,
    record_memory,
    record_passes,
    record_update,
)
from sgpo.types import ScoredGroup
from sgpo.utils.distributed import Meter


def log_step(
    s: Session,
    done: int,
    sampled: Sequence[ScoredGroup],
    problems: Sequence[ProblemStep],
    results: Sequence[StepResult],
    lr: float,
    report: SyncReport,
    meter: Meter,
    clock: Clock,
) -> None:
    """One row of metrics after step `done`, and samples of it. Collective."""
    passes = [done for result in results for done in result.passes]
    record_update(meter, results, lr)
    meter.maxima(asdict(report))
    record_memory(meter)
    if s.profiler:
        s.profiler.record(meter, clock.spans, passes)
    record_groups(meter, sampled)
    record_guidance(meter, [problem.guidance for problem in problems])
    record_passes(meter, passes)
    values = meter.reduce()
    values["rollout_tokens_per_s"] = (values["rollout_tokens"] or 0.0) / max(values["rollout_s"] or 0.0, 1e-9)
    if s.profiler:
        s.profiler.write(done, values)
    s.logger.log("train", done, values)
    s.display.step(done, values)
    for problem in problems[: s.config.log.rollouts_per_step]:
        _log_samples(s, done, problem.group, problem.guidance)
    if (found := distilled_trajectory(passes)) is not None:
        ids, kl, masked = found
        groups = [problem.group for problem in problems]
        s.table.add_trajectory(
            done,
            problem_id=next((g.problem.id for g in groups if any(r.completion_ids == ids for r in g.guided)), ""),
            tokens=[s.tokenizer.decode([token]) for token in ids],
            kl=kl,
            masked=masked,
            max_token_kl=s.config.algorithm.max_token_kl,
        )


def _log_samples(s: Session, done: int, group: ScoredGroup, chosen: Guidance) -> None:
    """One autonomous rollout, and the teacher completion or else one guided rollout."""
    pairs = list(zip(group.auto, group.auto_results, strict=True))[:1]
    guided = list(zip(group.guided, group.guided_results, strict=True))
    pairs += [pair for pair in guided if is_teacher_completion(pair[0], chosen)][:1] or guided[:1]
    for rollout, result in pairs:
        s.table.add_rollout(
            done,
            problem_id=group.problem.id,
            kind=rollout.request.kind,
            reward=result.reward,
            correct=result.is_correct,
            status=result.status,
            truncated=rollout.truncated,
            is_target=is_teacher_completion(rollout, chosen),
            text=completion_text(s.tokenizer, rollout.completion_ids),
            problem=group.problem.problem,
            answer=group.problem.answer,
        )
