"""The GPU acceptance script, dry: every part on a CPU by the same commands, and what a signal leaves behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import PATIENCE_S, PROMPT_S, wait_until

ROOT = Path(__file__).resolve().parents[2]
QUICK = "machine parity-real parity sgpo stages ceilings memory"
# colocated and rollouts start vLLM, which their own tests do.
FULL = "tuning policy divergence train-3b train-7b peers-compile peers-ours peers-liger peers-cut peers-fla"


def start(out: Path, **variables: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHON": sys.executable, "DRY": "1", "OMP_NUM_THREADS": "1", **variables}
    command = ["bash", str(ROOT / "benchmarks" / "gpu_acceptance.sh"), str(out)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", params=[QUICK, FULL], ids=["quick", "full"])
def finished(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("acceptance")
    script = start(out, PARTS=request.param, SGPO_COMMIT="0" * 40)
    return request.param.split(), script.communicate(timeout=PATIENCE_S)[0], script.returncode, out


def test_every_part_runs_dry(finished):
    parts, output, code, out = finished
    summary = (out / "summary.txt").read_text()
    assert code == 0, output[-4000:]
    for part in parts:
        assert any(line.startswith(f"{part} ") and " exit   0 " in line for line in summary.splitlines()), summary
    assert {file.name for file in out.iterdir()} == {"log.txt", "rows.jsonl", "summary.txt"}
    assert len(output) < 12_000
    rows = rows_of(out)
    assert all(len(row["commit"]) == 40 for row in rows)
    kinds = {row.get("what") or row["op"] for row in rows}
    assert kinds == {"sgpo", "stages", "product", "copy", "memory"} or kinds == {
        "blocks", "policy", "divergence", "train_step", "sgpo"
    }  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])
def test_a_signal_leaves_whole_rows_and_a_summary(tmp_path, number):
    script = start(tmp_path, PARTS="machine tuning ceilings")
    wait_until(lambda: (tmp_path / "rows.jsonl").exists() and rows_of(tmp_path), "a row of tuning")
    script.send_signal(number)
    output = script.communicate(timeout=PROMPT_S)[0]
    assert script.returncode == 1, output
    assert rows_of(tmp_path)
    summary = (tmp_path / "summary.txt").read_text()
    assert "stopped by a signal while a part ran" in summary
    assert summary.splitlines()[-1].startswith("all ")
    assert "ceilings" not in summary


def test_a_wheel_that_pip_refuses_is_noted(tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "nothing-1.0-cp39-cp39-any.whl").write_bytes(b"")
    script = start(tmp_path / "out", PARTS="machine", WHEELS=str(wheels))
    output = script.communicate(timeout=PROMPT_S)[0]
    assert script.returncode == 0, output
    assert "refused: nothing-1.0-cp39-cp39-any.whl" in (tmp_path / "out" / "summary.txt").read_text()


def test_parts_for_which_no_time_is_left_are_noted(tmp_path):
    script = start(tmp_path, PARTS="memory", BUDGET="5")
    assert script.communicate(timeout=PROMPT_S)[0].startswith("memory         not run: 5 s are left")
    assert script.returncode == 0


@pytest.mark.parametrize("variables", [{"PROFILE": "slow"}, {"PARTS": "machine everything"}])
def test_errors_of_usage(tmp_path, variables):
    script = start(tmp_path / "out", **variables)
    assert script.communicate(timeout=PROMPT_S)[0].startswith("error: ")
    assert script.returncode == 2
