"""`sgpo train`: checks that the run fits, trains, says where the report is."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sgpo.config import Config
from sgpo.planning.plan import check_run
from sgpo.utils.config_file import load_settings

SETTINGS = Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The config, and whether to profile."""
    parser.add_argument("config", type=Path, help="YAML file; any key can be given as --section.key value")
    parser.add_argument("--profile", action="store_true", help="memory per stage, MFU, a memory timeline")


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Trains; the config is checked and planned before torch is loaded."""
    profile = ["--log.profile", "true"] if arguments.profile else []
    config = load_settings(Config, arguments.config, [*words, *profile])
    check_run(config)
    from sgpo.train.trainer import train
    from sgpo.utils import distributed

    summary = train(config)
    if distributed.is_main():
        before, after = summary["accuracy_before"], summary["accuracy_after"]
        if after is not None:
            print(f"{config.run.name}: held-out accuracy {before:.3f} -> {after:.3f}")
        print(f"report: {config.run.dir / 'report.html'}")
    return 0
