"""Training with the engines that can be lost, run ahead or go stale: vLLM, a process of its own, overlap."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import yaml
from engine_builders import NO_VLLM
from processes import PATIENCE_S, scaled
from tiny_runs import BASE, REWARD, digest, finish, rows, start

STEP_WORKER = str(Path(__file__).with_name("rollout_step_worker.py"))
# Under ZeRO the trainer still needs its process group after vLLM has shut down.
VLLM = ["--rollout.engine=vllm", "--rollout.vllm.kv_cache_mib=64", "--engine.zero_stage=2"]
OWN_PROCESS = ["--rollout.placement=process"]
OVERLAP = [*OWN_PROCESS, "--rollout.overlap=true", "--rollout.importance_cap=2.0"]


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def engine_of(pid: int) -> int | None:
    """The process in which the rollout engine of trainer `pid` runs: the spawned child that has loaded torch."""
    for child in children(pid):
        command = Path(f"/proc/{child}/cmdline").read_bytes()
        if b"spawn_main" in command and b"libtorch" in Path(f"/proc/{child}/maps").read_bytes():
            return child
    return None


@NO_VLLM
def test_after_every_step_the_engine_is_the_exported_checkpoint(tmp_path, launcher, monkeypatch):
    """Greedy tokens and their log-probs, against an engine that has loaded the exported folder from disk."""
    (tmp_path / "plugin.py").write_text(REWARD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    config = {**BASE, "run": {**BASE["run"], "output_dir": str(tmp_path)}, "train": {"max_steps": 2}}
    config["rollout"] = {**BASE["rollout"], "engine": "vllm", "vllm": {"kv_cache_mib": 64}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    launcher([STEP_WORKER, str(tmp_path / "config.yaml"), str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found) == 3  # before the first step and after each of two
    for row in found:
        for (ids, logprobs), (fresh_ids, fresh_logprobs) in zip(row["running"], row["fresh"], strict=True):
            assert ids == fresh_ids
            assert logprobs == pytest.approx(fresh_logprobs, abs=1e-4)
    assert found[0]["running"] != found[1]["running"] != found[2]["running"]
    trained = rows(tmp_path / "tiny")
    assert len(trained) == 2
    for row in trained:
        assert row["sync_gap_max"] < 1e-4
        assert row["sampler_gap_max"] < 1e-4
        assert row["sync_bytes"] > 1_000_000


@pytest.mark.parametrize(
    "overrides", [pytest.param(VLLM, id="vllm", marks=NO_VLLM), pytest.param(OVERLAP, id="hf-overlap")]
)
def test_a_killed_run_ends_bit_for_bit_where_the_straight_one_ends(tmp_path, overrides):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight.mkdir()
    killed.mkdir()
    finish(straight, *overrides, "--checkpoint.keep_last=10", anew=True)
    process = start(killed, *overrides)[0]
    metrics = killed / "runs" / "tiny" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and '"step": 2' in metrics.read_text()):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    finish(killed, *overrides)
    run = straight / "runs" / "tiny"
    assert digest(killed / "runs" / "tiny") == digest(run)
    assert [row["loss"] for row in rows(killed / "runs" / "tiny")] == [row["loss"] for row in rows(run)]
    if overrides is OVERLAP:
        check_overlap(run)


def check_overlap(run: Path) -> None:
    """The first step trains on rollouts of its own weights, every later one on rollouts of the step before."""
    found = rows(run)
    assert len(found) == 4
    assert found[0]["sampler_gap_max"] < 1e-4
    assert found[0]["importance_mean"] == pytest.approx(1.0, abs=1e-4)
    assert any((row.get("sampler_gap_max") or 0) > 1e-3 for row in found[1:])
    for step in (1, 2, 3):
        ahead = json.loads((run / "checkpoints" / f"step-{step:08d}" / "ahead-0.json").read_text())
        assert {row["policy_version"] for row in ahead} == {step - 1}
    assert not (run / "checkpoints" / "step-00000004" / "ahead-0.json").exists()


def test_a_run_outlives_the_death_of_its_engine_and_ends_the_same(tmp_path):
    straight, wounded = tmp_path / "straight", tmp_path / "wounded"
    straight.mkdir()
    wounded.mkdir()
    steps = "--train.max_steps=12"
    finish(straight, steps)  # in one process
    process = start(wounded, *OWN_PROCESS, steps)[0]
    metrics = wounded / "runs" / "tiny" / "metrics.jsonl"
    while process.poll() is None and not metrics.exists():
        time.sleep(0.01)
    engine = engine_of(process.pid)
    assert engine is not None
    os.kill(engine, signal.SIGKILL)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output[-3000:]
    assert "started anew and synced" in output
    assert digest(wounded / "runs" / "tiny") == digest(straight / "runs" / "tiny")


def test_an_engine_that_keeps_dying_ends_the_run_with_one_sentence(tmp_path):
    process = start(tmp_path, *OWN_PROCESS, "--train.max_steps=4")[0]
    metrics = tmp_path / "runs" / "tiny" / "metrics.jsonl"
    killed = 0
    while process.poll() is None and killed < 4:
        if metrics.exists() and (engine := engine_of(process.pid)) is not None:
            os.kill(engine, signal.SIGKILL)
            killed += 1
        time.sleep(0.01)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2, output[-3000:]
    assert "the rollout process is gone" in output
    assert "the last checkpoint is whole" in output
    assert "Traceback" not in output


# A process that is gone is noticed at once, one that stands still after the time limit, which must let the start pass.
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_process_ends_the_others_with_the_stage_named(tmp_path, blow):
    limit_s = PATIENCE_S if blow == signal.SIGKILL else scaled(60)
    running = start(tmp_path, "--train.max_steps=40", f"--run.timeout_s={limit_s}", processes=2)
    metrics = tmp_path / "runs" / "tiny" / "metrics.jsonl"
    while running[0].poll() is None and not (metrics.exists() and '"step": 2' in metrics.read_text()):
        time.sleep(0.01)
    running[1].send_signal(blow)
    try:
        output, _ = running[0].communicate(timeout=PATIENCE_S)
    finally:
        running[1].kill()
        running[1].communicate()
    assert running[0].returncode == 2, output[-3000:]
    assert re.search(r"sgpo: step \d+, stage \w+: another process of the run died or gave no answer", output)
    assert "Traceback" not in output
