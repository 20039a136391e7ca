"""The training step of the GPU acceptance script, with its small model on the CPU."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from engine_builders import NO_VLLM

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = (ROOT / "benchmarks" / "gpu_acceptance.sh").read_text()


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
    assert set(row["memory"]) == {"sync", "rollout", "train"}
    assert all(report["sync_bytes"] > 200_000 and report["sync_gap_max"] < 0.02 for report in row["syncs"])
    assert row["rollout_tokens_per_s"] > 0


def test_seven_billion_weights_are_refused_on_a_cpu(tmp_path):
    command = [sys.executable, "-m", "benchmarks.train_step", "--out", str(tmp_path / "rows"), "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**__import__("os").environ})
    assert done.returncode == 2
    assert "--tiny only" in done.stderr


def test_parts_of_the_acceptance_script_stay_under_nine_minutes():
    limits = [int(limit) for limit in re.findall(r"^\s*part (?!wheels)\w+ (\d+) ", SCRIPT, flags=re.MULTILINE)]
    assert len(limits) >= 9
    assert sum(limits) <= 540
    assert "benchmarks.train_step" in SCRIPT
    assert re.search(r"left=\$\(\(530 .*\n.*\n(.*\n)*last colocated .*\nlast rollouts ", SCRIPT)
