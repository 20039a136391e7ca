"""The clipped surrogate: bounds, on-policy form, and sgpo_loss as the sum of its parts."""

from __future__ import annotations

import itertools

import pytest
import sgpo_kernels
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sgpo_kernels import reference
from sgpo_kernels.backend_torch import clipped_surrogate
from sgpo_kernels.inputs import ClipRange


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("low", "high", "dual"), list(itertools.product([None, 0.0, 0.2, 1.0], [None, 0.0, 0.28], [None, 1.2, 3.0]))
)
def test_every_combination_of_bounds(make_case, low, high, dual, dtype):
    case = make_case("policy", dtype, (28, 6, 19), clip_low=low, clip_high=high, dual_clip=dual)
    case.check(chunk_rows=9)


def test_no_bound_means_the_plain_importance_weighted_gradient(make_case):
    case = make_case("policy", torch.float64, clip_low=None, clip_high=None)
    ours = case.results()
    assert not ours["clipped"].any()
    weights = case.fixed["token_weight"] * case.fixed["advantages"]
    torch.testing.assert_close(ours["loss"], -(weights.double() * ours["ratio"]).sum())


def test_clipped_rows_have_no_gradient(make_case):
    ours = make_case("policy_dual", dead=0.0).results()
    assert ours["clipped"].any()
    assert not ours["clipped"].all()
    assert not ours["grad.hidden"][ours["clipped"]].any()
    assert ours["grad.hidden"][~ours["clipped"]].any(dim=1).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_policy_ratio_is_exactly_one_and_the_loss_is_the_weighted_advantage(make_case, dtype):
    case = make_case("policy_on", dtype)
    ours = case.results()
    assert (ours["ratio"][ours["live"]] == 1).all()
    assert not ours["clipped"].any()
    expected = -(case.fixed["token_weight"] * case.fixed["advantages"]).double().sum()
    assert ours["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_on_policy_equals_old_logprobs_of_the_same_weights(make_case):
    case = make_case("policy_on", torch.float64)
    on_policy = case.results()
    logprobs, _ = sgpo_kernels.linear_logprob(**case.leaves, targets=case.fixed["targets"])
    explicit = case.results(old_logprobs=logprobs)
    for name, value in on_policy.items():
        torch.testing.assert_close(value, explicit[name], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("ratio", "advantage"), [(1.28, 2.0), (0.8, -2.0), (3.0, -2.0)])
def test_a_ratio_on_a_bound_is_not_clipped(ratio, advantage):
    tensors = (torch.tensor([x], dtype=torch.float64) for x in (ratio, advantage))
    loss, slope, clipped = clipped_surrogate(*tensors, ClipRange(0.2, 0.28, 3.0))
    assert not clipped.item()
    assert loss.item() == slope.item() == -ratio * advantage


@given(
    st.floats(1e-3, 20.0),
    st.floats(-3, 3).filter(lambda a: abs(a) > 1e-3),
    st.floats(0, 1),
    st.floats(0, 2),
    st.one_of(st.none(), st.floats(1.01, 10)),
)
@settings(max_examples=300, deadline=None)
def test_surrogate_is_the_formula(ratio, advantage, low, high, dual):
    tensors = (torch.tensor([x], dtype=torch.float64) for x in (ratio, advantage))
    loss, slope, clipped = clipped_surrogate(*tensors, ClipRange(low, high, dual))
    objective = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    if dual is not None and advantage < 0:
        objective = max(objective, dual * advantage)
    assert loss.item() == pytest.approx(-objective, rel=1e-12)
    assert slope.item() == (0.0 if clipped.item() else -ratio * advantage)
    if not clipped.item():
        assert loss.item() == -ratio * advantage


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, "rows"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "js"])
def test_sgpo_is_the_sum_of_its_parts(make_case, dtype, temperature, kind):
    case = make_case("sgpo", dtype, temperature=temperature, kind=kind)
    ours, fixed, leaves = case.results(), case.fixed, case.leaves
    temperatures = fixed.get("temperature", torch.ones(48))
    policy, policy_stats = sgpo_kernels.linear_policy_loss(
        leaves["policy_hidden"],
        leaves["head"],
        fixed["policy_targets"],
        token_weight=fixed["policy_weight"],
        temperature=temperatures[:24],
        bias=leaves["bias"],
        **{name: fixed[name] for name in ("old_logprobs", "advantages", "clip_low", "clip_high", "dual_clip")},
    )
    distill, distill_stats = sgpo_kernels.linear_divergence(
        leaves["distill_hidden"],
        fixed["teacher_hidden"],
        leaves["head"],
        token_weight=fixed["distill_weight"],
        temperature=temperatures[24:],
        bias=leaves["bias"],
        kind=kind,
        max_token_kl=fixed["max_token_kl"],
    )
    torch.testing.assert_close(ours["loss"], policy + distill)
    torch.testing.assert_close(ours["policy_loss"], policy)
    torch.testing.assert_close(ours["distill_loss"], distill)
    for name, value in policy_stats._asdict().items():
        torch.testing.assert_close(ours[f"policy.{name}"], value)
    for name, value in distill_stats._asdict().items():
        torch.testing.assert_close(ours[f"divergence.{name}"], value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("empty", ["policy", "distill"])
def test_sgpo_with_one_empty_group(make_case, empty, dtype):
    case = make_case("sgpo", dtype)
    names = {
        "policy": ("policy_hidden", "policy_targets", "policy_weight", "advantages", "old_logprobs"),
        "distill": ("distill_hidden", "teacher_hidden", "distill_weight"),
    }[empty]
    for name in names:
        store = case.leaves if name in case.leaves else case.fixed
        store[name] = store[name][:0]
    assert case.check()["policy_loss" if empty == "policy" else "distill_loss"] == 0


def test_the_head_gradient_is_summed_before_it_is_rounded(make_case):
    """512 equal rows in bfloat16: chunk sums rounded one by one would stall or drift."""
    case = make_case("policy_on", torch.bfloat16, (1, 8, 13), dead=0.0, bias=False)
    single = case.results(reference, torch.float64)["grad.head"]
    case.leaves["hidden"] = case.leaves["hidden"].expand(512, -1).contiguous()
    for name in ("targets", "advantages", "token_weight"):
        case.fixed[name] = case.fixed[name].expand(512).contiguous()
    grad = case.results(chunk_rows=1)["grad.head"].double()
    torch.testing.assert_close(grad, 512 * single, rtol=2**-7, atol=float(512 * single.abs().max()) * 2**-9)
