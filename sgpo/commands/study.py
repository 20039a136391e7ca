"""`sgpo study`: a grid of (variant, seed) from one YAML file, each cell a run of `sgpo train`, then one table.

A cell is a process of its own, started with the command that `--list` prints, so that a scheduler can run the cells
instead. What a cell gave is kept as one row; a row with the same settings is never computed again.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, model_validator

from sgpo.config import Config, Section
from sgpo.reporting.run_files import METRICS_FILE, iter_jsonl
from sgpo.reporting.study_report import write_study_report
from sgpo.types import SgpoError
from sgpo.utils.config_file import load_settings
from sgpo.utils.files import write_whole
from sgpo.utils.provenance import commit, versions

SETTINGS = None
_WARMUP_SECTIONS = ("model", "data", "warmup", "engine")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The study file, and which part of the study to do."""
    parser.add_argument("study", type=Path, help="YAML file: base config, seeds, variants")
    parser.add_argument("--list", action="store_true", help="print each cell and its commands, run nothing")
    parser.add_argument("--cell", help="run this cell alone (a scheduler runs one per job)")
    parser.add_argument("--report", action="store_true", help="only rebuild table and curves")
    parser.add_argument("--results", type=Path, help="with --report: rows to take in place of the study's own")
    parser.add_argument("--out", type=Path, help="with --report: folder to write to; default the study's")


def run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Runs the cells that are asked for, then writes the table."""
    study = Study(arguments.study, words)
    if arguments.list:
        for cell in study.cells:
            print(cell.name)
            for command in study.commands(cell):
                print("  " + shlex.join(["sgpo", *command]))
        return 0
    if not arguments.report:
        run_study(study, [study.cell(arguments.cell)] if arguments.cell else study.cells)
    if arguments.cell is None:
        report = report_study(study, arguments.results, arguments.out)
        print((report.parent / "table.md").read_text(encoding="utf-8"))
        print(f"report: {report}")
    return 0


class Variant(Section):
    """One row of the grid: what it changes of the base config."""

    set: dict[str, Any] = Field(
        default_factory=dict, description='keys of the base config, dotted: "algorithm.method: dapo"'
    )
    after: str | None = Field(default=None, description="variant whose final model of the same seed is the start")

    @model_validator(mode="before")
    @classmethod
    def _under_set(cls, raw: Any) -> Any:
        loose = (
            [str(key) for key in raw if str(key).split(".")[0] in Config.model_fields] if isinstance(raw, dict) else []
        )
        if loose:
            raise ValueError(f"{loose[0]} is a key of the base config; write it under set")
        return raw


class StudyConfig(Section):
    """Every knob of a study file."""

    name: str = Field(default="study", pattern=r"^\w[\w.-]*$")
    output_dir: str = "studies"
    base: str = Field(description="config of `sgpo train`, relative to the study file; run.name and run.seed are set")
    seeds: list[int] = Field(min_length=1)
    baseline: str = Field(description="variant that all others are compared with, seed by seed")
    max_rollouts: int | None = Field(default=None, ge=1, description="budget of every cell that samples rollouts")
    variants: dict[str, Variant] = Field(min_length=1)

    @model_validator(mode="after")
    def _known(self) -> StudyConfig:
        if self.baseline not in self.variants:
            raise ValueError(f"baseline {self.baseline!r} is not among the variants ({', '.join(self.variants)})")
        for name, variant in self.variants.items():
            if variant.after is not None and (variant.after not in self.variants or self.variants[variant.after].after):
                raise ValueError(f"variant {name!r}: after = {variant.after!r} must name a variant without `after`")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed is given twice")
        return self


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of the grid. `overrides` are relative to the base config, without those that only name files."""

    variant: str
    seed: int
    overrides: dict[str, Any]
    after: str | None

    @property
    def name(self) -> str:
        """Variant and seed: the name of the run and its files."""
        return f"{self.variant}-seed{self.seed}"


class Study:
    """The study of one YAML file; every config of the grid is checked here, before anything runs."""

    def __init__(self, path: Path, overrides: Sequence[str] = ()) -> None:
        self.path = path
        self.settings = load_settings(StudyConfig, path, overrides)
        self.base = path.parent / self.settings.base
        self.folder = Path(self.settings.output_dir) / self.settings.name
        self.cells = [self._cell(name, seed) for seed in self.settings.seeds for name in self._order()]
        self._configs = {cell.name: self._checked(cell) for cell in self.cells}

    def cell(self, name: str) -> Cell:
        """The cell of this name; SgpoError where there is none."""
        found = next((cell for cell in self.cells if cell.name == name), None)
        if found is None:
            raise SgpoError(f"{self.path}: no cell {name!r}; --list names them, the first is {self.cells[0].name}")
        return found

    def fingerprint(self, cell: Cell) -> str:
        """Hash of all that decides the cell's numbers, but for the code."""
        parts = [self._decisive(cell)]
        if cell.after is not None:
            parts.append(self._decisive(self.cell(f"{cell.after}-seed{cell.seed}")))
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def commands(self, cell: Cell) -> list[list[str]]:
        """What runs the cell: the warm-up that it shares, and its training."""
        config = self._configs[cell.name]
        words = _as_words({**cell.overrides, "run.name": cell.name, "run.output_dir": str(self.folder / "runs")})
        train = ["train", str(self.base), *words]
        if cell.after is not None:
            start = self.folder / "runs" / f"{cell.after}-seed{cell.seed}" / "final"
            return [[*train, *_as_words({"warmup.enabled": False, "model.path": str(start)})]]
        if not config.warmup.enabled:
            return [train]
        shared = {"run.name": self._warmup_name(cell), "run.output_dir": str(self.folder / "warmups")}
        best = self.folder / "warmups" / shared["run.name"] / "warmup" / "best"
        # The folder of a warm-up belongs to all cells that share it: only what decides its model goes into it.
        own = {k: v for k, v in cell.overrides.items() if k.split(".")[0] in (*_WARMUP_SECTIONS, "run")}
        warmup = ["warmup", str(self.base), *_as_words({**own, **shared})]
        return [warmup, [*train, *_as_words({"warmup.enabled": False, "model.path": str(best)})]]

    def run(self, cell: Cell) -> dict[str, Any]:
        """Runs or resumes the cell, unless its row is there; returns the row."""
        row_path = self.folder / "cells" / f"{cell.name}.json"
        if row_path.exists():
            row = json.loads(row_path.read_text(encoding="utf-8"))
            if row["fingerprint"] == self.fingerprint(cell):
                return row
            raise SgpoError(f"{row_path} was run with other settings; move it and its run aside, or rename the study")
        if cell.after is not None:
            self.run(self.cell(f"{cell.after}-seed{cell.seed}"))
        commands = self.commands(cell)
        with _locked(self.folder / "warmups" / f"{self._warmup_name(cell)}.lock"):
            warm = self.folder / "warmups" / self._warmup_name(cell) / "warmup" / "finished"
            for command in commands[:-1] if not warm.exists() else []:
                self._start(cell, command)
        self._start(cell, commands[-1])
        row = self._row(cell)
        row_path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(row_path, json.dumps(row) + "\n")
        return row

    def rows(self) -> list[dict[str, Any]]:
        """What the finished cells gave, in the order of the grid."""
        found = (self.folder / "cells" / f"{cell.name}.json" for cell in sorted(self.cells, key=self._by_variant))
        return [json.loads(path.read_text(encoding="utf-8")) for path in found if path.exists()]

    def _start(self, cell: Cell, words: list[str]) -> None:
        log = self.folder / "logs" / f"{cell.name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            code = subprocess.call([sys.executable, "-m", "sgpo.cli", *words], stdout=file, stderr=subprocess.STDOUT)
        if code == 130 or code < 0:
            raise KeyboardInterrupt
        if code:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise SgpoError(f"cell {cell.name} ended with exit code {code}: {''.join(last)} ({log})")

    def _row(self, cell: Cell) -> dict[str, Any]:
        run = self.folder / "runs" / cell.name
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        steps = [row for row in iter_jsonl(run / METRICS_FILE) if row["phase"] == "train"]
        evals = [row for row in iter_jsonl(run / METRICS_FILE) if row["phase"] == "eval"]
        before = [0.0]
        for row in steps:
            before.append(before[-1] + (row.get("rollouts") or 0.0))
        kept = ("accuracy_before", "accuracy_after", "guided_accuracy_before", "guided_accuracy_after")
        return {
            "study": self.settings.name,
            "cell": cell.name,
            "variant": cell.variant,
            "seed": cell.seed,
            **{key: summary[key] for key in (*kept, "steps", "rollouts", "rollout_tokens")},
            "train_tokens": sum(row.get("train_tokens") or 0.0 for row in steps),
            "max_rollouts": self._configs[cell.name].train.max_rollouts,
            "curve": [[row["step"], before[row["step"]], row["accuracy"]] for row in evals],
            "fingerprint": self.fingerprint(cell),
            "commit": commit(),
            "versions": versions(),
            "device": _device(),
            "command": shlex.join(["sgpo", "study", self.path.name, "--cell", cell.name]),
        }

    def _cell(self, name: str, seed: int) -> Cell:
        variant = self.settings.variants[name]
        return Cell(name, seed, {**variant.set, "run.seed": seed, **self._budget(variant)}, variant.after)

    def _budget(self, variant: Variant) -> dict[str, Any]:
        if self.settings.max_rollouts is None or variant.set.get("algorithm.method") == "sft":
            return {}
        return {"train.max_rollouts": self.settings.max_rollouts}

    def _checked(self, cell: Cell) -> Config:
        try:
            return load_settings(Config, self.base, _as_words({**cell.overrides, "run.name": cell.name}))
        except SgpoError as error:
            raise SgpoError(f"{self.path}: variant {cell.variant}: {error}") from None

    def _decisive(self, cell: Cell) -> dict[str, Any]:
        dumped = self._configs[cell.name].model_dump(mode="json")
        dumped["run"] = {"seed": cell.seed}
        return {section: value for section, value in dumped.items() if section not in ("log", "checkpoint")}

    def _warmup_name(self, cell: Cell) -> str:
        decisive = self._decisive(cell)
        parts = {section: decisive[section] for section in (*_WARMUP_SECTIONS, "run")}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12] + f"-seed{cell.seed}"

    def _order(self) -> list[str]:
        """Variants that others start from come first."""
        return sorted(self.settings.variants, key=lambda name: self.settings.variants[name].after is not None)

    def _by_variant(self, cell: Cell) -> tuple[int, int]:
        return list(self.settings.variants).index(cell.variant), self.settings.seeds.index(cell.seed)


def run_study(study: Study, cells: Sequence[Cell], say: Any = print) -> None:
    """Runs the cells one after the other; those that are there are skipped."""
    for number, cell in enumerate(cells, 1):
        row = study.run(cell)
        say(f"[{number}/{len(cells)}] {cell.name}: {row['accuracy_before']} -> {row['accuracy_after']}", flush=True)


def report_study(study: Study, results: Path | None, out: Path | None) -> Path:
    """The table and the curves from the cells that are finished, or from the committed rows in `results`."""
    if results is None:
        rows, out = study.rows(), out or study.folder
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        rows = list(iter_jsonl(results)) if results.exists() else []
    if not rows:
        raise SgpoError(f"no finished cell in {results or study.folder / 'cells'}; run sgpo study {study.path} first")
    return write_study_report(rows, baseline=study.settings.baseline, out=out or study.folder)


def _as_words(overrides: dict[str, Any]) -> list[str]:
    return [
        f"--{key}={yaml.safe_dump(value, default_flow_style=True).split(chr(10))[0]}"
        for key, value in overrides.items()
    ]


def _device() -> str:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time, on this machine: cells of one seed must not warm up twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
