"""`sgpo plan`: memory and time of a run, before anything is loaded."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from sgpo.config import Config, RatesConfig
from sgpo.planning.plan import as_dict, plan_run, table
from sgpo.utils.config_file import load_settings

SETTINGS = Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The config, and how the plan is printed."""
    parser.add_argument("config", type=Path, help="YAML file; any key can be given as --section.key value")
    parser.add_argument("--json", action="store_true", help="the plan as JSON")
    parser.add_argument("--rates", type=Path, help="measured rates: a YAML file with the keys of plan.rates")


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Prints the plan; exit code 1 where it does not fit."""
    rates = load_settings(RatesConfig, arguments.rates) if arguments.rates else RatesConfig()
    given = [
        word
        for key, value in rates.model_dump(exclude_none=True).items()
        for word in (f"--plan.rates.{key}", str(value))
    ]
    plan = plan_run(load_settings(Config, arguments.config, [*given, *words]))
    print(json.dumps(as_dict(plan), indent=1) if arguments.json else table(plan))
    return 0 if plan.fits else 1
