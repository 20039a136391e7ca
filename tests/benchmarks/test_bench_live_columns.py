"""The measurement of live columns against direct computation, and the live share of the calibrated states."""

import json

import pytest
import torch

from benchmarks import live_columns
from benchmarks import states as sources


@pytest.fixture(scope="module")
def states():
    return sources.calibrated(96, 96, 256, 1000)


@pytest.fixture(scope="module")
def rows(states):
    return list(live_columns.measure(states, chunk_rows=40))


def test_dz_is_the_gradient(states):
    part = states.first(8, 8)
    hidden = part.distill_hidden.double()
    logits = (hidden @ part.head.double().t()).requires_grad_()
    teacher = (part.teacher_hidden.double() @ part.head.double().t()).log_softmax(1)
    kl = torch.nn.functional.kl_div(logits.log_softmax(1), teacher, log_target=True, reduction="none").sum(1)
    (wanted,) = torch.autograd.grad(kl.sum(), logits)
    torch.testing.assert_close(
        live_columns.kl_dz(part.distill_hidden, part.teacher_hidden, part.head, float("inf")), wanted
    )
    limit = 1.001 * float(kl.detach().median())
    masked = live_columns.kl_dz(part.distill_hidden, part.teacher_hidden, part.head, limit)
    torch.testing.assert_close(masked, wanted * (kl <= limit).unsqueeze(1))
    logits = (part.policy_hidden.double() @ part.head.double().t()).requires_grad_()
    taken = logits.log_softmax(1).gather(1, part.policy_targets.unsqueeze(1))
    (wanted,) = torch.autograd.grad(taken.sum(), logits)
    torch.testing.assert_close(live_columns.policy_dz(part.policy_hidden, part.policy_targets, part.head), wanted)


def test_threshold_0_is_exact(rows):
    dense = [row for row in rows if row["threshold"] == 0]
    assert [row["kind"] for row in dense] == ["kl", "policy"]
    for row in dense:
        assert row["live_share"] == row["tiles_unsorted"] == row["tiles_sorted"] == 1.0
        assert (
            row["dhidden_error"]
            == row["dhead_error"]
            == row["dhidden_error_centred"]
            == row["dropped_max"]
            == row["dropped_mean"]
            == 0.0
        )
        assert 1e-4 < row["dhidden_error_bf16"] < 4e-3


@pytest.mark.parametrize("kind", ["kl", "policy"])
def test_lower_thresholds_keep_more_and_err_less(rows, kind):
    found = [row for row in rows if row["kind"] == kind]
    assert [row["threshold"] for row in found] == sorted((row["threshold"] for row in found), reverse=True)
    for key, sign in (("live_share", 1), ("tiles_sorted", 1), ("tiles_unsorted", 1), ("dropped_max", -1)):
        values = [sign * row[key] for row in found]
        assert values == sorted(values), key
    for key in ("dhidden_error", "dhead_error"):
        assert found[0][key] > found[-2][key] > found[-1][key]
    assert all(row["tiles_sorted"] <= row["tiles_unsorted"] for row in found)


def test_errors_are_those_of_the_dropped_columns(states, rows):
    dz = live_columns.policy_dz(states.policy_hidden, states.policy_targets, states.head)
    kept = torch.zeros_like(dz)
    for start in range(0, 96, 40):
        chunk = slice(start, start + 40)
        live = dz[chunk].abs().amax(0) >= 2.0**-12
        kept[chunk, live] = dz[chunk, live]
    hidden, head = states.policy_hidden.double(), states.head.double()
    row = next(row for row in rows if row["kind"] == "policy" and row["threshold"] == 2.0**-12)
    assert row["dhidden_error"] == pytest.approx(float(((dz - kept) @ head).norm() / (dz @ head).norm()))
    assert row["dhead_error"] == pytest.approx(float(((dz - kept).t() @ hidden).norm() / (dz.t() @ hidden).norm()))
    assert row["dhidden_error_centred"] < row["dhidden_error"]
    assert row["dropped_max"] == pytest.approx(float((dz - kept).abs().sum(1).max()))


def test_calibrated_states_have_about_the_live_columns_of_the_measured_model():
    """Qwen2.5-Coder-1.5B, 512 rows, V 151,936 (kernels.md): 471 columns live at 2^-12 for KL rows, 532 for policy."""
    states = sources.calibrated(512, 512, 1024, 8192)
    kl = live_columns.kl_dz(states.distill_hidden, states.teacher_hidden, states.head, 1.0)
    policy = live_columns.policy_dz(states.policy_hidden, states.policy_targets, states.head)
    for dz, measured in ((kl, 471), (policy, 532)):
        live = int((dz.abs().amax(0) >= 2.0**-12).sum())
        assert 0.6 * measured < live < 1.6 * measured


def test_command_line(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    arguments = ["--calibrated", "256", "1000", "--rows", "48", "--exponents", "12", "12", "--out", str(out)]
    assert live_columns.main(arguments) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["kind"], row["threshold"]) for row in rows] == [
        (kind, value) for kind in ("kl", "policy") for value in (2.0**-12, 0.0)
    ]
    assert all({"commit", "versions", "source", "states", "command"} <= set(row) for row in rows)
    assert "| kl | 2^-12 |" in capsys.readouterr().out
    assert live_columns.main(["--model", str(tmp_path), "--data", str(tmp_path / "none.jsonl")]) == 2
    assert capsys.readouterr().err.startswith("error: No problem file")
