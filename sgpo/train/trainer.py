"""The SGPO loop: sample both groups, score, choose targets, one gradient step per mini-batch, sync, log.

`train` assembles a run and closes it; `_loop` is Algorithm 1.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sgpo.algorithm.dapo import is_informative
from sgpo.algorithm.importance import truncated_importance
from sgpo.algorithm.method import Guidance, ProblemStep, all_sequences
from sgpo.builders.loss import policy_objective, training_method
from sgpo.builders.model_engine import build_engine, resolve_model
from sgpo.builders.rollouts import build_rewards, build_synced_rollouts
from sgpo.builders.run_folder import open_run_folder
from sgpo.builders.task import load_run_tasks
from sgpo.config import Config, RolloutConfig
from sgpo.data.epochs import problems_of_step
from sgpo.engine.checkpoint import Checkpoints
from sgpo.engine.export import export_model
from sgpo.engine.step import MicroBatchResult, optimizer_step, score_contexts
from sgpo.engine.weight_sync import SyncedRollouts
from sgpo.engine.zero import ZeroEngine, init_distributed, lr_factor
from sgpo.evaluation.held_out import evaluate
from sgpo.model.loading import load_tokenizer
from sgpo.reporting.live_display import LiveDisplay
from sgpo.reporting.run_logs import MetricsLogger, RolloutTable
from sgpo.reporting.run_report import write_report
from sgpo.rewards.pool import RewardPool
from sgpo.rewards.scoring import reward_item, score_rollouts
from sgpo.train.memory_vs_plan import Gauge, planned_peak
from sgpo.train.profiler import Profiler, peak_flops
from sgpo.train.rollout_batch import build_requests, check_version, scored_groups
from sgpo.train.sft import run_warmup
from sgpo.train.step_metrics import (
    Clock,
    distilled_trajectory,
    is_target,
    record_groups,
    record_guidance,
    record_memory,
    record_passes,
    record_peak,
)  # fmt: skip
from sgpo.train.worst_case_step import wants_worst_case, worst_case_step
from sgpo.types import (
    Rollout,
    RolloutRequest,
    SamplingParams,
    ScoredGroup,
    SgpoError,
    TaskData,
    TrainSequence,
    rollout_from_json,
)
from sgpo.utils import distributed
from sgpo.utils.distributed import Meter
from sgpo.utils.provenance import commit

_LOST_PROCESS = ("Timed out", "timed out", "Connection closed by peer", "Connection reset by peer", "pair closure")


@dataclass(slots=True)
class Progress:
    """What a checkpoint remembers beside weights, optimizer and random states. Accuracies are held-out.

    `rounds` batches of problems have been sampled (one per step, more where groups are refilled).
    """

    step: int = 0
    rounds: int = 0
    rollouts: int = 0
    rollout_tokens: int = 0
    wall_s: float = 0.0
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    best_accuracy: float = -1.0


@dataclass(frozen=True, slots=True)
class Session:
    """The assembled parts of a run."""

    config: Config
    tokenizer: Any
    task: TaskData
    held_out: TaskData | None
    engine: ZeroEngine
    rollouts: SyncedRollouts
    rewards: RewardPool
    checkpoints: Checkpoints
    logger: MetricsLogger
    table: RolloutTable
    display: LiveDisplay
    total_steps: int
    started: float
    gauge: Gauge
    profiler: Profiler | None = None
    ahead: list[Rollout] = field(default_factory=list)  # rollout.overlap: those of the next step, once they are there


def train(config: Config) -> dict[str, Any]:
    """Runs or resumes the training that `config` describes; returns what it also writes to summary.json."""
    with name_lost_process(config, lambda: "start or end of the run"):
        return _train(config)


def _train(config: Config) -> dict[str, Any]:
    started = time.monotonic()
    device = init_distributed(config.run.timeout_s)
    run_dir = open_run_folder(config)
    model_folder = resolve_model(config)
    tokenizer = load_tokenizer(model_folder)
    task, held_out = load_run_tasks(config, model_folder, tokenizer)
    planned = planned_peak(config, model_folder)
    with ExitStack() as stack:
        rewards = stack.enter_context(build_rewards(config))
        if config.warmup.enabled:
            model_folder = run_warmup(config, model_folder, tokenizer, device)
        engine = build_engine(config, model_folder, config.optim, device)
        stack.callback(engine.close)
        checkpoints = Checkpoints(run_dir / "checkpoints", keep_last=config.checkpoint.keep_last)
        progress, ahead = _restore(engine, checkpoints)
        rollouts = build_synced_rollouts(config, engine, model_folder, task, tokenizer)
        stack.callback(rollouts.close)
        rollouts.sync(progress.step)
        gauge = Gauge(planned, rollouts.asleep_bytes)
        if progress.step == 0 and wants_worst_case(config, device):
            rollouts.sleep()
            with gauge.reading():
                worst_case_step(engine, config, task.prompts, tokenizer.pad_token_id)
            rollouts.sync(progress.step)
        profiler = _profiler(config, run_dir, engine, rollouts, stack) if config.log.profile else None
        total_steps, main = _total_steps(config, len(task.problems)), distributed.is_main()
        logger = MetricsLogger(
            run_dir,
            tensorboard=config.log.tensorboard,
            wandb_project=config.log.wandb_project,
            is_main=main,
            resume_step={"train": progress.step, "eval": progress.step if progress.before else -1},
        )
        session = Session(
            config, tokenizer, task, held_out, engine, rollouts, rewards, checkpoints,
            logger=stack.enter_context(logger),
            table=stack.enter_context(RolloutTable(run_dir, is_main=main, resume_step=progress.step)),
            display=stack.enter_context(LiveDisplay(total_steps, title=config.run.name, is_main=main)),
            total_steps=total_steps,
            started=started,
            gauge=gauge,
            profiler=profiler,
            ahead=ahead,
        )  # fmt: skip
        with name_lost_process(config, lambda: session.display.where):
            _loop(session, progress)
        export_model(engine, tokenizer, run_dir / "final")
        memory = gauge.summary()
    summary = _summary(config, progress, progress.wall_s + time.monotonic() - started) | {"memory": memory}
    if main:
        (run_dir / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
        write_report(run_dir)
    return summary


def _loop(s: Session, progress: Progress) -> None:
    """Algorithm 1, from `progress.step` on."""
    if not progress.before:
        progress.before = progress.after = _evaluate(s, 0, with_guided=True)
    step = progress.step
    while not _is_last(s, step, progress):
        meter = Meter()
        clock = Clock(meter, at_end=lambda meter=meter: record_peak(meter, s.gauge.read()))
        sampled, groups = _sample_and_score(s, step, progress, clock)
        with_next = s.config.rollout.overlap and not _is_last(s, step + 1, progress)
        if with_next:
            _begin(s, step + 1)
        else:
            s.rollouts.sleep()
        problems, passes = _update(s, step, groups, meter, clock)
        if with_next:
            _collect(s, step + 1)
        if s.config.rollout.overlap:
            clock.stage("overlap_wait")
        s.display.stage("sync")
        report = s.rollouts.sync(step + 1)
        clock.stage("sync")
        clock.finish()
        meter.maxima(asdict(report))
        record_memory(meter)
        if s.profiler:
            s.profiler.record(meter, clock.spans, passes)
        step = done = step + 1
        record_groups(meter, sampled)
        _log(s, done, problems, passes, meter)
        last = _is_last(s, done, progress)
        if last or _is_due(s.config.eval.every_steps, done):
            progress.after = _evaluate(s, done, with_guided=last)
            _keep_best(s, progress)
        if last or _is_due(s.config.checkpoint.every_steps, done):
            _save(s, done, progress)


def _profiler(
    config: Config, run_dir: Path, engine: ZeroEngine, rollouts: SyncedRollouts, stack: ExitStack
) -> Profiler:
    peak = peak_flops(engine.device, config.model.dtype, config.log.peak_tflops)
    profiler = Profiler(run_dir, engine.model.lm, device=engine.device, peak=peak, asleep=rollouts.asleep_bytes)
    stack.callback(profiler.close)
    return profiler


@contextmanager
def name_lost_process(config: Config, where: Callable[[], str]) -> Iterator[None]:
    """Says at which stage another process was lost; gloo only knows that it was."""
    try:
        yield
    except RuntimeError as error:
        lost = next((words for words in _LOST_PROCESS if words in str(error)), None)
        if lost is None:
            raise
        raise SgpoError(
            f"{where()}: another process of the run died or gave no answer within run.timeout_s = "
            f"{config.run.timeout_s:.0f} s (its own output says why); the last checkpoint is whole"
        ) from error


def _sample_and_score(
    s: Session, step: int, progress: Progress, clock: Clock
) -> tuple[list[ScoredGroup], list[ScoredGroup]]:
    """All groups that this rank sampled in the step, and those to learn from: the same, unless groups are refilled.

    Refilling (DAPO's dynamic sampling) drops what all or no rollouts solve, and samples on until the step is full.
    """
    sampled = _round(s, step, progress, clock)
    wanted, further = len(sampled), s.config.algorithm.refill_rounds
    if not further:
        return sampled, sampled
    while True:
        kept = [group for group in sampled if is_informative(group)][:wanted]
        if not further or all(distributed.gather(len(kept) == wanted)) or _is_last(s, step, progress):
            return sampled, kept
        further -= 1
        sampled += _round(s, step, progress, clock)


def _round(s: Session, step: int, progress: Progress, clock: Clock) -> list[ScoredGroup]:
    """Both groups of this rank's problems of the next batch, with their verdicts."""
    indices, requests, sampling = _requests(s, progress.rounds)
    if s.ahead:
        sampled = s.ahead.copy()
        s.ahead.clear()
    else:
        s.display.stage("rollout", len(requests))
        sampled = s.rollouts.generate(requests, sampling, s.display.advance, _early_verdicts(s))
    check_version(sampled, step, behind=int(s.config.rollout.overlap))
    clock.stage("rollout")
    s.display.stage("score", len(sampled))
    groups = scored_groups(s.task, indices, sampled, partial(score_rollouts, s.rewards, s.tokenizer, s.task))
    clock.stage("score")
    progress.rounds += 1
    for count, tokens in distributed.gather((len(sampled), sum(len(rollout.completion_ids) for rollout in sampled))):
        progress.rollouts += count
        progress.rollout_tokens += tokens
    return groups


def _begin(s: Session, step: int) -> None:
    """Starts on the rollouts of the next step, by the weights that this step is about to change."""
    _, requests, sampling = _requests(s, step)
    s.rollouts.begin(requests, sampling, _early_verdicts(s))


def _collect(s: Session, version: int) -> None:
    s.display.stage("rollout")
    s.ahead.extend(s.rollouts.collect(version))


def _requests(s: Session, number: int) -> tuple[list[int], list[RolloutRequest], SamplingParams]:
    """Those of batch `number` of the run."""
    rollout, seed = s.config.rollout, s.config.run.seed
    indices = problems_of_step(len(s.task.problems), per_step=rollout.problems_per_step, seed=seed, step=number)
    requests = build_requests(s.task, indices, n_auto=rollout.n_auto, n_guided=rollout.n_guided, seed=seed, step=number)
    return indices, requests, SamplingParams(rollout.temperature, rollout.top_p, rollout.max_new_tokens)


def _early_verdicts(s: Session) -> Callable[[Rollout], None]:
    """Has each completion judged while others are still being sampled."""
    return lambda rollout: s.rewards.begin(reward_item(s.tokenizer, s.task, rollout))


def _update(
    s: Session, step: int, groups: Sequence[ScoredGroup], meter: Meter, clock: Clock
) -> tuple[list[ProblemStep], list[MicroBatchResult]]:
    """Targets and weights of the whole step, then one optimizer step per mini-batch."""
    config, batches = s.config, s.config.algorithm.mini_batches
    sizes: dict[str, Any] = {"token_budget": config.engine.micro_batch_tokens, "pad_id": s.tokenizer.pad_token_id}
    score = partial(score_contexts, s.engine, **sizes, temperature=config.rollout.temperature)
    s.display.stage("target")
    method, objective = training_method(config), policy_objective(config)
    mini_batches = [
        method(
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
    results = [optimizer_step(s.engine, sequences, objective, lr=lr, **sizes) for sequences in learnt]
    clock.stage("train")
    meter.sum("loss", sum(result.loss for result in results) / batches)
    meter.max("lr", lr)
    meter.declare(maxima=["grad_norm"])
    for result in results:
        if result.grad_norm is not None:
            meter.max("grad_norm", result.grad_norm)
    problems = [problem for mini_batch in mini_batches for problem in mini_batch]
    return problems, [done for result in results for done in result.passes]


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


def _log(
    s: Session,
    done: int,
    problems: Sequence[ProblemStep],
    passes: Sequence[MicroBatchResult],
    meter: Meter,
) -> None:
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
        algorithm, groups = s.config.algorithm, [problem.group for problem in problems]
        s.table.add_trajectory(
            done,
            problem_id=next((g.problem.id for g in groups if any(r.completion_ids == ids for r in g.guided)), ""),
            tokens=[s.tokenizer.decode([token]) for token in ids],
            kl=kl,
            masked=masked,
            max_token_kl=None if algorithm.over_limit == "off" else algorithm.max_token_kl,
        )


def _log_samples(s: Session, done: int, group: ScoredGroup, chosen: Guidance) -> None:
    """One autonomous rollout, and the target or else one guided rollout."""
    pairs = list(zip(group.auto, group.auto_verdicts, strict=True))[:1]
    guided = list(zip(group.guided, group.guided_verdicts, strict=True))
    pairs += [pair for pair in guided if is_target(pair[0], chosen)][:1] or guided[:1]
    for rollout, verdict in pairs:
        s.table.add_rollout(
            done,
            problem_id=group.problem.id,
            kind=rollout.request.kind,
            reward=verdict.reward,
            status=verdict.status,
            truncated=rollout.truncated,
            is_target=is_target(rollout, chosen),
            text=s.tokenizer.decode(rollout.completion_ids, skip_special_tokens=True),
            problem=group.problem.problem,
            answer=group.problem.answer,
        )


def _evaluate(s: Session, done: int, *, with_guided: bool) -> dict[str, float]:
    """Held-out accuracy, without the guidance and on request with it; logged as phase "eval"."""
    if s.held_out is None:
        return {}
    config = s.config.eval
    s.display.stage("eval", len(s.held_out.problems) * config.samples)
    run = partial(
        evaluate,
        s.rollouts,
        s.rewards,
        s.tokenizer,
        s.held_out,
        SamplingParams(config.temperature, config.top_p, config.max_new_tokens),
        seed=s.config.run.seed,
        samples=config.samples,
        on_progress=s.display.advance,
    )
    values = run().metrics()
    if config.guided and with_guided and any(pair.guided for pair in s.held_out.prompts):
        values["guided_accuracy"] = run(kind="guided").accuracy
    s.logger.log("eval", done, values)
    s.display.step(done, values, phase="eval")
    return values


def _keep_best(s: Session, progress: Progress) -> None:
    accuracy = progress.after.get("accuracy", -1.0)
    if s.config.checkpoint.keep_best and accuracy > progress.best_accuracy:
        progress.best_accuracy = accuracy
        export_model(s.engine, s.tokenizer, s.config.run.dir / "best")


def _save(s: Session, done: int, progress: Progress) -> None:
    progress.step = done
    wall_s = progress.wall_s + time.monotonic() - s.started
    state = {**asdict(progress), "wall_s": wall_s, "world_size": distributed.world_size()}

    def write(folder: Path) -> None:
        s.engine.save(folder / "engine")
        torch.save(torch.get_rng_state(), folder / f"rng-{distributed.rank()}.pt")
        if s.ahead:
            rows = [asdict(rollout) for rollout in s.ahead]
            (folder / f"ahead-{distributed.rank()}.json").write_text(json.dumps(rows), encoding="utf-8")

    s.display.stage("save")
    s.checkpoints.save(done, state, write)


def _restore(engine: ZeroEngine, checkpoints: Checkpoints) -> tuple[Progress, list[Rollout]]:
    """Everything as the last whole checkpoint left it, or the beginning."""
    if (found := checkpoints.latest()) is None:
        return Progress(), []
    folder, state = found
    if state.pop("world_size") != distributed.world_size():
        raise SgpoError(f"{folder} was written by another number of processes; resume with as many")
    engine.load(folder / "engine")
    torch.set_rng_state(torch.load(folder / f"rng-{distributed.rank()}.pt", weights_only=True))
    ahead = folder / f"ahead-{distributed.rank()}.json"
    rows = json.loads(ahead.read_text(encoding="utf-8")) if ahead.exists() else []
    return Progress(**state), [rollout_from_json(row) for row in rows]


def _total_steps(config: Config, problems: int) -> int:
    per_epoch = problems // config.rollout.problems_per_step
    steps = math.ceil(config.train.epochs * per_epoch)
    return min(steps, config.train.max_steps or steps)


def _is_last(s: Session, done: int, progress: Progress) -> bool:
    """No further step: their number is reached, or the budget of rollouts has no room for another batch."""
    rollout, limit = s.config.rollout, s.config.train.max_rollouts
    batch = rollout.problems_per_step * (rollout.n_auto + rollout.n_guided)
    return done >= s.total_steps or (limit is not None and progress.rollouts + batch > limit)


def _is_due(every: int | None, done: int) -> bool:
    return every is not None and done % every == 0


def _summary(config: Config, progress: Progress, wall_s: float) -> dict[str, Any]:
    before, after = progress.before, progress.after

    def interval(values: dict[str, float]) -> list[float] | None:
        return [values["accuracy_low"], values["accuracy_high"]] if values else None

    return {
        "run": config.run.name,
        "method": config.algorithm.method,
        "accuracy_before": before.get("accuracy"),
        "accuracy_before_interval": interval(before),
        "accuracy_after": after.get("accuracy"),
        "accuracy_after_interval": interval(after),
        "guided_accuracy_before": before.get("guided_accuracy"),
        "guided_accuracy_after": after.get("guided_accuracy"),
        "best_accuracy": progress.best_accuracy if progress.best_accuracy >= 0 else None,
        "steps": progress.step,
        "rollouts": progress.rollouts,
        "rollout_tokens": progress.rollout_tokens,
        "wall_s": round(wall_s, 1),
        "seed": config.run.seed,
        "commit": commit(),
    }
