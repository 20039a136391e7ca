"""The live-column backward: what is dropped is bounded, row by row; what is kept is exact."""

from __future__ import annotations

import pytest
import sgpo_kernels
import torch
from sgpo_kernels import backend, backend_torch, chunk_loop, reference, row_groups, sizes
from sgpo_kernels.inputs import ClipRange
from torch import Tensor

LOSSES = ("policy", "policy_on", "policy_dual", "forward_kl", "reverse_kl", "js", "sgpo")
KINDS = ("forward_kl", "reverse_kl", "js")


def confident(rows: int, vocab: int, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Distributions that sit on a few of 12 tokens shared by the rows, entropies from 1e-6 to about 2; the teacher's
    differ by 1e-3 to 2 nats in the logits of these tokens. The head is a rotation, so that any logits can be had."""
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    head = torch.linalg.qr(normal(vocab, vocab)).Q
    tokens = torch.randperm(vocab, generator=gen)[:12]
    logits = normal(rows, vocab) - 24
    logits[:, tokens] += 24 - 18 * torch.rand(rows, 12, generator=gen, dtype=torch.float64)
    targets = tokens[torch.randint(12, (rows,), generator=gen)]
    logits[torch.arange(rows), targets] += 8 * torch.rand(rows, generator=gen, dtype=torch.float64)
    teacher = logits.clone()
    teacher[:, tokens] += 10 ** (3.3 * torch.rand(rows, 1, generator=gen).double() - 3) * normal(rows, 12)
    return {
        "hidden": (logits @ head).to(dtype),
        "teacher_hidden": (teacher @ head).to(dtype),
        "head": head.to(dtype),
        "targets": targets,
        "token_weight": 10 ** (torch.rand(rows, generator=gen) * 9 - 6),
        "advantages": torch.randn(rows, generator=gen),
    }


def size_of_rows(kind: str, x: dict[str, Tensor]) -> Tensor:
    """The weight of each row, with the advantage of policy rows."""
    return x["token_weight"].double() * (x["advantages"].double().abs() if kind == "policy" else 1.0)


def call(kind: str, x: dict[str, Tensor], **options):
    """(loss, stats, hidden, head) of our op."""
    hidden, head = (x[name].clone().requires_grad_() for name in ("hidden", "head"))
    if kind == "policy":
        loss, stats = sgpo_kernels.linear_policy_loss(
            hidden,
            head,
            x["targets"],
            advantages=x["advantages"],
            token_weight=x["token_weight"],
            clip_low=None,
            clip_high=None,
            **options,
        )
    else:
        loss, stats = sgpo_kernels.linear_divergence(
            hidden, x["teacher_hidden"], head, token_weight=x["token_weight"], kind=kind, **options
        )
    loss.backward()
    return loss, stats, hidden, head


def exact_dz(kind: str, x: dict[str, Tensor], temperature: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """float64, by autograd: (d row loss / d finished logits over the row's weight, d loss / d product), both [N, V]."""
    weight = x["token_weight"].double()
    raw = (x["hidden"].double() @ x["head"].double().t()).requires_grad_()
    capped = raw if softcap is None else softcap * torch.tanh(raw / softcap)
    finished = capped / temperature
    finished.retain_grad()
    eye, one = torch.eye(raw.shape[1]).double(), torch.ones_like(weight)
    if kind == "policy":
        advantages = x["advantages"].double()
        logp = finished.log_softmax(1).gather(1, x["targets"].unsqueeze(1)).squeeze(1)
        loss = -(weight * advantages * logp).sum()
        size = (weight * advantages).abs()
    else:
        teacher = x["teacher_hidden"].double() @ x["head"].double().t()
        teacher = (teacher if softcap is None else softcap * torch.tanh(teacher / softcap)) / temperature
        loss, _ = reference.linear_divergence(finished, teacher, eye, token_weight=weight, kind=kind)
        size = weight * one
    loss.backward()
    assert finished.grad is not None
    assert raw.grad is not None
    return finished.grad / size.unsqueeze(1), raw.grad


@pytest.mark.parametrize("kind", ["policy", *KINDS])
@pytest.mark.parametrize("seed", range(25))
def test_the_bound_holds_on_every_row(kind, seed):
    """100 x 104 rows, weights over nine decades, against float64: every row's dropped mass lies under its bound, the
    error of its hidden gradient under bound times max |W|, and no column that had to live was dropped."""
    x = confident(104, 192, seed)
    tolerance = 2.0 ** -(6 + seed % 9)
    temperature, softcap = (1.0, 0.7, 1.4)[seed % 3], (None, 30.0)[seed % 2]
    options = {"temperature": temperature, "logit_softcap": softcap, "column_tolerance": tolerance}
    _, stats, hidden, head = call(kind, x, chunk_rows=104, **options)
    core, dz = exact_dz(kind, x, temperature, softcap)
    dropped = ~head.grad.any(1)
    share = stats.column_share[0].item()
    assert share == pytest.approx(float((~dropped).double().mean()))
    assert 0 < share < sizes.DENSE_SHARE
    # float32 decides about columns on the edge either way.
    assert float(core[:, dropped].abs().max()) < tolerance * (1 + 1e-3)
    lost = dz[:, dropped].abs().sum(1)
    assert bool((lost <= stats.dropped.double()).all())
    # float32 logits near 30, against the row's weight.
    rounding = 1e-4 * dz.abs().sum(1) + 2e-5 * size_of_rows(kind, x)
    missing = (hidden.grad.double() - dz @ x["head"].double()).abs().amax(1)
    assert bool((missing <= (stats.dropped.double() + rounding) * float(x["head"].abs().max())).all())
    if softcap is None and kind in ("policy", "forward_kl"):
        # The bound is not idle: it is the mass itself and the size of its sum, up to rounding.
        lost += dz[:, dropped].sum(1).abs()
        assert bool((lost <= stats.dropped.double()).all())
        assert bool((stats.dropped.double() <= 1.01 * lost + 2e-5 * size_of_rows(kind, x) / temperature).all())


@pytest.mark.parametrize("kind", ["policy", *KINDS])
@pytest.mark.parametrize("chunk", [1, 20, 64])
def test_the_bound_holds_for_any_chunks(kind, chunk):
    x = confident(64, 192, 11)
    _, stats, hidden, _ = call(kind, x, chunk_rows=chunk, column_tolerance=2.0**-8)
    _, dz = exact_dz(kind, x, 1.0, None)
    # float32 logits near 30, against the row's weight.
    rounding = 1e-4 * dz.abs().sum(1) + 2e-5 * size_of_rows(kind, x)
    missing = (hidden.grad.double() - dz @ x["head"].double()).abs().amax(1)
    assert bool((missing <= (stats.dropped.double() + rounding) * float(x["head"].abs().max())).all())
    assert len(stats.column_share.unique()) > 1 or chunk > 1


@pytest.mark.parametrize("op", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_where_every_column_lives_it_is_the_exact_result(make_case, op, dtype):
    case = make_case(op, dtype)
    exact, ours = case.results(chunk_rows=5), case.results(chunk_rows=5, column_tolerance=1e-30)
    # A chunk in which every row is gated has no live column at all.
    assert all(torch.equal(exact[name], ours[name]) for name in exact if "column_share" not in name)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("op", LOSSES)
def test_gathered_columns_give_what_the_dense_product_gives(make_case, op, softcap, monkeypatch):
    """All columns live, but the dense product is forbidden."""
    case = make_case(op, torch.float64, logit_softcap=softcap)
    exact = case.results(chunk_rows=5)
    monkeypatch.setattr(sizes, "DENSE_SHARE", 1.0)
    ours = case.results(chunk_rows=5, column_tolerance=1e-300)
    for name, value in exact.items():
        if "dropped" not in name and "column_share" not in name:
            torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", ["policy", *KINDS])
def test_error_on_confident_states_is_below_that_of_bf16(kind):
    x = confident(256, 192, 7)
    x["token_weight"] = torch.full((256,), 1 / 256)
    _, _, hidden, head = call(kind, x)
    _, stats, live_hidden, live_head = call(kind, x, column_tolerance=2.0**-12)
    for ours, truth in ((live_hidden.grad, hidden.grad), (live_head.grad, head.grad)):
        assert float((ours - truth).norm() / truth.norm()) < 2.5e-3
    assert float(stats.column_share.max()) < 0.25


@pytest.mark.parametrize("kind", ["policy", *KINDS])
@pytest.mark.parametrize("softcap", [None, 200.0])
def test_the_sum_of_the_dropped_gradient_comes_back(kind, softcap):
    """A tail of a few percent over a head whose rows have a common part, as real ones have: dropping alone loses it.
    With a soft-cap it stays lost."""
    gen = torch.Generator().manual_seed(4)
    rotation, common = torch.linalg.qr(torch.randn(193, 193, generator=gen).double()).Q.split([192, 1])
    logits = torch.randn(64, 192, generator=gen).double()
    logits[:, :12] += 6
    teacher = logits.clone()
    teacher[:, :12] += torch.randn(64, 1, generator=gen).double()
    x = {
        "hidden": logits @ rotation,
        "teacher_hidden": teacher @ rotation,
        "head": rotation + common,
        "targets": torch.randint(12, (64,), generator=gen),
        "token_weight": torch.ones(64),
        "advantages": torch.ones(64),
    }
    _, stats, hidden, head = call(kind, x, column_tolerance=2.0**-6, logit_softcap=softcap)
    _, dz = exact_dz(kind, x, 1.0, softcap)
    exact, kept = dz @ x["head"], (dz * head.grad.any(1)) @ x["head"]
    ours, alone = (float((got - exact).norm()) for got in (hidden.grad, kept))
    assert float(stats.column_share.max()) < 0.2
    assert ours == pytest.approx(alone) if softcap else ours < 0.5 * alone


@pytest.mark.parametrize("kind", ["policy", *KINDS])
@pytest.mark.parametrize("factor", [2.0**-20, 2.0**10])
def test_the_weight_does_not_move_the_set(kind, factor):
    """alpha and 1 / len scale the gradient; which columns live stays the same."""
    x = confident(64, 192, 3)
    _, stats, hidden, head = call(kind, x, column_tolerance=2.0**-10)
    x["token_weight"] = x["token_weight"] * factor
    _, scaled, scaled_hidden, scaled_head = call(kind, x, column_tolerance=2.0**-10)
    assert torch.equal(scaled.column_share, stats.column_share)
    for ours, before in ((scaled_hidden, hidden), (scaled_head, head)):
        torch.testing.assert_close(ours.grad, before.grad * factor, rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled.dropped, stats.dropped * factor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["policy", *KINDS])
def test_same_bits_each_time(kind):
    x = confident(64, 192, 5)
    first, second = (call(kind, x, column_tolerance=2.0**-10, chunk_rows=20) for _ in range(2))
    assert torch.equal(first[2].grad, second[2].grad)
    assert torch.equal(first[3].grad, second[3].grad)
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize("kind", ["policy", *KINDS])
def test_nan_does_not_vanish(kind):
    x = confident(16, 192, 5)
    x["hidden"][3, 2] = torch.nan
    loss, _, hidden, _ = call(kind, x, column_tolerance=2.0**-8)
    assert loss.isnan()
    assert hidden.grad[3].isnan().any()


@pytest.mark.parametrize("kind", ["policy", *KINDS])
def test_without_gradient_nothing_is_dropped(kind):
    x = confident(16, 192, 5)
    with torch.no_grad():
        options = {"token_weight": x["token_weight"], "column_tolerance": 2.0**-8}
        if kind == "policy":
            options |= {"advantages": x["advantages"], "clip_low": None, "clip_high": None}
            _, stats = sgpo_kernels.linear_policy_loss(x["hidden"], x["head"], x["targets"], **options)
        else:
            _, stats = sgpo_kernels.linear_divergence(x["hidden"], x["teacher_hidden"], x["head"], kind=kind, **options)
    assert not stats.dropped.any()
    assert bool((stats.column_share == 1).all())


def test_gated_rows_keep_no_column_alive():
    """Rows over the limit have no gradient: alone in a chunk they leave no live column and drop nothing."""
    x = confident(32, 192, 9)
    _, stats, hidden, head = call("forward_kl", x, column_tolerance=2.0**-8, max_token_kl=1e-20)
    assert bool(stats.over_limit.all())
    assert not stats.column_share.any()
    assert not stats.dropped.any()
    assert not hidden.grad.any()
    assert not head.grad.any()


def test_the_bias_gradient_is_that_of_the_live_columns():
    x = confident(64, 192, 2)
    bias = torch.zeros(192, requires_grad=True)
    _, stats, _, _ = call("policy", x, column_tolerance=2.0**-8, bias=bias)
    _, dz = exact_dz("policy", x, 1.0, None)
    assert bias.grad is not None
    live = bias.grad != 0
    assert float(live.double().mean()) == pytest.approx(stats.column_share[0].item(), abs=0.01)
    torch.testing.assert_close(bias.grad[live].double(), dz.sum(0)[live], rtol=1e-3, atol=1e-3)


def test_targets_outside_the_live_columns_are_no_one_hot_elsewhere():
    """A target whose probability is 1 to rounding has no gradient of its own; another row's column must not get it."""
    z = torch.full((2, 8), -40.0)
    z[0, 5], z[1, 2], z[1, 3] = 40.0, 1.0, 1.0
    targets = torch.tensor([5, 2])
    side = backend.Logits(z, None, None, None)
    one, rows = torch.ones(2), torch.arange(2)
    values = torch.zeros(backend.VALUE_ROWS, 2)
    clip_range = ClipRange(None, None, None)
    parts = backend_torch.scan(side, targets).unsqueeze(0)
    table = backend_torch.policy_row_values(parts, 0, targets, None, one, one, clip_range, rows, one, values)
    dz, *_ = backend_torch.gradient_columns(
        "score", side, None, table, targets, backend.LiveColumns(torch.tensor([2, 3]), None), table.dtype
    )
    torch.testing.assert_close(dz, torch.tensor([[0.0, 0.0], [-0.5, 0.5]]))


@pytest.mark.parametrize("op", ["logprob", *LOSSES])
@pytest.mark.parametrize("tolerance", [0.0, 2.0**-4])
def test_while_a_graph_is_captured_dead_rows_run_as_zeros(make_case, op, tolerance, monkeypatch):
    """The host asks for no count then; garbage in dead rows stays where it is, and the results are the same."""
    case = make_case(op, torch.float64, temperature="rows")
    extra = {} if op == "logprob" else {"column_tolerance": tolerance}
    plain = case.results(chunk_rows=100, **extra)
    for name in ("hidden", "policy_hidden", "distill_hidden"):
        if name in case.leaves and case.weights():
            case.leaves[name][case.weights()[-1 if name == "distill_hidden" else 0] == 0] = torch.nan
    for module in (row_groups, chunk_loop):
        monkeypatch.setattr(module, "capturing", lambda tensor: True)
    ours = case.results(chunk_rows=100, **extra)
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-12)
