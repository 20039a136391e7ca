"""`sgpo warmup`: the SFT warm-up alone; `sgpo train` with warmup.enabled runs it by itself."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sgpo.config import Config
from sgpo.types import SgpoError
from sgpo.utils.config_file import load_settings

SETTINGS = Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The config."""
    parser.add_argument("config", type=Path, help="YAML file; any key can be given as --section.key value")


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Warms up, into the run's folder."""
    config = load_settings(Config, arguments.config, words)
    if config.warmup.data is None:
        raise SgpoError(f"{arguments.config}: sgpo warmup needs warmup.data")
    from sgpo.builders.model_engine import resolve_model
    from sgpo.builders.run_folder import open_run_folder
    from sgpo.engine.zero import init_distributed
    from sgpo.model.loading import load_tokenizer
    from sgpo.train.sft import run_warmup
    from sgpo.utils import distributed

    device = init_distributed(config.run.timeout_s)
    open_run_folder(config)
    folder = resolve_model(config)
    best = run_warmup(config, folder, load_tokenizer(folder), device)
    if distributed.is_main():
        print(f"{config.run.name}: warm-up model in {best}")
    return 0
