"""The command line: finds the verb, gives it its words, turns errors into one sentence and an exit code.

Exit code 2 and one sentence for what the user can mend. What a verb does stands in sgpo/commands, one file each, which
is imported when the verb is given: help and `sgpo plan` need no torch.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from sgpo.types import SgpoError
from sgpo.utils.provenance import installed_version

VERBS = {
    "warmup": "SFT warm-up on demonstrations; writes RUN/warmup/best",
    "train": "SGPO (or GRPO) training; resumes by itself",
    "plan": "memory and time by phase before anything is loaded; exit code 1 where it does not fit",
    "eval": "avg@k and pass@k of a model with intervals, on data.eval or named benchmarks; comparison of two results",
    "strategies extract": "one strategy per problem, from responses; exit code 1 where a problem got none; goes on "
    "where it stopped",
    "strategies analyze": "pass rates with own, foreign and empty strategies, similarity, token KL; goes on where it "
    "stopped",
    "study": "a grid of variants and seeds, each cell a training run; then one table with intervals and paired tests",
    "report": "rebuild report.html of a run folder, or compare several",
    "verify": "why the reward calls an answer right or wrong, step by step; or the results on a file of pairs",
    "env": "versions, devices, commit",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    try:
        if (found := _find_command(list(sys.argv[1:] if argv is None else argv))) is None:
            return 0
        command, arguments, words = found
        code = command.run(arguments, words)
        if "torch" in sys.modules:
            from sgpo.utils import distributed

            distributed.wait_for_gloo()
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


def _find_command(words: list[str]) -> tuple[ModuleType, argparse.Namespace, list[str]] | None:
    """The module of sgpo.commands, its parsed arguments and the words left over; None where help or the version was
    asked for, which is then printed."""
    if words[:1] == ["--version"]:
        print(f"sgpo {installed_version('sgpo') or '(not installed)'}")
        return None
    verb = next((name for name in VERBS if words[: len(name.split())] == name.split()), None)
    if verb is None:
        _print_help(words)
        return None
    command = importlib.import_module(f"sgpo.commands.{verb.split()[-1]}")
    arguments, rest = _parser(verb, command).parse_known_args(words[len(verb.split()) :])
    return command, arguments, rest


def _print_help(words: list[str]) -> None:
    """Where it or nothing is asked for (`sgpo`, `sgpo --help`, `sgpo strategies`); else SgpoError: no such command."""
    group = [name for name in VERBS if words and name.startswith(f"{words[0]} ")]
    asked = words[1:] if group else words
    if asked and asked[0] not in ("-h", "--help"):
        typed = " ".join([*(words[:1] if group else []), asked[0]])
        close = difflib.get_close_matches(typed, group or {name.split()[0] for name in VERBS}, n=1, cutoff=0.5)
        meant = f"did you mean {close[0]}?" if close else f"choose from {', '.join(group or VERBS)}"
        raise SgpoError(f"there is no command {typed!r}; {meant}")
    print("usage: sgpo COMMAND ...\n\nStrategy-Guided Policy Optimization\n\ncommands (each has --help):")
    for name in group or VERBS:
        print(f"  {name:<20}{VERBS[name]}")
    print("\n  --version           the version of this package")


class _Parser(argparse.ArgumentParser):
    """Lists the knobs of the command's settings in its help; made only when help is really printed."""

    command: ModuleType

    def format_help(self) -> str:
        if self.command.SETTINGS is None:
            return super().format_help()
        from sgpo.utils.config_file import describe

        return f"{super().format_help()}\nknobs:\n{describe(self.command.SETTINGS)}\n"


def _parser(verb: str, command: ModuleType) -> argparse.ArgumentParser:
    parser = _Parser(prog=f"sgpo {verb}", description=VERBS[verb])
    parser.command = command
    command.add_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
