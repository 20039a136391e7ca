"""`sgpo strategies analyze`: are strategies reusable?"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sgpo.analysis.settings import AnalyzeConfig
from sgpo.utils.config_file import config_first, load_settings

SETTINGS = AnalyzeConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The config file is optional, so it is among the words."""
    parser.usage = "sgpo strategies analyze [config.yaml] [--key value ...]"


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Analyses, then prints the pass rate of each arm."""
    path, overrides = config_first(words)
    config = load_settings(AnalyzeConfig, path, overrides)
    from sgpo.analysis.analyze import analyze, output_folder

    for arm in analyze(config)["arms"]:
        rate = arm["rate"]
        if rate["low"] is not None:
            interval = f"95% interval [{rate['low']:.4f}, {rate['high']:.4f}]"
            print(f"{arm['arm']}: {rate['mean']:.4f}  {interval}  {rate['problems']} problems")
    print(f"report: {output_folder(config) / 'report.html'}")
    return 0
