"""Checkpoints of a run and its summary: what is saved so that a resumed run is the straight one."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sgpo.config import Config
from sgpo.engine.checkpoint import Checkpoints
from sgpo.engine.zero import ZeroEngine
from sgpo.train.session import Progress, Session
from sgpo.types import Rollout, SgpoError, rollout_from_json
from sgpo.utils import distributed
from sgpo.utils.provenance import commit


def save_progress(s: Session, done: int, progress: Progress) -> None:
    """A checkpoint after step `done`: engine, random states, progress, rollouts that are there already."""
    progress.step = done
    wall_s = progress.wall_s + time.monotonic() - s.started
    state = {**asdict(progress), "wall_s": wall_s, "world_size": distributed.world_size()}

    def write(folder: Path) -> None:
        s.engine.save(folder / "engine")
        torch.save(torch.get_rng_state(), folder / f"rng-{distributed.rank()}.pt")
        if s.ahead:
            rows = [asdict(rollout) for rollout in s.ahead]
            (folder / f"ahead-{distributed.rank()}.json").write_text(json.dumps(rows), encoding="utf-8")

    s.display.stage("save")
    s.checkpoints.save(done, state, write)


def restore_progress(engine: ZeroEngine, checkpoints: Checkpoints) -> tuple[Progress, list[Rollout]]:
    """Everything as the last whole checkpoint left it, or the beginning."""
    if (found := checkpoints.latest()) is None:
        return Progress(), []
    folder, state = found
    if state.pop("world_size") != distributed.world_size():
        raise SgpoError(f"{folder} was written by another number of processes; resume with as many")
    engine.load(folder / "engine")
    torch.set_rng_state(torch.load(folder / f"rng-{distributed.rank()}.pt", weights_only=True))
    ahead = folder / f"ahead-{distributed.rank()}.json"
    rows = json.loads(ahead.read_text(encoding="utf-8")) if ahead.exists() else []
    return Progress(**state), [rollout_from_json(row) for row in rows]


def summary_of(config: Config, progress: Progress, wall_s: float) -> dict[str, Any]:
    """What summary.json says of the run."""
    before, after = progress.before, progress.after

    def interval(values: dict[str, float]) -> list[float] | None:
        return [values["accuracy_low"], values["accuracy_high"]] if values else None

    return {
        "run": config.run.name,
        "method": config.algorithm.method,
        "accuracy_before": before.get("accuracy"),
        "accuracy_before_interval": interval(before),
        "accuracy_after": after.get("accuracy"),
        "accuracy_after_interval": interval(after),
        "guided_accuracy_before": before.get("guided_accuracy"),
        "guided_accuracy_after": after.get("guided_accuracy"),
        "best_accuracy": progress.best_accuracy if progress.best_accuracy >= 0 else None,
        "steps": progress.step,
        "rollouts": progress.rollouts,
        "rollout_tokens": progress.rollout_tokens,
        "wall_s": round(wall_s, 1),
        "seed": config.run.seed,
        "commit": commit(),
    }
