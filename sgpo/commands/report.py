"""`sgpo report`: the page of one run anew, or several runs on one page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sgpo.utils.config_file import no_words

SETTINGS = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run folders."""
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="folder of the comparison (several runs)")


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Writes the page of one run, or the comparison of several."""
    no_words(words)
    from sgpo.reporting.comparison import compare_runs
    from sgpo.reporting.run_report import write_report

    if len(arguments.runs) == 1 and arguments.out is None:
        print(write_report(arguments.runs[0]))
    else:
        print(compare_runs(arguments.runs, arguments.out or Path("comparison")))
    return 0
