"""`sgpo eval`: a model on data.eval or on named benchmarks, and the comparison of two finished evaluations."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from sgpo.config import Config
from sgpo.types import WORDS, Kind, SamplingParams, SgpoError
from sgpo.utils.config_file import config_first, load_settings, no_words

if TYPE_CHECKING:
    from sgpo.evaluation.benchmark_run import BenchmarkResult
    from sgpo.evaluation.held_out import EvalResult

SETTINGS = Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The config file is optional, so it is among the words."""
    parser.usage = (
        "sgpo eval [config.yaml] [--out PATH] [--key value ...]\n"
        "       sgpo eval --model.path FOLDER --eval.benchmarks NAME,NAME --eval.benchmark_dir FOLDER\n"
        "       sgpo eval --compare A B [--out FILE]"
    )
    parser.add_argument("--out", type=Path, help="data.eval: JSONL file of the samples; benchmarks: folder of results")
    parser.add_argument(
        "--compare", type=Path, nargs=2, metavar=("A", "B"), help="folders (or JSONL files) of two finished evaluations"
    )


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Compares, or evaluates on benchmarks, or on data.eval."""
    if arguments.compare is not None:
        no_words(words)
        a, b = arguments.compare
        _print_comparison(a, b, arguments.out)
        return 0
    path, overrides = config_first(words)
    config = load_eval_config(path, overrides)
    if config.eval.benchmarks:
        _print_benchmarks(config, evaluate_benchmarks(config, arguments.out))
        return 0
    if not config.data.eval:
        raise SgpoError(f"{path or 'command line'}: sgpo eval needs data.eval or eval.benchmarks")
    _print_held_out(evaluate_model(config), arguments.out)
    return 0


def load_eval_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """The settings of an evaluation; `path` None: a bare model, with data.train only if it is to be searched."""
    return load_settings(Config, path, overrides, {"data": {"train": ""}} if path is None else {})


def evaluate_model(config: Config) -> dict[Kind, EvalResult]:
    """The model in model.path on data.eval, without strategy and, where eval.guided asks for it, with."""
    from sgpo.builders.model_engine import resolve_model
    from sgpo.builders.rollouts import build_rewards, build_rollouts
    from sgpo.builders.task import load_task
    from sgpo.evaluation.held_out import evaluate
    from sgpo.model.loading import load_tokenizer

    folder = resolve_model(config)
    tokenizer = load_tokenizer(folder)
    task = load_task(config, tokenizer, split="eval")
    settings = config.eval
    kinds: list[Kind] = ["auto"]
    if settings.guided and any(pair.guided for pair in task.prompts):
        kinds.append("guided")
    sampling = SamplingParams(settings.temperature, settings.top_p, settings.max_new_tokens)
    with build_rewards(config) as rewards, closing(build_rollouts(config, folder)) as engine:
        return {
            kind: evaluate(
                engine, rewards, tokenizer, task, sampling, samples=settings.samples, seed=config.run.seed, kind=kind
            )
            for kind in kinds
        }


def evaluate_benchmarks(
    config: Config, out: Path | None = None, report: Callable[[str], None] = print
) -> list[BenchmarkResult]:
    """Samples what is not on the disk yet, scores it, and writes OUT/NAME.jsonl per benchmark and OUT/summary.json.

    Args:
        out: folder of the results; by default a folder of this model's own under run.output_dir.
        report: takes lines on how far it has come.

    Raises:
        SgpoError: no such benchmark or model, contamination where it is refused, a folder with another setting.
    """
    from sgpo.builders.model_engine import resolve_model
    from sgpo.builders.rollouts import build_rewards, build_rollouts
    from sgpo.evaluation.benchmark_run import BenchmarkRun
    from sgpo.model.loading import load_tokenizer
    from sgpo.utils import distributed

    if distributed.world_size() > 1:
        raise SgpoError("sgpo eval runs as one process; start it without a launcher (one benchmark per GPU, say)")
    folder = resolve_model(config)
    with BenchmarkRun(config, folder, load_tokenizer(folder), out, report) as benchmarks:
        if work := benchmarks.missing():
            with build_rewards(config) as rewards, closing(build_rollouts(config, folder)) as engine:
                benchmarks.sample(work, engine, rewards)
        return benchmarks.finish()


def _print_held_out(results: dict[Kind, EvalResult], out: Path | None) -> None:
    for kind, result in results.items():
        print(
            f"{WORDS[kind]}: avg@{result.k} {result.accuracy:.4f}  95% interval [{result.low:.4f}, {result.high:.4f}]  "
            f"length {result.length:.1f}  truncated {result.truncated:.3f}"
        )
    if out is not None:
        rows = [json.dumps(row) for result in results.values() for row in result.samples]
        out.write_text("\n".join(rows) + "\n", encoding="utf-8")


def _print_benchmarks(config: Config, results: Sequence[BenchmarkResult]) -> None:
    from sgpo.evaluation.benchmark_run import protocol_of

    for result in results:
        print(f"{result.name}: {result.score.sentence()}")
        if result.clean is not None:
            print(f"{result.name} without what is in the training data: {result.clean.sentence()}")
    if len(results) > 1:
        print(f"average: {sum(result.score.accuracy for result in results) / len(results):.4f}")
    print(f"protocol: {protocol_of(config, [(result.name, result.score.samples) for result in results])}")
    print(f"samples and summary: {results[0].file.parent}")


def _print_comparison(a: Path, b: Path, out: Path | None) -> None:
    from sgpo.evaluation.scores import compare_files

    comparisons = compare_files(a, b)
    for comparison in comparisons:
        print(comparison.sentence())
    if out is not None:
        content = [comparison.as_json() for comparison in comparisons]
        out.write_text(json.dumps(content, indent=1), encoding="utf-8")
