"""The SGPO loop: sample both groups, score, choose targets, one gradient step per mini-batch, sync, log.

`train` makes the parts of a run and closes them; `_loop` is Algorithm 1.
"""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sgpo.builders.loss import policy_objective, training_method
from sgpo.builders.model_engine import build_engine, resolve_model
from sgpo.builders.rollouts import build_rewards, build_synced_rollouts
from sgpo.builders.run_folder import open_run_folder
from sgpo.builders.task import load_run_tasks
from sgpo.config import Config
from sgpo.engine.checkpoint import Checkpoints
from sgpo.engine.export import export_model
from sgpo.engine.weight_sync import SyncedRollouts
from sgpo.engine.zero import ZeroEngine, init_distributed
from sgpo.evaluation.held_out import evaluate
from sgpo.model.loading import load_tokenizer
from sgpo.reporting.live_display import LiveDisplay
from sgpo.reporting.run_logs import MetricsLogger, RolloutTable
from sgpo.reporting.run_report import write_report
from sgpo.train.memory_vs_plan import Gauge, planned_peak
from sgpo.train.profiler import Profiler, peak_flops
from sgpo.train.progress import restore_progress, save_progress, summary_of
from sgpo.train.rollout_batch import begin_next, collect_next, sample_and_score
from sgpo.train.session import Progress, Session, is_last, total_steps_of
from sgpo.train.sft import run_warmup
from sgpo.train.step_log import log_step
from sgpo.train.step_metrics import Clock, record_groups, record_memory, record_peak
from sgpo.train.update import update_policy
from sgpo.train.worst_case_step import wants_worst_case, worst_case_step
from sgpo.types import SamplingParams
from sgpo.utils import distributed
from sgpo.utils.distributed import Meter, name_lost_process


def train(config: Config) -> dict[str, Any]:
    """Runs or resumes the training that `config` describes; returns what it also writes to summary.json."""
    started, timeout_s = time.monotonic(), config.run.timeout_s
    with name_lost_process(timeout_s, lambda: "start or end of the run"), ExitStack() as stack:
        device = init_distributed(timeout_s)
        run_dir = open_run_folder(config)
        session, progress = _start(config, run_dir, device, started, stack)
        with name_lost_process(timeout_s, lambda: session.display.where):
            _loop(session, progress)
        export_model(session.engine, session.tokenizer, run_dir / "final")
        memory = session.gauge.summary()
    summary = summary_of(config, progress, progress.wall_s + time.monotonic() - started) | {"memory": memory}
    if distributed.is_main():
        (run_dir / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
        write_report(run_dir)
    return summary


def _start(
    config: Config, run_dir: Path, device: torch.device, started: float, stack: ExitStack
) -> tuple[Session, Progress]:
    """The parts of the run, each made once and closed by `stack`; how far an earlier start of it has come."""
    model_folder = resolve_model(config)
    tokenizer = load_tokenizer(model_folder)
    task, held_out = load_run_tasks(config, model_folder, tokenizer)
    planned = planned_peak(config, model_folder)
    rewards = stack.enter_context(build_rewards(config))
    if config.warmup.enabled:
        model_folder = run_warmup(config, model_folder, tokenizer, device)
    engine = build_engine(config, model_folder, config.optim, device)
    stack.callback(engine.close)
    checkpoints = Checkpoints(run_dir / "checkpoints", keep_last=config.checkpoint.keep_last)
    progress, ahead = restore_progress(engine, checkpoints)
    rollouts = build_synced_rollouts(config, engine, model_folder, task, tokenizer)
    stack.callback(rollouts.close)
    rollouts.sync(progress.step)
    objective, gauge = policy_objective(config), Gauge(planned, rollouts.asleep_bytes)
    if progress.step == 0 and wants_worst_case(config, device):
        rollouts.sleep()
        with gauge.reading():
            worst_case_step(engine, objective, config, task.prompts, tokenizer.pad_token_id)
        rollouts.sync(progress.step)
    profiler = _profiler(config, run_dir, engine, rollouts, stack) if config.log.profile else None
    total_steps, main = total_steps_of(config, len(task.problems)), distributed.is_main()
    logger = MetricsLogger(
        run_dir,
        tensorboard=config.log.tensorboard,
        wandb_project=config.log.wandb_project,
        is_main=main,
        resume_step={"train": progress.step, "eval": progress.step if progress.before else -1},
    )
    session = Session(
        config, tokenizer, task, held_out, engine, rollouts, rewards, training_method(config), objective, checkpoints,
        logger=stack.enter_context(logger),
        table=stack.enter_context(RolloutTable(run_dir, is_main=main, resume_step=progress.step)),
        display=stack.enter_context(LiveDisplay(total_steps, title=config.run.name, is_main=main)),
        total_steps=total_steps, started=started, gauge=gauge, profiler=profiler, ahead=ahead,
    )  # fmt: skip
    return session, progress


def _loop(s: Session, progress: Progress) -> None:
    """Algorithm 1, from `progress.step` on."""
    if not progress.before:
        progress.before = progress.after = _evaluate(s, 0, with_guided=True)
    step = progress.step
    while not is_last(s, step, progress):
        meter = Meter()
        clock = Clock(meter, at_end=lambda meter=meter: record_peak(meter, s.gauge.read()))
        sampled, groups = sample_and_score(s, step, progress, clock)
        with_next = s.config.rollout.overlap and not is_last(s, step + 1, progress)
        if with_next:
            begin_next(s, step + 1)
        else:
            s.rollouts.sleep()
        problems, passes = update_policy(s, step, groups, meter, clock)
        if with_next:
            collect_next(s, step + 1)
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
        log_step(s, done, problems, passes, meter)
        last = is_last(s, done, progress)
        if last or _is_due(s.config.eval.every_steps, done):
            progress.after = _evaluate(s, done, with_guided=last)
            _keep_best(s, progress)
        if last or _is_due(s.config.checkpoint.every_steps, done):
            save_progress(s, done, progress)


def _profiler(
    config: Config, run_dir: Path, engine: ZeroEngine, rollouts: SyncedRollouts, stack: ExitStack
) -> Profiler:
    peak = peak_flops(engine.device, config.model.dtype, config.log.peak_tflops)
    profiler = Profiler(run_dir, engine.model.lm, device=engine.device, peak=peak, asleep=rollouts.asleep_bytes)
    stack.callback(profiler.close)
    return profiler


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


def _is_due(every: int | None, done: int) -> bool:
    return every is not None and done % every == 0
