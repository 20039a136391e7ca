"""Command line: sgpo warmup | train | plan | eval | strategies extract | report | env.

Exit code 2 and one sentence for what the user can mend.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from sgpo.schema import SgpoError


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    arguments, overrides = parser.parse_known_args(argv)
    try:
        code = arguments.run(arguments, overrides)
        if "torch" in sys.modules:
            from sgpo.engine import ranks

            ranks.settle()
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
        required=True, metavar="warmup | train | plan | eval | strategies | report | env", parser_class=_Command
    )
    for name, run, text in (
        ("warmup", _warmup, "SFT warm-up on demonstrations; writes RUN/warmup/best"),
        ("train", _train, "SGPO (or GRPO) training; resumes by itself"),
        ("plan", _plan, "memory and time by phase before anything is loaded; exit code 1 where it does not fit"),
        ("eval", _eval, "avg@k of a model with a bootstrap interval"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("config", type=Path, help="YAML file; any key can be given as --section.key value")
        if name == "eval":
            command.add_argument("--out", type=Path, help="write every sample to this JSONL file")
        if name == "plan":
            command.add_argument("--json", action="store_true", help="the plan as JSON")
            command.add_argument("--rates", type=Path, help="measured rates: a YAML file with the keys of plan.rates")
        command.set_defaults(run=run)
    strategies = commands.add_parser("strategies", help="strategies out of strong-model responses")
    actions = strategies.add_subparsers(required=True, metavar="extract", parser_class=_Command)
    text = "one strategy per problem, from responses; exit code 1 where a problem got none; goes on where it stopped"
    extract = actions.add_parser(
        "extract",
        usage="sgpo strategies extract [config.yaml] --input FILE --output FILE [--key value ...]",
        help=text,
        description=text,
    )
    extract.set_defaults(run=_extract)
    report = commands.add_parser("report", help="rebuild report.html of a run folder, or compare several")
    report.add_argument("runs", type=Path, nargs="+")
    report.add_argument("--out", type=Path, help="folder of the comparison (several runs)")
    report.set_defaults(run=_report)
    env = commands.add_parser("env", help="versions, devices, commit")
    env.set_defaults(run=_env)
    return parser


class _Command(argparse.ArgumentParser):
    """Lists all knobs in the help of a command that takes a config; made only when help is really printed."""

    def format_help(self) -> str:
        from sgpo.config import describe

        knobs = describe() if any(action.dest == "config" for action in self._actions) else ""
        if self.get_default("run") is _extract:
            from sgpo.strategies.settings import ExtractConfig

            knobs = describe(ExtractConfig)
        return super().format_help() + (f"\nknobs:\n{knobs}\n" if knobs else "")


def _train(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from sgpo.config import load_config

    config = load_config(arguments.config, overrides)
    from sgpo.plan import check_run

    check_run(config)
    from sgpo.trainer import train

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
    from sgpo.plan import as_dict, plan_run, table

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
    from sgpo.models import load_tokenizer
    from sgpo.warmup import run_warmup

    device = init_distributed(config.run.timeout_s)
    assembly.on_rank_zero_first(lambda: assembly.prepare_run_folder(config))
    folder = Path(assembly.on_rank_zero_first(lambda: assembly.resolve_model(config)))
    best = run_warmup(config, folder, load_tokenizer(folder), device)
    if _is_main():
        print(f"{config.run.name}: warm-up model in {best}")
    return 0


def _eval(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from sgpo.config import load_config

    config = load_config(arguments.config, overrides)
    if not config.data.eval:
        raise SgpoError(f"{arguments.config}: sgpo eval needs data.eval")
    from sgpo.evaluate import evaluate_model

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


def _extract(_: argparse.Namespace, words: Sequence[str]) -> int:
    from sgpo.config import load_settings
    from sgpo.strategies.settings import ExtractConfig

    path = Path(words[0]) if words and not words[0].startswith("--") else None
    config = load_settings(ExtractConfig, path, words if path is None else words[1:])
    from sgpo.extract import extract

    report = extract(config)
    lacking = report["without_strategy"]
    print(f"{config.output}: a strategy for {report['with_strategy']} of {report['problems']} problems")
    for problem_id, reasons in list(lacking.items())[:20]:
        print(f"  none for {problem_id}: {reasons[0]}")
    print(f"report: {config.report or config.output + '.report.json'}")
    return 1 if lacking else 0


def _report(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    _no_overrides(overrides)
    from sgpo.report import compare_runs, write_report

    if len(arguments.runs) == 1 and arguments.out is None:
        print(write_report(arguments.runs[0]))
    else:
        print(compare_runs(arguments.runs, arguments.out or Path("comparison")))
    return 0


def _env(_: argparse.Namespace, overrides: Sequence[str]) -> int:
    _no_overrides(overrides)
    from sgpo.provenance import environment

    print(json.dumps(environment(), indent=1))
    return 0


def _no_overrides(overrides: Sequence[str]) -> None:
    if overrides:
        raise SgpoError(f"unexpected argument {overrides[0]!r}")


def _is_main() -> bool:
    from sgpo.engine import ranks

    return ranks.is_main()


if __name__ == "__main__":
    sys.exit(main())
