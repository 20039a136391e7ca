"""Divergences: limits, teacher side, exact zeros, small values, properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sgpo_kernels import backend, backend_torch, linear_divergence, reference

KINDS = ("forward_kl", "reverse_kl", "js")
LIMITS = ("mask", "clamp", "scale")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("over_limit", LIMITS)
@pytest.mark.parametrize("max_token_kl", [None, 1e-3, 0.1, 0.5, 100.0])
@pytest.mark.parametrize("kind", KINDS)
def test_every_limit_with_every_kind(make_case, kind, over_limit, max_token_kl, dtype):
    case = make_case(
        kind, dtype, (20, 8, 41), max_token_kl=max_token_kl, over_limit=over_limit, spread=0.6 if kind == "js" else 0.3
    )
    ours = case.check(chunk_rows=6)
    if max_token_kl == 0.1:
        assert ours["over_limit"].any()
        assert not ours["over_limit"][ours["live"]].all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("over_limit", ["mask", "clamp"])
def test_rows_over_the_limit_have_no_gradient_at_all(make_case, kind, over_limit):
    case = make_case(kind, max_token_kl=0.1, over_limit=over_limit, dead=0.0)
    ours = case.results()
    over = ours["over_limit"]
    assert over.any()
    assert not ours["grad.hidden"][over].any()
    assert ours["grad.hidden"][~over].any(dim=1).all()
    assert (ours["divergence"][over] > 0.1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_on_the_limit_counts_in_full(make_case, kind):
    """Eq. 5 keeps d <= delta."""
    case = make_case(kind, torch.float64, dead=0.0, max_token_kl=None)
    limit = float(case.results()["divergence"].median())
    ours = case.results(max_token_kl=limit)
    on_limit = ours["divergence"] == limit
    assert on_limit.sum() == 1
    assert not ours["over_limit"][on_limit].any()
    assert ours["grad.hidden"][on_limit].any()
    assert torch.equal(ours["over_limit"], ours["divergence"] > limit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 5), (17, 24, 301), (64, 128, 1000)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_states_give_exactly_zero(make_case, kind, shape, dtype):
    case = make_case(kind, dtype, shape, dead=0.0, temperature="rows", logit_scale=5.0)
    case.fixed["teacher_hidden"] = case.leaves["hidden"].clone()
    ours = case.results(chunk_rows=5)
    for name in ("loss", "divergence", "grad.hidden", "grad.head", "grad.bias"):
        assert not ours[name].any(), name


@pytest.mark.parametrize("spread", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("kind", KINDS)
def test_small_divergences_keep_their_relative_accuracy(make_case, kind, spread):
    case = make_case(kind, torch.float32, (32, 64, 500), dead=0.0, spread=spread, max_token_kl=None)
    ours, truth = case.results(), case.results(reference, torch.float64)
    assert (ours["divergence"] > 0).all()
    # The logits carry 1e-6 of float32 error against a change of the size of `spread`.
    torch.testing.assert_close(ours["divergence"].double(), truth["divergence"], rtol=2e-5 / spread, atol=0)
    size = truth["grad.hidden"].abs().max()
    assert (ours["grad.hidden"] - truth["grad.hidden"]).abs().max() < 2e-5 / spread * size


def row_values(kind: str, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The divergence of rows of logits, [C], by the row arithmetic alone."""
    sides = [backend.Logits(x.clone(), None, None, None) for x in (student, teacher)]
    parts = torch.cat([backend_torch.scan(side, None) for side in sides]).unsqueeze(0)
    values = student.new_zeros(backend.VALUE_ROWS, len(student))
    table = backend_torch.pair_row_values(parts, 0, torch.arange(len(student)), values)
    return backend_torch.divergence_sums(kind, *sides, table)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_float32_sum_of_terms_is_right_where_the_plain_sum_is_not(kind):
    gen = torch.Generator().manual_seed(1)
    student = torch.randn(16, 20000, generator=gen, dtype=torch.float64).float()
    teacher = (student + 2e-4 * torch.randn(16, 20000, generator=gen)).float()
    exact_s, exact_t = (torch.log_softmax(x.double(), 1) for x in (student, teacher))
    pair = {"forward_kl": (exact_t, exact_s), "reverse_kl": (exact_s, exact_t)}
    if kind == "js":
        middle = torch.logaddexp(exact_s, exact_t) - math.log(2)
        truth = sum((x.exp() * (x - middle)).sum(1) for x in (exact_s, exact_t)) / 2
    else:
        truth = (pair[kind][0].exp() * (pair[kind][0] - pair[kind][1])).sum(1)
    logp_s, logp_t = (x.log_softmax(1) for x in (student, teacher))
    plain = (logp_t.exp() * (logp_t - logp_s)).sum(1)
    value = row_values(kind, student, teacher)
    assert ((value - truth) / truth).abs().max() < 0.05
    if kind == "forward_kl":
        assert ((plain - truth) / truth).abs().max() > 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_the_series_meets_the_exact_form(kind):
    """A pair of two-column rows whose log ratio crosses the threshold of the series."""
    shift = torch.linspace(-0.2, 0.2, 401, dtype=torch.float64)
    student = torch.stack([shift, torch.zeros_like(shift)], 1)
    teacher = torch.zeros_like(student)
    p_s, p_t = torch.softmax(student, 1), torch.softmax(teacher, 1)
    exact_s, exact_t = student.log_softmax(1), teacher.log_softmax(1)
    middle = torch.logaddexp(exact_s, exact_t) - math.log(2)
    truth = {
        "forward_kl": (p_t * (exact_t - exact_s)).sum(1),
        "reverse_kl": (p_s * (exact_s - exact_t)).sum(1),
        "js": ((p_s * (exact_s - middle)).sum(1) + (p_t * (exact_t - middle)).sum(1)) / 2,
    }[kind]
    value = row_values(kind, student, teacher)
    torch.testing.assert_close(value, truth, rtol=1e-8, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("separate", [False, True])
def test_nothing_flows_to_the_teacher(make_case, kind, separate):
    case = make_case(kind, bias=False)
    teacher = case.fixed["teacher_hidden"].requires_grad_()
    extra = {}
    if separate:
        extra["teacher_head"] = case.leaves["head"].clone().requires_grad_()
        extra["teacher_bias"] = torch.zeros(extra["teacher_head"].shape[0], requires_grad=True)
    ours = case.results(**extra)
    assert teacher.grad is None
    assert all(value.grad is None for value in extra.values())
    teacher.requires_grad_(False)
    truth = case.results(reference, torch.float64)
    torch.testing.assert_close(ours["grad.head"].double(), truth["grad.head"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_teacher_of_another_width(make_case, kind, dtype, with_bias):
    rows, width, vocab = 14, 6, 23
    case = make_case(kind, dtype, (rows, width, vocab))
    gen = torch.Generator().manual_seed(5)
    case.fixed["teacher_hidden"] = torch.randn(rows, 11, generator=gen).to(dtype)
    case.fixed["teacher_head"] = (0.5 * torch.randn(vocab, 11, generator=gen)).to(dtype)
    if with_bias:
        case.fixed["teacher_bias"] = torch.randn(vocab, generator=gen).to(dtype)
    case.check(chunk_rows=4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_bias_of_its_own(make_case, kind):
    case = make_case(kind, torch.float64)
    case.fixed["teacher_bias"] = torch.linspace(-1, 1, 37, dtype=torch.float64)
    ours, truth = case.results(), case.results(reference)
    for name, value in ours.items():
        if value.dtype != torch.bool:
            torch.testing.assert_close(value, truth[name], rtol=1e-9, atol=1e-12)


def divergence_of(student: list[float], teacher: list[float], kind: str, **extra) -> tuple[float, torch.Tensor]:
    """Rows of logits through an identity head."""
    size = len(student)
    hidden = torch.tensor([student], dtype=torch.float32, requires_grad=True)
    loss, stats = linear_divergence(
        hidden, torch.tensor([teacher]), torch.eye(size), token_weight=torch.ones(1), kind=kind, **extra
    )
    loss.backward()
    assert hidden.grad is not None
    return stats.divergence.item(), hidden.grad[0]


logits = st.floats(-1000, 1000, width=32)
rows = st.integers(1, 8).flatmap(lambda n: st.tuples(*(st.lists(logits, min_size=n, max_size=n) for _ in range(2))))


@given(rows, st.sampled_from(KINDS))
@settings(max_examples=150, deadline=None)
def test_divergences_are_never_negative_and_gradients_sum_to_zero(pair, kind):
    value, grad = divergence_of(*pair, kind)
    assert value >= 0
    assert math.isfinite(value)
    assert torch.isfinite(grad).all()
    assert abs(float(grad.sum())) <= 1e-4 * max(1.0, float(grad.abs().sum()))
    if kind == "js":
        assert value <= math.log(2) * (1 + 1e-6)


@given(rows, st.sampled_from(KINDS))
@settings(max_examples=100, deadline=None)
def test_divergence_matches_float64_for_any_logits(pair, kind):
    value, grad = divergence_of(*pair, kind)
    student, teacher = (torch.tensor([x], dtype=torch.float64) for x in pair)
    student.requires_grad_()
    loss, _ = reference.linear_divergence(
        student, teacher, torch.eye(len(pair[0])).double(), token_weight=torch.ones(1).double(), kind=kind
    )
    loss.backward()
    assert student.grad is not None
    assert value == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    # Logits near 1000 hold 6e-5 in float32 terms of the sums, and the reverse gradient is as large as the KL.
    torch.testing.assert_close(grad.double(), student.grad[0], rtol=1e-3, atol=1e-4 * max(1.0, value))


@given(rows)
@settings(max_examples=60, deadline=None)
def test_js_is_symmetric_and_kl_of_swapped_sides_is_the_other_kl(pair):
    forward, _ = divergence_of(*pair, "forward_kl")
    reverse, _ = divergence_of(pair[1], pair[0], "reverse_kl")
    assert forward == pytest.approx(reverse, rel=1e-4, abs=1e-7)
    js, _ = divergence_of(*pair, "js")
    swapped, _ = divergence_of(pair[1], pair[0], "js")
    assert js == pytest.approx(swapped, rel=1e-4, abs=1e-7)


@given(rows, st.sampled_from(KINDS), st.floats(1e-3, 5.0), st.sampled_from(LIMITS))
@settings(max_examples=80, deadline=None)
def test_a_limit_never_raises_the_loss(pair, kind, limit, over_limit):
    student, teacher = (torch.tensor([x]) for x in pair)
    args = (student, teacher, torch.eye(len(pair[0])))
    loss, stats = linear_divergence(
        *args, token_weight=torch.ones(1), kind=kind, max_token_kl=limit, over_limit=over_limit
    )
    assert loss.item() <= limit * (1 + 1e-6)
    assert stats.over_limit.item() == (stats.divergence.item() > torch.tensor(limit).item())
    if stats.over_limit.item():
        assert loss.item() == pytest.approx(0.0 if over_limit == "mask" else limit)
    else:
        assert loss.item() == stats.divergence.item()
