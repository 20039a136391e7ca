"""Sources of hidden states: what they promise about their distributions, and that they say what they are."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import states as sources
from benchmarks.ops import logprobs
from sgpo.types import SgpoError


def knot_value(knots, share: float) -> float:
    return float(sources._quantile(knots, torch.tensor([share], dtype=torch.float64)))


@pytest.fixture(scope="module")
def calibrated():
    return sources.calibrated(512, 512, 1024, 4096)


def test_calibrated_states_have_the_measured_quantiles(calibrated):
    found = sources.summary(calibrated, rows=512)
    for share in (0.25, 0.5, 0.75, 0.9, 0.99):
        assert found[f"entropy_p{share * 100:g}"] == pytest.approx(knot_value(sources.QWEN_ENTROPY, share), rel=0.05)
        assert found[f"kl_p{share * 100:g}"] == pytest.approx(knot_value(sources.QWEN_KL, share), rel=0.1)
    assert found["entropy_mean"] == pytest.approx(0.21, rel=0.05)
    assert found["entropy_p50"] == pytest.approx(0.005, rel=0.05)
    assert found["kl_p50"] == pytest.approx(2e-4, rel=0.05)
    assert found["kl_above_1"] == pytest.approx(0.027, abs=0.003)


def test_calibrated_states_survive_bfloat16():
    found = sources.summary(sources.calibrated(256, 256, 1024, 4096, dtype=torch.bfloat16), rows=256)
    assert found["entropy_mean"] == pytest.approx(0.21, rel=0.05)
    assert found["entropy_p50"] == pytest.approx(0.005, rel=0.1)
    assert found["kl_p50"] == pytest.approx(2e-4, rel=0.2)
    assert found["kl_above_1"] == pytest.approx(0.027, abs=0.006)


def test_calibrated_states_follow_other_quantiles():
    entropy, kl = ((0.0, 0.5), (1.0, 2.0)), ((0.0, 0.01), (1.0, 0.1))
    found = sources.summary(sources.calibrated(128, 128, 512, 2048, entropy=entropy, kl=kl), rows=128)
    for share in (0.1, 0.5, 0.9):
        assert found[f"entropy_p{share * 100:g}"] == pytest.approx(knot_value(entropy, share), rel=0.05)
        assert found[f"kl_p{share * 100:g}"] == pytest.approx(knot_value(kl, share), rel=0.05)


def test_calibrated_states_are_seeded_and_say_what_they_are(calibrated):
    again, other = sources.calibrated(512, 512, 1024, 4096), sources.calibrated(512, 512, 1024, 4096, seed=1)
    for name in ("policy_hidden", "policy_targets", "distill_hidden", "teacher_hidden", "head"):
        assert torch.equal(getattr(calibrated, name), getattr(again, name))
        assert not torch.equal(getattr(calibrated, name), getattr(other, name))
    assert "synthetic" in calibrated.source["what"]


def test_calibrated_targets_are_drawn_from_the_distribution(calibrated):
    surprise = -logprobs(calibrated.policy_hidden, calibrated.head, calibrated.policy_targets)
    assert float(surprise.mean()) == pytest.approx(0.21, abs=0.12)


def test_spread_states_have_the_set_distance():
    states = sources.make("spread:0.03", 64, 96, 8, 16, dtype=torch.float32, device="cpu", seed=0)
    ratio = (states.teacher_hidden - states.distill_hidden).norm(dim=1) / states.distill_hidden.norm(dim=1)
    torch.testing.assert_close(ratio, torch.full((16,), 0.03))
    assert len(states.policy_targets) == 8


@pytest.fixture
def problem_file(tmp_path) -> Path:
    rows = [
        {"id": f"p{i}", "problem": f"{i}+{i}=", "answer": str(2 * i), "solution": f"{2 * i} is it" * 5}
        for i in range(10, 30)
    ]
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_real_states_come_from_both_contexts_and_are_cached(builtin_folder, problem_file, tmp_path):
    cache = tmp_path / "states.pt"
    states = sources.real(builtin_folder, problem_file, 24, cache=cache)
    assert states.source["kind"] == "real"
    assert states.source["model"] == builtin_folder.name
    assert len(states.policy_hidden) == len(states.teacher_hidden) == len(states.policy_targets) == 24
    assert torch.equal(states.policy_hidden, states.distill_hidden)
    assert not torch.equal(states.teacher_hidden, states.distill_hidden)
    modified = cache.stat().st_mtime_ns
    again = sources.real(builtin_folder, problem_file, 24, cache=cache)
    assert torch.equal(again.teacher_hidden, states.teacher_hidden)
    assert cache.stat().st_mtime_ns == modified
    assert len(sources.real(builtin_folder, problem_file, 16, cache=cache).policy_hidden) == 16
    assert cache.stat().st_mtime_ns != modified


def test_own_states_are_of_samples_under_both_prompts(builtin_folder, problem_file, tmp_path):
    def made():
        return sources.own(builtin_folder, problem_file, 12, tokens=6, cache=tmp_path / "states.pt")

    states = made()
    assert (states.source["kind"], states.source["tokens"]) == ("own", 6)
    assert len(states.policy_hidden) == len(states.policy_targets) == len(states.distill_hidden) == 12
    assert not torch.equal(states.teacher_hidden, states.distill_hidden)
    assert not torch.equal(states.policy_hidden, states.distill_hidden)
    assert torch.equal(made().policy_hidden, states.policy_hidden)
    with pytest.raises(SgpoError, match="too few problems"):
        sources.own(builtin_folder, problem_file, 100_000, tokens=2)


def test_bad_requests_are_one_sentence(builtin_folder, problem_file):
    def make(name, hidden=64, vocab=96, **options):
        return sources.make(name, hidden, vocab, 8, 8, dtype=torch.float32, device="cpu", seed=0, **options)

    for name in ("nothing", "spread:", "spread:x", "real:", "own:", "calibrated:1"):
        with pytest.raises(SgpoError, match="expected calibrated, spread:RATIO, real:MODEL_FOLDER or own:MODEL_FOLDER"):
            make(name)
    with pytest.raises(SgpoError, match="the shape asked for H5 V6"):
        make(f"real:{builtin_folder}", 5, 6, data=problem_file)
    with pytest.raises(SgpoError, match="No problem file"):
        make(f"real:{builtin_folder}", data=problem_file.with_name("missing.jsonl"))
    with pytest.raises(SgpoError, match="were asked for"):
        sources.real(builtin_folder, problem_file, 100_000)
