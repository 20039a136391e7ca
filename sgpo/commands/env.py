"""`sgpo env`: what a result depends on beside the config."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from sgpo.utils.config_file import no_words
from sgpo.utils.provenance import environment

SETTINGS = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None: it prints versions, devices and the commit."""


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Prints versions, devices and the commit as JSON."""
    no_words(words)
    print(json.dumps(environment(), indent=1))
    return 0
