"""Command line: sgpo warmup | train | plan | eval | strategies extract, analyze | study | report | env.

Exit code 2 and one sentence for what the user can mend.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sgpo.types import SgpoError


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    arguments, overrides = parser.parse_known_args(argv)
    try:
        code = arguments.run(arguments, overrides)
        if "torch" in sys.modules:
            from sgpo.utils import distributed

            distributed.settle()
        return code
    except SgpoError as error:
        print(f"sgpo: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("sgpo"):
            raise
        print(f"sgpo: the package {error.name} is not installed; pip install 'sgpo[train]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sgpo: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sgpo", description="Strategy-Guided Policy Optimization")
    commands = parser.add_subparsers(
        required=True,
        metavar="warmup | train | plan | eval | strategies | study | report | env",
        parser_class=_Command,
    )
    for name, run, text in (
        ("warmup", _warmup, "SFT warm-up on demonstrations; writes RUN/warmup/best"),
        ("train", _train, "SGPO (or GRPO) training; resumes by itself"),
        ("plan", _plan, "memory and time by phase before anything is loaded; exit code 1 where it does not fit"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("config", type=Path, help="YAML file; any key can be given as --section.key value")
        if name == "train":
            command.add_argument("--profile", action="store_true", help="memory per stage, MFU, a memory timeline")
        if name == "plan":
            command.add_argument("--json", action="store_true", help="the plan as JSON")
            command.add_argument("--rates", type=Path, help="measured rates: a YAML file with the keys of plan.rates")
        command.set_defaults(run=run)
    _add_eval(commands)
    strategies = commands.add_parser("strategies", help="strategies out of strong-model responses; are they reusable?")
    actions = strategies.add_subparsers(required=True, metavar="extract | analyze", parser_class=_Command)
    text = "one strategy per problem, from responses; exit code 1 where a problem got none; goes on where it stopped"
    extract = actions.add_parser(
        "extract",
        usage="sgpo strategies extract [config.yaml] --input FILE --output FILE [--key value ...]",
        help=text,
        description=text,
    )
    extract.set_defaults(run=_extract)
    text = "pass rates with own, foreign and empty strategies, similarity, token KL; goes on where it stopped"
    analyze = actions.add_parser(
        "analyze", usage="sgpo strategies analyze [config.yaml] [--key value ...]", help=text, description=text
    )
    analyze.set_defaults(run=_analyze)
    text = "a grid of variants and seeds, each cell a training run; then one table with intervals and paired tests"
    study = commands.add_parser("study", help=text, description=text)
    study.add_argument("study", type=Path, help="YAML file: base config, seeds, variants")
    study.add_argument("--list", action="store_true", help="print each cell and its commands, run nothing")
    study.add_argument("--cell", help="run this cell alone (a scheduler runs one per job)")
    study.add_argument("--report", action="store_true", help="only rebuild table and curves")
    study.add_argument("--results", type=Path, help="with --report: rows to take in place of the study's own")
    study.add_argument("--out", type=Path, help="with --report: folder to write to; default the study's")
    study.set_defaults(run=_study)
    report = commands.add_parser("report", help="rebuild report.html of a run folder, or compare several")
    report.add_argument("runs", type=Path, nargs="+")
    report.add_argument("--out", type=Path, help="folder of the comparison (several runs)")
    report.set_defaults(run=_report)
    env = commands.add_parser("env", help="versions, devices, commit")
    env.set_defaults(run=_env)
    return parser


def _add_eval(commands: Any) -> None:
    text = "avg@k and pass@k of a model with intervals, on data.eval or named benchmarks; comparison of two results"
    command = commands.add_parser(
        "eval",
        usage="sgpo eval [config.yaml] [--out PATH] [--key value ...]\n"
        "       sgpo eval --model.path FOLDER --eval.benchmarks NAME,NAME --eval.benchmark_dir FOLDER\n"
        "       sgpo eval --compare A B [--out FILE]",
        help=text,
        description=text,
    )
    command.add_argument("--out", type=Path, help="data.eval: JSONL file of the samples; benchmarks: folder of results")
    command.add_argument(
        "--compare", type=Path, nargs=2, metavar=("A", "B"), help="folders (or JSONL files) of two finished evaluations"
    )
    command.set_defaults(run=_eval)


class _Command(argparse.ArgumentParser):
    """Lists all knobs in the help of a command that takes a config; made only when help is really printed."""

    def format_help(self) -> str:
        from sgpo.config import describe

        takes_config = any(action.dest == "config" for action in self._actions) or self.get_default("run") is _eval
        knobs = describe() if takes_config else ""
        if self.get_default("run") is _extract:
            from sgpo.strategies.settings import ExtractConfig

            knobs = describe(ExtractConfig)
        if self.get_default("run") is _analyze:
            from sgpo.strategies.settings import AnalyzeConfig

            knobs = describe(AnalyzeConfig)
        return super().format_help() + (f"\nknobs:\n{knobs}\n" if knobs else "")


def _train(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from sgpo.config import load_config

    profile = ["--log.profile", "true"] if arguments.profile else []
    config = load_config(arguments.config, [*overrides, *profile])
    from sgpo.planning.plan import check_run

    check_run(config)
    from sgpo.train.trainer import train

    summary = train(config)
    if _is_main():
        before, after = summary["accuracy_before"], summary["accuracy_after"]
        if after is not None:
            print(f"{config.run.name}: held-out accuracy {before:.3f} -> {after:.3f}")
        print(f"report: {config.run.dir / 'report.html'}")
    return 0


def _plan(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from sgpo.config import RatesConfig, load_config, load_settings

    rates = load_settings(RatesConfig, arguments.rates) if arguments.rates else RatesConfig()
    given = [
        word
        for key, value in rates.model_dump(exclude_none=True).items()
        for word in (f"--plan.rates.{key}", str(value))
    ]
    config = load_config(arguments.config, [*given, *overrides])
    from sgpo.planning.plan import as_dict, plan_run, table

    plan = plan_run(config)
    print(json.dumps(as_dict(plan), indent=1) if arguments.json else table(plan))
    return 0 if plan.fits else 1


def _warmup(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from sgpo.config import load_config

    config = load_config(arguments.config, overrides)
    if config.warmup.data is None:
        raise SgpoError(f"{arguments.config}: sgpo warmup needs warmup.data")
    from sgpo import assembly
    from sgpo.engine.zero import init_distributed
    from sgpo.model.policy import load_tokenizer
    from sgpo.train.sft import run_warmup

    device = init_distributed(config.run.timeout_s)
    assembly.on_rank_zero_first(lambda: assembly.prepare_run_folder(config))
    folder = Path(assembly.on_rank_zero_first(lambda: assembly.resolve_model(config)))
    best = run_warmup(config, folder, load_tokenizer(folder), device)
    if _is_main():
        print(f"{config.run.name}: warm-up model in {best}")
    return 0


def _eval(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    if arguments.compare is not None:
        _no_overrides(words)
        return _compare(arguments)
    from sgpo.config import load_eval_config

    path, overrides = _config_first(words)
    config = load_eval_config(path, overrides)
    if config.eval.benchmarks:
        return _benchmarks(config, arguments.out)
    if not config.data.eval:
        raise SgpoError(f"{path or 'command line'}: sgpo eval needs data.eval or eval.benchmarks")
    from sgpo.evaluation.held_out import evaluate_model

    results = evaluate_model(config)
    for kind, result in results.items():
        print(
            f"{kind}: avg@{result.k} {result.accuracy:.4f}  95% interval [{result.low:.4f}, {result.high:.4f}]  "
            f"length {result.length:.1f}  truncated {result.truncated:.3f}"
        )
    if arguments.out is not None:
        rows = [json.dumps(row) for result in results.values() for row in result.samples]
        arguments.out.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return 0


def _benchmarks(config: Any, out: Path | None) -> int:
    from sgpo.evaluation.benchmark_run import evaluate_benchmarks, protocol_of

    results = evaluate_benchmarks(config, out)
    for result in results:
        print(f"{result.name}: {result.score.sentence()}")
        if result.clean is not None:
            print(f"{result.name} without what is in the training data: {result.clean.sentence()}")
    if len(results) > 1:
        print(f"average: {sum(result.score.accuracy for result in results) / len(results):.4f}")
    print(f"protocol: {protocol_of(config, [(result.name, result.score.samples) for result in results])}")
    print(f"samples and summary: {results[0].file.parent}")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from sgpo.evaluation.scores import compare_files

    comparisons = compare_files(*arguments.compare)
    for comparison in comparisons:
        print(comparison.sentence())
    if arguments.out is not None:
        content = [comparison.as_json() for comparison in comparisons]
        arguments.out.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return 0


def _extract(_: argparse.Namespace, words: Sequence[str]) -> int:
    from sgpo.config import load_settings
    from sgpo.strategies.settings import ExtractConfig

    path, overrides = _config_first(words)
    config = load_settings(ExtractConfig, path, overrides)
    from sgpo.commands.extract import extract

    report = extract(config)
    lacking = report["without_strategy"]
    print(f"{config.output}: a strategy for {report['with_strategy']} of {report['problems']} problems")
    for problem_id, reasons in list(lacking.items())[:20]:
        print(f"  none for {problem_id}: {reasons[0]}")
    print(f"report: {config.report or config.output + '.report.json'}")
    return 1 if lacking else 0


def _study(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from sgpo.commands.study import Study, report_study, run_study

    study = Study(arguments.study, overrides)
    if arguments.list:
        for cell in study.cells:
            print(cell.name)
            for command in study.commands(cell):
                print("  " + shlex.join(["sgpo", *command]))
        return 0
    if not arguments.report:
        run_study(study, [study.cell(arguments.cell)] if arguments.cell else study.cells)
    if arguments.cell is None:
        report = report_study(study, arguments.results, arguments.out)
        print((report.parent / "table.md").read_text(encoding="utf-8"))
        print(f"report: {report}")
    return 0


def _analyze(_: argparse.Namespace, words: Sequence[str]) -> int:
    from sgpo.config import load_settings
    from sgpo.strategies.settings import AnalyzeConfig

    path, overrides = _config_first(words)
    config = load_settings(AnalyzeConfig, path, overrides)
    from sgpo.analysis.analyze import analyze, output_folder

    for arm in analyze(config)["arms"]:
        rate = arm["rate"]
        if rate["low"] is not None:
            interval = f"95% interval [{rate['low']:.4f}, {rate['high']:.4f}]"
            print(f"{arm['arm']}: {rate['mean']:.4f}  {interval}  {rate['problems']} problems")
    print(f"report: {output_folder(config) / 'report.html'}")
    return 0


def _config_first(words: Sequence[str]) -> tuple[Path | None, Sequence[str]]:
    """The config file, where the first word is one, and the overrides."""
    return (Path(words[0]), words[1:]) if words and not words[0].startswith("--") else (None, words)


def _report(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    _no_overrides(overrides)
    from sgpo.reporting.run_report import compare_runs, write_report

    if len(arguments.runs) == 1 and arguments.out is None:
        print(write_report(arguments.runs[0]))
    else:
        print(compare_runs(arguments.runs, arguments.out or Path("comparison")))
    return 0


def _env(_: argparse.Namespace, overrides: Sequence[str]) -> int:
    _no_overrides(overrides)
    from sgpo.utils.provenance import environment

    print(json.dumps(environment(), indent=1))
    return 0


def _no_overrides(overrides: Sequence[str]) -> None:
    if overrides:
        raise SgpoError(f"unexpected argument {overrides[0]!r}")


def _is_main() -> bool:
    from sgpo.utils import distributed

    return distributed.is_main()


if __name__ == "__main__":
    sys.exit(main())
