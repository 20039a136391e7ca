"""Columns that a bias of -inf closes, and rows whose logits are NaN: neither may reach a loss or a gradient."""

from __future__ import annotations

import pytest
import sgpo_kernels
import torch
from sgpo_kernels import reference, testing

CLOSED = slice(29, 37)
KINDS = ("forward_kl", "reverse_kl", "js")
IMPLS = pytest.mark.parametrize("impl", ["torch", "triton"])


def closed(case, columns=CLOSED):
    """The case with a head whose `columns` are closed, no target among them."""
    for name in ("targets", "policy_targets"):
        if name in case.fixed:
            case.fixed[name] %= columns.start
    case.leaves["bias"][columns] = -torch.inf
    return case


def without(case, columns=CLOSED):
    """The same case in float64, for `reference`, with a vocabulary of the open columns alone."""
    for name in ("head", "bias"):
        case.leaves[name] = case.leaves[name][: columns.start]
    return case


@IMPLS
@pytest.mark.parametrize("tolerance", [0.0, 0.02])
@pytest.mark.parametrize("temperature", [1.0, "rows"])
def test_a_closed_column_is_as_none(make_case, op, impl, temperature, tolerance):
    """Losses, entropies, statistics and gradients are those of the smaller vocabulary; closed columns have none."""
    options = {} if op == "logprob" else {"column_tolerance": tolerance}
    case = closed(make_case(op, temperature=temperature))
    ours = case.results(impl=impl, **options)
    truth_case = without(closed(make_case(op, temperature=temperature)))
    plain, truth = truth_case.results(reference), truth_case.results(reference, torch.float64)
    for name, value in ours.items():
        assert value.isfinite().all(), name
        if "dropped" in name or "column_share" in name:
            continue
        if name in ("grad.head", "grad.bias"):
            assert value[CLOSED].abs().max() < 1e-30, name
            value = value[: CLOSED.start]
        if value.dtype == torch.bool:
            assert torch.equal(value, truth[name]), name
        elif tolerance == 0.0 or not name.startswith("grad."):
            terms = max(float(leaf.abs().max()) for leaf in case.leaves.values() if leaf.isfinite().all())
            cancelled = 1.7 * max(terms, 1.0) if name.startswith("grad.") or name == "loss" else 0.0
            testing.assert_close_to_reference(value, plain[name], truth[name], name=name, cancelled=cancelled)


@IMPLS
@pytest.mark.parametrize("limit", [None, 0.4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_column_that_one_context_closes(make_case, kind, impl, limit):
    """The divergence of a row whose teacher has no such token is finite, or beyond any limit; it is never NaN."""
    case = make_case(kind, dead=0.0, max_token_kl=limit)
    head, bias = case.leaves["head"], case.leaves["bias"]
    case.fixed |= {"teacher_head": head.clone(), "teacher_bias": bias.clone()}
    case.fixed["teacher_bias"][CLOSED] = -torch.inf
    ours = case.results(impl=impl)
    assert all(value.isfinite().all() for value in ours.values())
    assert (ours["divergence"] >= 0).all()
    if kind == "forward_kl":
        p_open = torch.softmax((case.leaves["hidden"] @ head.T + bias).double(), 1)[:, : CLOSED.start].sum(1)
        assert (ours["divergence"] >= -p_open.log() - 1e-5).all()


@IMPLS
@pytest.mark.parametrize("over_limit", ["mask", "clamp", "scale"])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_is_over_any_limit(make_case, kind, impl, over_limit):
    """A row whose teacher is NaN is one that the limit drops: no loss but the limit itself, no gradient, counted."""
    case = make_case(kind, dead=0.0, over_limit=over_limit)
    case.fixed["teacher_hidden"][3] = torch.nan
    ours = case.results(impl=impl)
    assert ours["over_limit"][3]
    assert ours["divergence"][3].isnan()
    assert ours["loss"].isfinite()
    assert not ours["grad.hidden"][3].any()
    assert all(ours[name].isfinite().all() for name in ("grad.hidden", "grad.head", "grad.bias"))
    others = make_case(kind, dead=0.0, over_limit=over_limit)
    others.fixed["token_weight"][3] = 0.0
    expected = others.results(impl=impl)
    for name in ("grad.hidden", "grad.head", "grad.bias"):
        torch.testing.assert_close(ours[name], expected[name])


@IMPLS
def test_without_a_limit_nan_is_seen(make_case, impl):
    """Nothing hides it: the loss is NaN, so that a trainer can stop."""
    case = make_case("forward_kl", dead=0.0, max_token_kl=None)
    case.fixed["teacher_hidden"][3] = torch.nan
    ours = case.results(impl=impl)
    assert ours["loss"].isnan()
    assert not ours["over_limit"].any()
    assert (
        sgpo_kernels.linear_logprob(
            case.leaves["hidden"] * torch.nan, case.leaves["head"], torch.zeros(24, dtype=torch.int64), impl=impl
        )[0]
        .isnan()
        .all()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_closes_columns_too(make_case, kind):
    found = closed(make_case(kind)).results(reference, torch.float64)
    expected = without(closed(make_case(kind))).results(reference, torch.float64)
    torch.testing.assert_close(found["loss"], expected["loss"])
    torch.testing.assert_close(found["grad.hidden"], expected["grad.hidden"])
