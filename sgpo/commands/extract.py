"""`sgpo strategies extract`: binds its settings to files, a backend, the leak check and the display.

Three files: OUTPUT (one problem with its strategy per line, in the order of the input; replaced as a whole at the end),
the cache of all answers, and the report, which lists by id every problem that got no strategy, with the reasons.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from sgpo.config import Config
from sgpo.data.problems import load_problems
from sgpo.rewards.thinking import after_thinking
from sgpo.strategies import calculator
from sgpo.strategies.asking import AnswerCache, Asker, Backend, Sampling
from sgpo.strategies.display import ExtractDisplay
from sgpo.strategies.extract_report import report_details, status_line
from sgpo.strategies.extraction import Candidate, Extraction, Settings, Source, best
from sgpo.strategies.formulas import formula_comparer
from sgpo.strategies.leakage import Solution, find_leaks
from sgpo.strategies.questions import Templates
from sgpo.strategies.settings import ExtractConfig
from sgpo.types import Problem, SgpoError
from sgpo.utils.config_file import checked, config_first, load_settings
from sgpo.utils.files import check_writable, write_whole

_ANY_LENGTH = 2**20  # tokens of a prompt: the positions of the local model are what limits it


SETTINGS = ExtractConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The config file is optional, so it is among the words."""
    parser.usage = "sgpo strategies extract [config.yaml] --input FILE --output FILE [--key value ...]"


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Extracts; exit code 1 where a problem got no strategy."""
    path, overrides = config_first(words)
    config = load_settings(ExtractConfig, path, overrides)
    report = extract(config)
    lacking = report["without_strategy"]
    print(f"{config.output}: a strategy for {report['with_strategy']} of {report['problems']} problems")
    for problem_id, reasons in list(lacking.items())[:20]:
        print(f"  none for {problem_id}: {reasons[0]}")
    print(f"report: {config.report or config.output + '.report.json'}")
    return 1 if lacking else 0


def extract(config: ExtractConfig) -> dict[str, Any]:
    """Runs or resumes the extraction; returns the report that it also writes.

    Raises SgpoError for what is wrong with input, settings or endpoint, before the first question where that can be
    known.
    """
    output = Path(config.output)
    report_path = Path(config.report or f"{output}.report.json")
    sources, skipped = load_sources(config)
    for path in (output, report_path):
        check_writable(path)
    if config.backend == "calculator_trace":
        rows, lacking, details = _from_traces(config, sources)
    else:
        rows, lacking, details = _from_model(config, sources)
    lacking = {**skipped, **lacking}
    report = {
        "input": config.input,
        "output": config.output,
        "backend": config.backend,
        "problems": len(sources) + len(skipped),
        "with_strategy": len(rows),
        "without_strategy": lacking,
        **details,
    }
    write_whole(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_whole(report_path, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return report


def load_sources(config: ExtractConfig) -> tuple[list[Source], dict[str, list[str]]]:
    """What can be asked about, and by id why the other problems cannot.

    Raises SgpoError where a row is bad or lacks the response, or where nothing is left.
    """
    sources: list[Source] = []
    skipped: dict[str, list[str]] = {}
    lacking: list[str] = []
    for problem in load_problems(config.input, limit=config.limit):
        response = problem.solution if config.response_key == "solution" else problem.extra.get(config.response_key)
        if not isinstance(response, str) or not response.strip():
            lacking.append(problem.id)
            continue
        shown = response if config.thinking == "keep" else after_thinking(response)
        if shown is None or not shown.strip():
            skipped[problem.id] = ["the response has nothing after its thinking part"]
        else:
            sources.append(Source(problem, shown.strip(), response))
    if lacking:
        raise SgpoError(
            f"{config.input}: {len(lacking)} rows lack a text under {config.response_key!r} "
            f"(first: {', '.join(lacking[:3])}); add it, or name the field that holds the response with response_key"
        )
    if not sources:
        raise SgpoError(f"{config.input}: no response has anything after its thinking part; set thinking to keep")
    return sources, skipped


# ---- with a model --------------------------------------------------------------------------------------------------

Outcome = tuple[list[dict[str, Any]], dict[str, list[str]], dict[str, Any]]
"""Rows of the output, reasons by id of problems without a strategy, and the details of the report."""


def _from_model(config: ExtractConfig, sources: Sequence[Source]) -> Outcome:
    templates = Templates.load(config.template)
    backend = _endpoint_backend(config) if config.backend == "openai" else _local_backend(config)
    cache_path = Path(config.cache or f"{config.output}.cache.jsonl")
    with AnswerCache(cache_path) as cache, formula_comparer(config.leaks) as equal, closing(backend):
        display = ExtractDisplay(lambda: status_line(config, asker.usage, extraction.tally))
        asker = Asker(backend, cache, display.advance)
        extraction = Extraction(
            sources,
            _settings(config),
            templates,
            asker,
            after_thinking=after_thinking,
            equal=equal,
            on_round=display.start_round,
        )
        with display:
            groups = extraction.run()
    rows, lacking = [], {}
    for source, group in zip(sources, groups, strict=True):
        if (chosen := best(group)) is not None:
            rows.append(_row(config, source.problem, chosen))
        else:
            lacking[source.problem.id] = [f"candidate {c.index + 1}: {c.rejected}" for c in group]
    return rows, lacking, report_details(config, backend, asker.usage, extraction.tally, groups)


def _settings(config: ExtractConfig) -> Settings:
    return Settings(
        candidates=config.candidates,
        max_asks=config.max_asks,
        sampling=Sampling(config.temperature, config.top_p, config.max_tokens),
        scoring=Sampling(config.score_temperature, config.top_p, config.max_tokens),
        seed=config.seed,
    )


def _endpoint_backend(config: ExtractConfig) -> Backend:
    from sgpo.strategies.endpoint import EndpointBackend

    return EndpointBackend(config.endpoint)


def _local_backend(config: ExtractConfig) -> Backend:
    """The engine that `sgpo train` would sample with, for the model of the `local` section."""
    asked = {"rollout": {"max_new_tokens": config.max_tokens}, "eval": {"max_new_tokens": config.max_tokens}}
    raw: dict[str, Any] = {**config.local, "data": {"train": config.input, "max_prompt_tokens": _ANY_LENGTH}}
    for section, values in asked.items():
        given = raw.get(section, {})
        if not isinstance(given, dict):
            raise SgpoError(f"local.{section} must be a section, as in --local.rollout.engine hf")
        raw[section] = {**values, **given}
    run = checked(Config, raw, "local")
    from sgpo.builders.rollouts import build_rollouts
    from sgpo.model.loading import load_tokenizer, positions_of
    from sgpo.strategies.local import LocalBackend

    folder = Path(run.model.path)
    tokenizer = load_tokenizer(folder)
    weights = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in folder.glob("*.safetensors"))
    return LocalBackend(
        build_rollouts(run, folder),
        tokenizer,
        identity={"model": str(folder.resolve()), "weights": weights, "dtype": run.model.dtype},
        max_positions=positions_of(folder),
        batch=config.local_batch,
    )


def _row(config: ExtractConfig, problem: Problem, chosen: Candidate) -> dict[str, Any]:
    return {
        **_training_row(config, problem, chosen.strategy or ""),
        "strategy_score": round(chosen.score, 6),
        "strategy_scores": chosen.scores,
        "strategy_candidate": chosen.index,
        "strategy_model": config.endpoint.model if config.backend == "openai" else config.local["model"]["path"],
    }


def _training_row(config: ExtractConfig, problem: Problem, strategy: str) -> dict[str, Any]:
    """As `load_problems` reads it: all fields of the input but the response."""
    row: dict[str, Any] = {"id": problem.id, "problem": problem.problem, "answer": problem.answer, "strategy": strategy}
    if problem.solution is not None:
        row["solution"] = problem.solution
    if problem.guidance_turns:
        row["guidance_turns"] = [{"role": turn.role, "content": turn.content} for turn in problem.guidance_turns]
    return {**row, **{key: value for key, value in problem.extra.items() if key != config.response_key}}


# ---- without a model -----------------------------------------------------------------------------------------------


def _from_traces(config: ExtractConfig, sources: Sequence[Source]) -> Outcome:
    rows, lacking, leaking = [], {}, 0
    with formula_comparer(config.leaks) as equal:
        for source in sources:
            problem = source.problem
            strategy = calculator.strategy_from_calculator_trace(source.shown, problem.problem)
            if strategy is None:
                lacking[problem.id] = ["the response has no <<...>> calculator marks"]
                continue
            solution = Solution(problem.problem, source.response, problem.answer)
            found = calculator.leaks(strategy, problem) or [leak.text for leak in find_leaks(strategy, solution, equal)]
            if found:
                leaking += 1
                lacking[problem.id] = [f"it gave results away: {', '.join(found)}"]
                continue
            rows.append(_training_row(config, problem, strategy))
    return rows, lacking, {"leaks": {"leaking_answers": leaking}}
