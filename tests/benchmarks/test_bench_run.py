"""The runner from end to end on a tiny shape, and what it refuses."""

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import sgpo_kernels
import torch
from processes import PATIENCE_S, PROMPT_S
from sgpo_kernels import reference

from benchmarks import measure, ops, plots, run
from benchmarks import peers as peer_registry
from benchmarks import states as sources
from sgpo.types import SgpoError

LIGER = importlib.util.find_spec("liger_kernel") is not None
PEERS = "ours-torch,ours-torch-live,naive,torch-linear-ce,liger,ours-triton,quack"


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def inputs_of(op: str, mix: str, dtype: torch.dtype = torch.float32, rows: int = 64) -> ops.Inputs:
    policy, distill = ops.group_rows(ops.OPS[op], ops.MIXES[mix], rows)
    states = sources.spread(policy, distill, 32, 160, ratio=0.2)
    states = dataclasses.replace(
        states,
        **{
            name: getattr(states, name).to(dtype)
            for name in ("policy_hidden", "distill_hidden", "teacher_hidden", "head")
        },
    )
    return ops.build(ops.OPS[op], ops.MIXES[mix], states, seed=0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(exit code, rows) of a run over all ops."""
    out = tmp_path_factory.mktemp("bench") / "rows.jsonl"
    arguments = ["--quick", "--op", "logprob,policy,divergence,sgpo", "--peers", PEERS, "--out", str(out)]
    code = run.main([*arguments, "--mix", "half-dead"])
    code += run.main(["--quick", "--op", "sgpo", "--mix", "sgpo,distill", "--peers", PEERS, "--out", str(out)])
    return code, out


def test_every_implementation_is_measured(finished):
    code, out = finished
    rows = rows_of(out)
    assert code == 0
    measured = [row for row in rows if row["status"] == "ok"]
    assert {row["op"] for row in measured} == set(ops.OPS)
    assert {row["peer"] for row in measured} >= {"ours-torch", "ours-torch-live", "naive"}
    for row in measured:
        assert 0 < row["ms_p10"] <= row["ms_p50"] <= row["ms_p90"]
        assert row["units"] == pytest.approx(row["ms_p50"] / row["product_ms_p50"])
        assert row["peak_mib"] > 0
        assert row["bitwise_repeat"] is True
        assert row["commit"] is None or len(row["commit"]) == 40
        assert row["source"]["kind"] == "calibrated"
        assert row["states_summary"]
        assert ("forward_units" in row) == row["peer"].startswith("ours")
        limit = 5e-3 if row["peer"].endswith("live") else 5e-5
        errors = [row[key] for key in row if key.endswith("_error") and row[key] is not None]
        assert max(errors) < limit, row["peer"]


@pytest.mark.skipif(not LIGER, reason="liger-kernel is not installed")
def test_liger_computes_the_same_numbers(finished):
    rows = [row for row in rows_of(finished[1]) if row["peer"] == "liger"]
    assert {row["op"] for row in rows} == {"policy", "divergence", "sgpo"}
    for row in rows:
        assert row["status"] == "ok"
        assert max(row[key] for key in row if key.endswith("_error") and row[key] is not None) < 5e-5
    assert "a pair" in next(row["note"] for row in rows if row["op"] == "sgpo")


def test_what_cannot_run_is_said(finished):
    missing = {row["peer"]: row["reason"] for row in rows_of(finished[1]) if row["status"] == "missing"}
    assert missing["ours-triton"] == "needs cuda"
    assert missing.get("quack", "not installed") in ("not installed", "needs cuda")
    assert all("ms_p50" not in row for row in rows_of(finished[1]) if row["status"] == "missing")


def test_plots_are_written(finished, tmp_path):
    assert plots.main([str(finished[1]), "--out", str(tmp_path)]) == 0
    for name in ("time_tokens.png", "memory_tokens.png", "error_distance.png"):
        assert (tmp_path / name).stat().st_size > 5000
    (tmp_path / "empty.jsonl").write_text("")
    assert plots.main([str(tmp_path / "empty.jsonl")]) == 2
    assert plots.main([str(tmp_path / "absent.jsonl")]) == 2


def test_a_wrong_result_of_ours_is_timed_all_the_same(tmp_path, monkeypatch, capsys):
    right = sgpo_kernels.linear_policy_loss

    def wrong(*args, **kwargs):
        loss, stats = right(*args, **kwargs)
        return 1.001 * loss, stats

    monkeypatch.setattr(sgpo_kernels, "linear_policy_loss", wrong)
    out = tmp_path / "rows.jsonl"
    assert run.main(["--quick", "--op", "policy", "--peers", "ours-torch,naive", "--out", str(out)]) == 1
    ours, naive = rows_of(out)
    assert ours["status"] == "wrong"
    assert "dpolicy_error" in ours["reason"]
    assert ours["ms_p50"] > 0
    assert naive["status"] == "ok"
    assert "ours-torch: wrong" in capsys.readouterr().out


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_run_that_is_cut_writes_what_is_known(tmp_path, monkeypatch, error):
    """The third round of times is cut; rows of the peers that cannot run are there already."""
    rounds_of = measure.rounds_of

    def cut(runs, **limits):
        for count, times in enumerate(rounds_of(runs, **limits)):
            yield times
            if len(runs) > 1 and count == 0:
                raise error

    monkeypatch.setattr(measure, "rounds_of", cut)
    out = tmp_path / "rows.jsonl"
    arguments = ["--quick", "--op", "policy,sgpo", "--peers", "ours-torch,naive,ours-triton", "--out", str(out)]
    if error is KeyboardInterrupt:
        assert run.main(arguments) == 130
    else:
        with pytest.raises(error):
            run.main(arguments)
    missing, ours, naive = rows_of(out)
    assert (missing["peer"], missing["status"]) == ("ours-triton", "missing")
    for row in (ours, naive):
        assert (row["status"], row["reason"], row["rounds"]) == ("cut", "stopped at time", 1)
        assert row["ms_p50"] > 0
        assert row["dhead_error"] < 5e-5


def test_a_peer_that_hangs_in_c_does_not_keep_the_rows(tmp_path):
    """SIGINT within a call that never returns to Python: a thread writes and ends the process."""
    out = tmp_path / "rows.jsonl"
    script = f"""
import ctypes, sys
from benchmarks import measure, run
def hang(runs, **limits):
    print("hangs", flush=True)
    end = time.monotonic() + {PATIENCE_S}
    while time.monotonic() < end:
        ctypes.CDLL(None).sleep(int({PATIENCE_S}))
    yield {{}}
import time
measure.rounds_of = hang
measure.time_round_robin = lambda *a, **k: {{}}
signal = run.signal
signal.signal(signal.SIGINT, lambda *_: None)
sys.exit(run.main(["--quick", "--op", "policy", "--peers", "ours-torch", "--out", {str(out)!r}], alone=True))
"""
    path = os.pathsep.join([str(measure.OWN_KERNELS.parent), str(measure.OWN_KERNELS.parents[1])])
    process = subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "hangs\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=PROMPT_S) == 130
    [row] = rows_of(out)
    assert (row["status"], row["reason"]) == ("cut", "stopped at time")


def test_an_error_beyond_the_dropped_bound_is_wrong():
    inputs = inputs_of("divergence", "distill")
    exact = measure.truth(inputs)
    forward = peer_registry.PEERS["ours-torch"].forward("divergence")
    assert forward is not None
    output, gradients = measure.forward_backward(forward, inputs)
    off = {name: 1.01 * gradient for name, gradient in gradients.items()}
    assert not measure.complaints(inputs, output, measure.errors(inputs, output, gradients, exact), exact)
    assert len(measure.complaints(inputs, output, measure.errors(inputs, output, off, exact), exact)) == 2
    excused = output._replace(dropped_distill=torch.full_like(inputs.distill_weight, 1e-3))
    assert not measure.complaints(inputs, excused, measure.errors(inputs, output, off, exact), exact)


def test_not_finite_is_wrong():
    inputs = inputs_of("policy", "policy")
    exact = measure.truth(inputs)
    forward = peer_registry.PEERS["naive"].forward("policy")
    assert forward is not None
    output, gradients = measure.forward_backward(forward, inputs)
    gradients["dhead"][0, 0] = torch.nan
    found = measure.errors(inputs, output, gradients, exact)
    assert not measure.finite(found)
    assert measure.complaints(inputs, output, found, exact)


def test_one_of_ours_that_raises_or_does_not_repeat_is_wrong(tmp_path, monkeypatch):
    right, calls = sgpo_kernels.linear_divergence, []

    def different(*args, **kwargs):
        calls.append(1)
        loss, stats = right(*args, **kwargs)
        return loss * (1 + 1e-6 * len(calls)), stats

    def fail(*args, **kwargs):
        raise NotImplementedError("no kernel for this")

    monkeypatch.setattr(sgpo_kernels, "linear_divergence", different)
    monkeypatch.setattr(sgpo_kernels, "linear_policy_loss", fail)
    out = tmp_path / "rows.jsonl"
    assert run.main(["--quick", "--op", "divergence,policy", "--peers", "ours-torch", "--out", str(out)]) == 1
    assert [(row["status"], row["reason"]) for row in rows_of(out)] == [
        ("wrong", "the same call gave other bits"),
        ("wrong", "NotImplementedError: no kernel for this"),
    ]


def test_a_peer_that_fails_says_so_and_the_others_go_on(tmp_path, monkeypatch):
    def fail(inputs):
        raise RuntimeError("no such kernel\nsecond line")

    broken = dataclasses.replace(peer_registry.PEERS["naive"], forwards={"policy": fail})
    monkeypatch.setitem(peer_registry.PEERS, "naive", broken)
    out = tmp_path / "rows.jsonl"
    assert run.main(["--quick", "--op", "policy", "--peers", "naive,ours-torch", "--out", str(out)]) == 0
    naive, ours = rows_of(out)
    assert (naive["status"], naive["reason"]) == ("failed", "RuntimeError: no such kernel")
    assert ours["status"] == "ok"


@pytest.mark.parametrize("mix", ["sgpo", "half-dead"])
def test_the_truth_is_the_reference_in_fp64(mix):
    inputs = inputs_of("sgpo", mix, torch.float64)
    exact = measure.truth(inputs)
    loss, stats = reference.sgpo_loss(
        inputs.policy_hidden,
        inputs.targets,
        inputs.distill_hidden,
        inputs.teacher_hidden,
        inputs.head,
        old_logprobs=inputs.old_logprobs,
        advantages=inputs.advantages,
        policy_weight=inputs.policy_weight,
        distill_weight=inputs.distill_weight,
        clip_low=ops.CLIP_LOW,
        clip_high=ops.CLIP_HIGH,
    )
    torch.testing.assert_close(exact.loss, loss.detach())
    leaves = inputs.leaves()
    for name, wanted in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        torch.testing.assert_close(exact.gradients[name], wanted, rtol=1e-7, atol=1e-12)
    live = inputs.distill_weight != 0
    torch.testing.assert_close(exact.divergence[live], stats.divergence.divergence[live])
    assert bool(stats.policy.clipped.any())


def test_pairs_take_one_op_from_each():
    pair = peer_registry.find("naive+liger")
    assert pair.forwards["policy"] is peer_registry.PEERS["naive"].forwards["policy"]
    assert pair.forwards["divergence"] is peer_registry.PEERS["liger"].forwards["divergence"]
    assert pair.missing("cpu") == peer_registry.PEERS["liger"].missing("cpu")
    assert peer_registry.find("naive+fla").missing("cpu")
    for name in ("naive+torch-linear-ce", "fla+naive", "naive+quack"):
        with pytest.raises(SgpoError, match="No pair"):
            peer_registry.find(name)


def test_row_counts_and_floors():
    op = ops.OPS["sgpo"]
    assert ops.group_rows(op, ops.MIXES["sgpo"], 4096) == (4096, 512)
    assert ops.group_rows(op, ops.MIXES["distill"], 4096) == (0, 4096)
    assert inputs_of("sgpo", "sgpo").floor_units == pytest.approx((64 * 3 + 8 * 4) / 72)
    assert inputs_of("policy", "half-dead").floor_units == pytest.approx(1.5)
    assert ops.sequence_tokens(4096) == 512
    assert ops.sequence_tokens(0) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "softmax"], "Unknown op 'softmax'"),
        (["--shape", "huge"], "Unknown shape 'huge'"),
        (["--mix", "none"], "Unknown row mix 'none'"),
        (["--op", "policy", "--mix", "distill"], "has no row mix 'distill'"),
        (["--peers", "nobody"], "Unknown peer 'nobody'"),
        (["--rows", "13"], "multiples of 8"),
        (["--rounds", "0"], "--rounds"),
        (["--quick", "--states", "noise"], "Unknown states 'noise'"),
    ],
)
def test_usage_errors_are_one_sentence(arguments, message, tmp_path, capsys):
    assert run.main([*arguments, "--out", str(tmp_path / "rows.jsonl")]) == 2
    *progress, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert all(line.startswith("[") for line in progress)


def test_kernels_of_another_place_are_not_measured(tmp_path):
    """As in a second checkout, where an installed sgpo_kernels is found first."""
    shutil.copytree(measure.OWN_KERNELS, tmp_path / "sgpo_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    root = measure.OWN_KERNELS.parents[1]
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "benchmarks.run", "--quick", "--op", "logprob", "--out", str(out)]
    path = os.pathsep.join([str(tmp_path), str(root)])
    done = subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: the benchmarks of {root} would measure the sgpo_kernels in {tmp_path}")
    assert done.stderr.count("\n") == 1
    assert not out.exists()
