"""No test waits for a number of seconds that somebody guessed on an idle machine."""

import os
import re
from pathlib import Path

import processes
import pytest

# A limit in seconds, as keyword, as knob of a config or to `limit_s`. From 1000 on it means "never".
NUMBER = r"([1-9]\d{0,2}(?:\.\d+)?)\b(?!\d)"
LIMIT = re.compile(
    rf"""\b(?:timeout|timeout_s|stall_s|slow_s|limit_s)\s*=\s*{NUMBER}|"[\w.]*(?:timeout|stall)_s"\s*:\s*{NUMBER}"""
)


def test_every_time_limit_of_the_tests_is_scaled():
    here = Path(__file__)
    found = {}
    for path in sorted(here.parent.rglob("*.py")):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if LIMIT.search(line)]
        if lines and path != here:
            found[str(path.relative_to(here.parent))] = lines
    assert found == {}, "processes.scaled(seconds)"


@pytest.mark.parametrize(("load", "cores", "factor"), [(0.5, 2, 1.0), (14.0, 2, 7.0), (14.0, 28, 1.0)])
def test_a_limit_grows_with_the_load(monkeypatch, load, cores, factor):
    monkeypatch.setenv(processes._FACTOR, "1.0")
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert processes.scaled(3.0) == 3.0 * factor


def test_a_process_that_waits_for_its_turn_has_longer_limits(monkeypatch):
    """Wall time of the calibration over its CPU time; children inherit what the first has measured."""
    monkeypatch.delenv(processes._FACTOR, raising=False)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    wall = iter([0.0, 0.8])
    monkeypatch.setattr(processes.time, "monotonic", lambda: next(wall))
    assert processes.scaled(1.0) == pytest.approx(0.8 / processes._CALIBRATION_S, rel=0.5)
    monkeypatch.setenv(processes._FACTOR, "5.0")
    assert processes.scaled(2.0) == 10.0
