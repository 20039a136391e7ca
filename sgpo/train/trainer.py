"""The SGPO loop: sample both groups, score, choose o+, one gradient step per mini-batch, sync, log.

`train` is the whole run on one page; what it calls says how.
"""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from sgpo.builders.loss import training_loss, training_method
from sgpo.builders.model_engine import build_engine, resolve_model
from sgpo.builders.rollouts import build_policy_sampler, build_rewards
from sgpo.builders.run_folder import open_run_folder
from sgpo.builders.task import load_run_tasks
from sgpo.config import Config
from sgpo.engine.checkpoint import Checkpoints
from sgpo.engine.export import export_model
from sgpo.engine.step import optimizer_step
from sgpo.engine.weight_sync import PolicySampler
from sgpo.engine.zero import ZeroEngine, init_distributed
from sgpo.evaluation.held_out import evaluate
from sgpo.model.loading import load_tokenizer
from sgpo.reporting.live_display import LiveDisplay
from sgpo.reporting.run_logs import MetricsLogger, RolloutTable
from sgpo.reporting.run_report import write_report
from sgpo.train.memory_vs_plan import MemoryTracker, planned_peak
from sgpo.train.profiler import Profiler, peak_flops
from sgpo.train.progress import restore_progress, save_progress, summary_of
from sgpo.train.rollout_batch import begin_next, collect_next, sample_and_score
from sgpo.train.session import Progress, Session, is_last, total_steps_of
from sgpo.train.sft import run_warmup
from sgpo.train.step_log import log_step
from sgpo.train.step_metrics import Clock, record_peak
from sgpo.train.update import choose_sequences, step_lr
from sgpo.train.worst_case_step import wants_worst_case, worst_case_step
from sgpo.types import SamplingParams
from sgpo.utils import distributed
from sgpo.utils.distributed import Meter, name_lost_process


def train(config: Config) -> dict[str, Any]:
    """Runs or resumes the training that `config` describes (Algorithm 1); returns what summary.json gets."""
    started, timeout_s = time.monotonic(), config.run.timeout_s
    with name_lost_process(timeout_s, lambda: "start or end of the run"), ExitStack() as stack:
        s, progress = _start(config, started, stack)
        with name_lost_process(timeout_s, lambda: s.display.where):
            if not progress.before:
                progress.before = progress.after = _evaluate(s, 0, with_guided=True)
            step = progress.step
            while not is_last(s, step, progress):
                meter = Meter()
                clock = Clock(meter, at_end=lambda meter=meter: record_peak(meter, s.memory.read()))
                sampled, groups = sample_and_score(s, step, progress, clock)
                with_next = config.rollout.overlap and not is_last(s, step + 1, progress)
                if with_next:
                    begin_next(s, step + 1)
                else:
                    s.sampler.sleep()
                problems, mini_batches = choose_sequences(s, groups, clock)
                s.display.stage("train")
                lr, results = step_lr(s, step), []
                for sequences in mini_batches:
                    result = optimizer_step(s.engine, sequences, s.loss, **s.batching, **s.not_finite, lr=lr)
                    results.append(result)
                clock.stage("train")
                if with_next:
                    collect_next(s, step + 1)
                if config.rollout.overlap:
                    clock.stage("overlap_wait")
                s.display.stage("sync")
                report = s.sampler.sync(step + 1)
                clock.stage("sync")
                clock.finish()
                step += 1
                log_step(s, step, sampled, problems, results, lr, report, meter, clock)
                last = is_last(s, step, progress)
                if last or _is_due(config.eval.every_steps, step):
                    progress.after = _evaluate(s, step, with_guided=last)
                    _keep_best(s, progress)
                if last or _is_due(config.checkpoint.every_steps, step):
                    save_progress(s, step, progress)
        export_model(s.engine, s.tokenizer, config.run.dir / "final")
        memory = s.memory.summary()
        summary = summary_of(config, progress, progress.wall_s + time.monotonic() - started) | {"memory": memory}
    if distributed.is_main():
        (config.run.dir / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
        write_report(config.run.dir)
    return summary


def _start(config: Config, started: float, stack: ExitStack) -> tuple[Session, Progress]:
    """The parts of the run, each made once and closed by `stack`; how far an earlier start of it has come."""
    device, run_dir = init_distributed(config.run.timeout_s), open_run_folder(config)
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
    sampler = build_policy_sampler(config, engine, model_folder, task, tokenizer)
    stack.callback(sampler.close)
    sampler.sync(progress.step)
    loss, memory = training_loss(config), MemoryTracker(planned, sampler.asleep_bytes)
    if progress.step == 0 and wants_worst_case(config, device):
        sampler.sleep()
        with memory.reading():
            worst_case_step(engine, loss, config, task.prompts, tokenizer.pad_token_id)
        sampler.sync(progress.step)
    profiler = _profiler(config, run_dir, engine, sampler, stack) if config.log.profile else None
    total_steps, main = total_steps_of(config, len(task.problems)), distributed.is_main()
    logger = MetricsLogger(
        run_dir,
        tensorboard=config.log.tensorboard,
        wandb_project=config.log.wandb_project,
        is_main=main,
        resume_step={"train": progress.step, "eval": progress.step if progress.before else -1},
    )
    session = Session(
        config, tokenizer, task, held_out, engine, sampler, rewards, training_method(config), loss, checkpoints,
        logger=stack.enter_context(logger),
        table=stack.enter_context(RolloutTable(run_dir, is_main=main, resume_step=progress.step)),
        display=stack.enter_context(LiveDisplay(total_steps, title=config.run.name, is_main=main)),
        total_steps=total_steps, started=started, memory=memory, profiler=profiler, ahead=ahead,
    )  # fmt: skip
    return session, progress


def _profiler(config: Config, run_dir: Path, engine: ZeroEngine, sampler: PolicySampler, stack: ExitStack) -> Profiler:
    peak = peak_flops(engine.device, config.model.dtype, config.log.peak_tflops)
    profiler = Profiler(run_dir, engine.model.lm, device=engine.device, peak=peak, asleep=sampler.asleep_bytes)
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
        s.sampler,
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
