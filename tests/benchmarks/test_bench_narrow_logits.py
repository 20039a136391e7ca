"""The study of narrow logits against whole rows of logits, its command line, and its kernels on the interpreter."""

import json
import os
import subprocess
import sys

import pytest
import torch
from processes import PATIENCE_S

from benchmarks import narrow_formats, narrow_kernels, narrow_logits, narrow_times
from benchmarks import states as sources

CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs where there is no GPU")
ROWS, DISTANCE = 16, 6


@pytest.fixture(scope="module")
def made():
    states = sources.calibrated(ROWS, ROWS, 64, 500, dtype=torch.bfloat16)
    return states, narrow_logits.Head(states.head.float(), states.head.double().t())


def mended(exact, narrow, far, factor):
    """Log-probabilities [R, V] with the exact logits near the maximum, the narrow ones times the factor beyond."""
    return torch.where(far, narrow + factor.log().unsqueeze(1), exact).log_softmax(1)


def distance(narrow):
    return narrow.amax(1, keepdim=True) - narrow


@pytest.mark.parametrize("correction", ["plain", "variance"])
def test_policy_errors_are_those_of_whole_rows(made, correction):
    states, head = made
    hidden, target = states.policy_hidden.float(), states.policy_targets
    narrow, rows, at = narrow_formats.Narrow("fp8_row", head.plain, hidden), narrow_logits.Rows(), target.unsqueeze(1)
    narrow_logits.policy_block(rows, narrow, hidden, target, head, deep=True)
    z, (zn, variance) = hidden.double() @ head.exact, narrow.logits(hidden)
    far = (distance(zn) >= DISTANCE).scatter(1, at, False)
    made_logp = mended(z, zn, far, variance.exp() if correction == "variance" else torch.ones_like(variance))
    logp = z.log_softmax(1)
    found = rows.result(DISTANCE, correction)
    wanted = (made_logp - logp).gather(1, at).abs()
    assert found["logprob_max"] == pytest.approx(float(wanted.max()), rel=1e-6)
    entropies = [(x.exp() * x).sum(1) for x in (made_logp, logp)]
    assert found["entropy_max"] == pytest.approx(float((entropies[0] - entropies[1]).abs().max()), rel=1e-6)
    dz = logp.exp().scatter_add(1, at, -torch.ones_like(wanted))
    assert found["dz"] == pytest.approx(float((made_logp.exp() - logp.exp()).norm() / dz.norm()), rel=1e-4)
    assert 0 < rows.result(DISTANCE, "band")["dh"] < 0.1


@pytest.mark.parametrize("name", ["fp8_row", "int8_rotated"])
def test_kl_errors_are_those_of_whole_rows(made, name):
    states, head = made
    student, teacher = states.distill_hidden.float(), states.teacher_hidden.float()
    narrow, rows = narrow_formats.Narrow(name, head.plain, student), narrow_logits.Rows()
    narrow_logits.kl_block(rows, narrow, student, teacher, head, deep=True)
    z_s, z_t = (x.double() @ head.exact for x in (student, teacher))
    n_s, n_t = (narrow.logits(x)[0] for x in (student, teacher))
    if name == "int8_rotated":
        n_t = n_s + narrow.logits(teacher - student)[0]
    far = torch.minimum(distance(n_s), distance(n_t)) >= DISTANCE
    ones = torch.ones(ROWS, dtype=torch.float64)
    # The mean head row that centred formats take off is put back: exact and narrow logits go together in a row.
    made_s, made_t, logp_s, logp_t = (
        mended(*pair, far, ones) for pair in ((z_s, n_s), (z_t, n_t), (z_s, z_s), (z_t, z_t))
    )
    kl = (logp_t.exp() * (logp_t - logp_s)).sum(1)
    wanted = ((made_t.exp() * (made_t - made_s)).sum(1) - kl).abs() / kl
    figures = rows.table[DISTANCE]["plain"]
    torch.testing.assert_close(torch.cat(figures["kl"]), kl, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(torch.cat(figures["kl_error"]), wanted, rtol=1e-4, atol=1e-7)
    lost = made_s.exp() - made_t.exp() - (logp_s.exp() - logp_t.exp())
    dz = logp_s.exp() - logp_t.exp()
    assert rows.result(DISTANCE, "plain")["dz"] == pytest.approx(float(lost.norm() / dz.norm()), rel=1e-4)


def test_rotation_and_centre_lose_nothing(made, monkeypatch):
    states, head = made
    hidden = states.policy_hidden.float()
    monkeypatch.setitem(narrow_formats.FORMATS, "turned", narrow_formats.Format(0.0, rotated=True))
    z, _ = narrow_formats.Narrow("turned", head.plain, hidden).logits(hidden)
    torch.testing.assert_close(z, hidden.double() @ head.exact, rtol=1e-4, atol=1e-4)


def test_equal_rows_have_no_kl(made):
    states, head = made
    student, rows = states.distill_hidden.float(), narrow_logits.Rows()
    narrow = narrow_formats.Narrow("fp8_difference", head.plain, student)
    n_s, n_d = narrow.logits(student)[0], narrow.logits(student - student)[0]
    assert torch.equal(n_s + n_d, n_s)
    narrow_logits.kl_block(rows, narrow, student, student, head, deep=False)
    assert float(torch.cat(rows.table[0]["plain"]["dz_lost"]).abs().max()) == 0.0


def test_command_line(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    assert narrow_logits.main(["--quick", "--formats", "fp8_row", "fp8_both", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    kinds = ("policy", "kl", "kl_near")
    assert [(row["format"], row["kind"]) for row in rows] == [(f, k) for f in ("fp8_row", "fp8_both") for k in kinds]
    shares = rows[0]["shares"]["10"]
    assert 0 < shares["loose_entries"] < shares["entries"] < shares["columns"] < 1
    assert all({"commit", "versions", "source", "states", "command", "errors"} <= set(row) for row in rows)
    assert "fp8_both" in capsys.readouterr().out
    lines = list(narrow_times.times(out))
    assert len(lines) == 2 * 6
    assert all("'saved'" in line for line in lines)
    assert narrow_logits.main(["--states", "none"]) == 2


@CPU_ONLY
@pytest.mark.parametrize("name", ["calibrated", "spread:0.1"])
def test_kernels_give_the_reference(name):
    # 200 columns: a last tile of 8; diffuse rows have most of their entries near, more than one block of the gather.
    states = sources.make(name, 64, 200, 16, 1, dtype=torch.float32, device="cpu", seed=0)
    hidden, head, target = states.policy_hidden, states.head, states.policy_targets
    options = {"distance": 6.0, "capacity": 3_200, "tiles": narrow_kernels.SMALL}
    found = narrow_kernels.log_probs(hidden, head, narrow_kernels.Scaled.of(head), target, **options)
    wanted = narrow_kernels.reference(hidden, head, target, distance=6.0, rough=torch.float32)
    torch.testing.assert_close(found.near, wanted.near)
    torch.testing.assert_close(found.logprob.double(), wanted.logprob, rtol=0, atol=5e-6)
    torch.testing.assert_close(found.tail.double(), wanted.tail, rtol=1e-4, atol=1e-7)
    logp = (hidden.double() @ head.double().t()).log_softmax(1).gather(1, target.unsqueeze(1)).squeeze(1)
    assert 1e-6 < float((found.logprob - logp).abs().max()) < 5e-3
    with pytest.raises(ValueError, match="capacity is 9"):
        narrow_kernels.log_probs(hidden, head, narrow_kernels.Scaled.of(head), target, **(options | {"capacity": 9}))


def test_kernels_compile_without_spills():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.narrow_kernels", "--arch", "90"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("spills=0") == 4
