"""What a run has logged, as the plots read it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sgpo.reporting.run_files import METRICS_FILE, TRAJECTORIES_FILE, iter_jsonl, read_jsonl
from sgpo.types import SgpoError


@dataclass(frozen=True, slots=True)
class RunData:
    """The metrics of one run: rows by phase, then by step. Rows of one step are merged, the later value counts."""

    path: Path
    phases: dict[str, dict[int, dict[str, Any]]]

    def series(self, phase: str, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps (int64) and values (float64, NaN for null) of one metric; both empty if it never was a number."""
        rows = self.phases.get(phase, {})
        steps = [step for step in sorted(rows) if key in rows[step]]
        values = [number_of(rows[step][key]) for step in steps]
        if all(math.isnan(value) for value in values):
            return np.empty(0, np.int64), np.empty(0)
        return np.array(steps, np.int64), np.array(values)


def number_of(value: Any) -> float:
    """A float, NaN for what is no number."""
    return float(value) if isinstance(value, int | float) else math.nan


def load_run(run_dir: str | Path) -> RunData:
    """Reads run_dir/metrics.jsonl; raises SgpoError if it is absent, damaged or not a metrics file."""
    path = Path(run_dir) / METRICS_FILE
    if not path.exists():
        raise SgpoError(f"{run_dir}: no {METRICS_FILE} here; expected the folder of a run that has started")
    phases: dict[str, dict[int, dict[str, Any]]] = {}
    for number, row in enumerate(iter_jsonl(path), start=1):
        if "phase" not in row or "step" not in row:
            raise SgpoError(f'{path}:{number}: a row without "phase" and "step"; expected a file written by sgpo train')
        phases.setdefault(row["phase"], {}).setdefault(row["step"], {}).update(row)
    return RunData(Path(run_dir), phases)


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One teacher completion: token texts, KL in nats (float64 [T]), masked (bool [T]), threshold or None."""

    step: int
    problem_id: str
    tokens: list[str]
    kl: np.ndarray
    masked: np.ndarray
    max_token_kl: float | None


def load_trajectory(run_dir: Path) -> Trajectory | None:
    """The latest trajectory with a masked token, or else the latest; None if the run has none."""
    path = run_dir / TRAJECTORIES_FILE
    rows = [row for row in read_jsonl(path) if row["tokens"]] if path.exists() else []
    if not rows:
        return None
    row = next((row for row in reversed(rows) if any(row["masked"])), rows[-1])
    kl = np.array([number_of(value) for value in row["kl"]])
    return Trajectory(
        row["step"], row["problem_id"], row["tokens"], kl, np.array(row["masked"], bool), row["max_token_kl"]
    )
