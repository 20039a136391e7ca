"""The training step of the GPU acceptance script, with its small model on the CPU."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_builders import NO_VLLM

from benchmarks import train_step

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def test_small_step_gives_a_row_for_every_state_and_length(launcher, tmp_path):
    out = tmp_path / "rows.jsonl"
    launcher(
        ["-m", "benchmarks.train_step", "--out", str(out), "--device", "cpu", "--tiny", "--states", "cpu_offload,full"]
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["optimizer_state"], r["tokens"]) for r in rows] == [
        (s, n) for s in ("cpu_offload", "full") for n in (64, 128)
    ]
    for row in rows:
        assert set(row["phases"]) == {"start", "forward", "teacher_and_forward", "backward", "optimizer"}
        assert all(phase["seconds"] > 0 for phase in row["phases"].values())
        assert row["phases"]["forward"]["peak_beyond_gib"] > 0
        assert row["grad_norm"] > 0
        assert set(row["planned_gib"]) == {"forward", "backward", "optimizer"}
    # Both states compute the same step from the same weights.
    assert rows[0]["grad_norm"] == pytest.approx(rows[2]["grad_norm"], rel=1e-3)
    assert rows[0]["loss"] == pytest.approx(rows[2]["loss"], rel=1e-3, abs=1e-5)
    # The plan is that of the row's own length; states and dW do not grow.
    assert 1.0 < rows[1]["planned_gib"]["forward"] / rows[0]["planned_gib"]["forward"] <= 2.0
    # Twice the tokens: about twice the activations that forward leaves for backward.
    small, large = (row["phases"]["forward"]["peak_beyond_gib"] for row in rows[:2])
    assert 1.3 * small < large < 4 * small


@NO_VLLM
def test_small_step_beside_vllm_gives_a_row(launcher, tmp_path):
    out = tmp_path / "rows.jsonl"
    launcher(["-m", "benchmarks.colocated", "--out", str(out), "--tiny", "--state", "cpu_offload", "--rollouts", "4"])
    row = json.loads(out.read_text())
    assert len(row["seconds"]) == len(row["syncs"]) == len(row["grad_norms"]) == 2
    assert set(row["seconds"][0]) == set(row["peak_mib"]) == {"sync", "rollout", "sleep", "train"}
    assert set(row["memory"]) == {"planned_mib", "measured_mib", "ratio"}
    assert all(report["sync_bytes"] > 200_000 and report["sync_gap_max"] < 0.02 for report in row["syncs"])
    assert row["rollout_tokens_per_s"] > 0


def test_seven_billion_weights_are_refused_on_a_cpu(tmp_path):
    command = [sys.executable, "-m", "benchmarks.train_step", "--out", str(tmp_path / "rows"), "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**__import__("os").environ})
    assert done.returncode == 2
    assert "--tiny only" in done.stderr


def test_what_cannot_run_is_a_row_without_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr(train_step, "_model_of", lambda *_: pytest.fail("made a model"))
    config = train_step.config_of(tmp_path, "cpu_offload", 4096)
    train_step._write_numbers("qwen2.5-3b", tmp_path)
    planned = sum(train_step._planner(config, tmp_path, CPU).host_states().values())
    assert 3.0e9 * 12 < planned < 3.2e9 * 20
    monkeypatch.setattr(train_step, "PROCESS", 2.0**50)
    [row] = train_step.rows_of("qwen2.5-3b", "cpu_offload", [4096], CPU, tmp_path, until=math.inf)
    assert row["not_run"].startswith("the host lacks ")
    monkeypatch.setattr(train_step.importlib.util, "find_spec", lambda name: None)
    [row] = train_step.rows_of("qwen2.5-3b", "8bit", [4096], CPU, tmp_path, until=math.inf)
    assert row["not_run"] == "torchao is not installed"
    [row] = train_step.rows_of("qwen2.5-3b", "full", [4096], CPU, tmp_path, until=0.0)
    assert row["not_run"] == "no time is left"
