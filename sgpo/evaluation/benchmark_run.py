"""`sgpo eval` on named benchmarks: every sample on the disk, any number of interruptions, intervals at the end."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sgpo.config import Config
from sgpo.data.builtin import BUILTIN
from sgpo.data.problems import listing, load_problems
from sgpo.data.prompt_template import source_note, template_of
from sgpo.data.prompts import PromptBuilder
from sgpo.evaluation.benchmarks import PAPER, benchmark_samples, content_hash, load_benchmark
from sgpo.evaluation.contamination import Match, find_contamination
from sgpo.evaluation.golds import Dropped, check_problems
from sgpo.evaluation.sample_log import SampleLog, Samples, missing
from sgpo.evaluation.scores import Score, score
from sgpo.rewards.pool import RewardPool
from sgpo.rewards.scoring import completion_text, judged_item
from sgpo.rewards.thinking import open_thinking
from sgpo.types import Problem, PromptPair, RewardResult, Rollout, RolloutRequest, Sampler, SamplingParams, SgpoError
from sgpo.utils.files import write_whole
from sgpo.utils.provenance import commit, versions
from sgpo.utils.seeds import seed_of

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf")
_MODEL_FILES = ("config.json", "generation_config.json")
_PROGRESS_S = 30.0


@dataclass(frozen=True, slots=True)
class Task:
    """A benchmark with its prompts, k of avg@k, and the rows that are in the training data.

    opening: as in `TaskData`. dropped: rows that are left out because of their answers.
    """

    name: str
    problems: list[Problem]
    prompts: list[PromptPair]
    samples: int
    contaminated: list[Match]
    opening: str = ""
    dropped: Sequence[Dropped] = ()


@dataclass(frozen=True, slots=True)
class Missing:
    """The requests of one benchmark whose samples are not in its log yet."""

    task: Task
    log: SampleLog
    requests: list[RolloutRequest]


@dataclass(frozen=True, slots=True)
class BenchmarkResult:
    """`clean` is the score without the rows that are in the training data; None where there are none such."""

    name: str
    score: Score
    clean: Score | None
    contaminated: list[Match]
    file: Path
    dropped: Sequence[Dropped] = ()


class BenchmarkRun:
    """The benchmarks that eval.benchmarks names, on one model; every sample is on the disk before it counts.

    A context manager, which holds the files of samples. To be used in this order: `missing`, `sample`, `finish`.

    Args:
        out: folder of the results; None: one of this model's own under run.output_dir.
        report: takes lines on how far it has come.

    Raises:
        SgpoError: no such benchmark, contamination where it is refused, a folder with another setting.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        tokenizer: Any,
        out: Path | None = None,
        report: Callable[[str], None] = print,
    ) -> None:
        self._config, self._folder, self._tokenizer, self._report = config, folder, tokenizer, report
        self._tasks = _load_tasks(config, tokenizer, report)
        for task in self._tasks:
            _report_contamination(config, task, report)
        fingerprint = model_fingerprint(folder)
        self._out = out or Path(config.run.output_dir) / "eval" / f"{folder.resolve().name}-{fingerprint[:8]}"
        made_with = {"commit": commit(), "versions": versions()}
        with ExitStack() as stack:
            self._logs = [
                stack.enter_context(
                    SampleLog(self._out / f"{task.name}.jsonl", _setting(config, folder, fingerprint, task), made_with)
                )
                for task in self._tasks
            ]
            self._open = stack.pop_all()

    def __enter__(self) -> BenchmarkRun:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def missing(self) -> list[Missing]:
        """What is not on the disk yet, benchmark by benchmark; empty where all is."""
        found = []
        for task, log in zip(self._tasks, self._logs, strict=True):
            keys = missing(log.samples, [problem.id for problem in task.problems], task.samples)
            total = len(task.problems) * task.samples
            if len(keys) < total:
                self._report(f"{task.name}: {total - len(keys)} of {total} samples are there")
            if keys:
                found.append(Missing(task, log, _requests(self._config.run.seed, task, keys)))
        return found

    def sample(self, work: Sequence[Missing], engine: Sampler, rewards: RewardPool) -> None:
        """Samples and judges all of `work`."""
        settings = self._config.eval
        sampling = SamplingParams(settings.temperature, settings.top_p, settings.max_new_tokens)
        try:
            for part in work:
                sample_into(
                    part.log, engine, rewards, self._tokenizer, part.task, part.requests, sampling, self._report
                )
        finally:
            for log in self._logs:  # results that only come because the pool is closed are not written
                log.finish()

    def finish(self) -> list[BenchmarkResult]:
        """Scores every benchmark and writes OUT/summary.json."""
        logs = zip(self._tasks, self._logs, strict=True)
        results = [_result(self._config, task, log.samples) for task, log in logs]
        _write_summary(self._out / "summary.json", self._config, self._folder, results)
        return results


def _requests(seed: int, task: Task, keys: Sequence[tuple[str, int]]) -> list[RolloutRequest]:
    index_of = {problem.id: i for i, problem in enumerate(task.problems)}
    return [
        RolloutRequest(
            index_of[name], "auto", k, task.prompts[index_of[name]].plain,
            seed_of(seed, "benchmark", task.name, name, k),
        )
        for name, k in keys
    ]  # fmt: skip


def model_fingerprint(folder: Path) -> str:
    """SHA-256 over the names and contents of the weights and the configuration, wherever the folder lies."""
    digest = hashlib.sha256()
    files = [path for path in folder.iterdir() if path.suffix in _WEIGHT_SUFFIXES or path.name in _MODEL_FILES]
    for path in sorted(files):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    return digest.hexdigest()


def protocol_of(config: Config, tasks: Sequence[tuple[str, int]]) -> str:
    """ "paper", or what differs from the paper's settings; `tasks` are (benchmark, samples)."""
    changed = [
        f"{key} {getattr(config.eval, key)}"
        for key, value in asdict(PAPER).items()
        if getattr(config.eval, key) != value
    ]
    changed += [f"{name} avg@{samples}" for name, samples in tasks if samples != benchmark_samples(name)]
    return "paper" if not changed else f"paper, but {', '.join(changed)}"


def _load_tasks(config: Config, tokenizer: Any, report: Callable[[str], None]) -> list[Task]:
    settings, template = config.eval, template_of(config)
    builder = PromptBuilder(tokenizer, template, max_prompt_tokens=config.data.max_prompt_tokens)
    opening = open_thinking(builder.tail_text)
    if note := source_note(config, template):
        report(note)
    train = _training_problems(config)
    tasks = []
    for spec in settings.benchmarks:
        drop = config.data.bad_golds == "drop"
        name, problems = load_benchmark(
            spec, settings.benchmark_dir, limit=settings.benchmark_limit, empty_answers=drop
        )
        if name in [task.name for task in tasks]:
            raise SgpoError(f"eval.benchmarks names {name} twice; give each once")
        problems, dropped = check_problems(config, name, problems, report)
        samples = settings.benchmark_samples or benchmark_samples(name)
        found = find_contamination(train, problems, min_overlap=settings.contamination_overlap) if train else []
        tasks.append(Task(name, problems, builder.check_all(problems), samples, found, opening, dropped))
    for note in builder.notes:
        report(note)
    return tasks


def _training_problems(config: Config) -> list[Problem]:
    """All that the model may have been trained on according to the config; the built-in task is no benchmark."""
    if config.eval.contamination == "off":
        return []
    sources = [config.data.train, config.warmup.data if config.warmup.enabled else None]
    return [p for source in sources if source and source != BUILTIN for p in load_problems(source)]


def _report_contamination(config: Config, task: Task, report: Callable[[str], None]) -> None:
    if not task.contaminated:
        return
    head = f"{task.name}: {len(task.contaminated)} of {len(task.problems)} problems are in the training data"
    lines = [f"{m.id} is {m.train_id} ({m.how}, {m.share:.0%} of its 13-grams)" for m in task.contaminated]
    if config.eval.contamination == "refuse":
        raise SgpoError(listing(f"{head}; remove them there, or set eval.contamination to report", lines))
    report(listing(head, lines))


def _setting(config: Config, folder: Path, fingerprint: str, task: Task) -> dict[str, Any]:
    """What the samples depend on; a file of samples is bound to it."""
    settings = config.eval
    prompts = hashlib.sha256(json.dumps([pair.plain for pair in task.prompts]).encode()).hexdigest()
    return {
        "benchmark": task.name,
        "problem_count": len(task.problems),
        "problems": content_hash(task.problems),
        "prompts": prompts,
        "samples": task.samples,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "max_new_tokens": settings.max_new_tokens,
        "seed": config.run.seed,
        "reward": config.reward.kind,
        "require_box": config.reward.require_box,
        "correct_above": config.reward.correct_above,
        "model": fingerprint,
        "dtype": config.model.dtype,
        "engine": config.rollout.engine,
    }


def sample_into(
    log: SampleLog,
    engine: Sampler,
    rewards: RewardPool,
    tokenizer: Any,
    task: Task,
    requests: Sequence[RolloutRequest],
    sampling: SamplingParams,
    report: Callable[[str], None],
) -> None:
    """One line in `log` per request, as soon as its result is there."""
    written: list[Future[RewardResult]] = []

    def on_rollout(rollout: Rollout) -> None:
        problem = task.problems[rollout.request.problem_index]
        text = completion_text(tokenizer, rollout.completion_ids)
        in_file: Future[RewardResult] = Future()
        written.append(in_file)

        def write(future: Future[RewardResult]) -> None:
            log.append(_row(problem, rollout, text, future.result()))
            in_file.set_result(future.result())

        rewards.submit(judged_item(problem, text, task.opening)).add_done_callback(write)
        log.check()

    engine.generate(requests, sampling, _Progress(task.name, len(requests), report), on_rollout)
    wait(written)
    log.check()
    if written and all(future.result().status == "error" for future in written):
        raise SgpoError(
            f"{task.name}: no result on any of the {len(written)} new samples (last cause: {rewards.last_cause}); mend "
            f"the reward and remove {log.samples.path}"
        )


def _row(problem: Problem, rollout: Rollout, text: str, result: RewardResult) -> dict[str, Any]:
    prompt = hashlib.sha256(json.dumps(rollout.request.prompt_ids).encode()).hexdigest()
    return {
        "id": problem.id,
        "sample": rollout.request.sample_index,
        "seed": rollout.request.seed,
        "prompt": prompt[:16],
        "tokens": len(rollout.completion_ids),
        "truncated": rollout.truncated,
        "finish": "length" if rollout.truncated else "stop",
        "reward": result.reward,
        "status": result.status,
        "answer": problem.answer,
        "text": text,
    }


def _result(config: Config, task: Task, samples: Samples) -> BenchmarkResult:
    seed = seed_of(config.run.seed, "bootstrap", task.name) % 2**31
    ids = {match.id for match in task.contaminated}
    whole = score(samples, seed=seed)
    clean = score(samples, seed=seed, leave_out=ids) if 0 < len(ids) < len(task.problems) else None
    return BenchmarkResult(task.name, whole, clean, task.contaminated, samples.path, task.dropped)


def _write_summary(path: Path, config: Config, folder: Path, results: Sequence[BenchmarkResult]) -> None:
    content = {
        "model": str(folder),
        "prompt_template": template_of(config).source,
        "protocol": protocol_of(config, [(result.name, result.score.samples) for result in results]),
        "average": sum(result.score.accuracy for result in results) / len(results),
        "benchmarks": {
            result.name: {
                **result.score.as_json(),
                "without_contaminated": result.clean.as_json() if result.clean else None,
                "contaminated": [asdict(match) for match in result.contaminated],
                "dropped": [asdict(row) for row in result.dropped],
            }
            for result in results
        },
    }
    write_whole(path, json.dumps(content, indent=1))


class _Progress:
    """A line now and then."""

    def __init__(self, name: str, total: int, report: Callable[[str], None]) -> None:
        self._name, self._total, self._report = name, total, report
        self._start = self._said = time.monotonic()

    def __call__(self, finished: int, tokens: int) -> None:
        now = time.monotonic()
        if now - self._said >= _PROGRESS_S:
            self._said = now
            rate = tokens / (now - self._start)
            self._report(f"{self._name}: {finished} of {self._total} new samples, {rate:.0f} tokens/s")
