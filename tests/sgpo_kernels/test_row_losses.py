"""Losses per row (`token_weight=None`): any upstream gradient, by recomputation, in both implementations."""

from __future__ import annotations

import pytest
import sgpo_kernels
import torch
import torch._dynamo.testing
from sgpo_kernels import custom_op, reference, row_losses, sizes, testing
from torch import Tensor
from torch.utils.checkpoint import checkpoint

OPS = ("policy", "policy_on", "policy_dual", "forward_kl", "reverse_kl", "js")
TWO = ("policy_dual", "reverse_kl")
FORMULA = {"policy": "policy", "policy_dual": "policy"}


@pytest.fixture
def make_rows(make_case):
    """Cases without a weight; upstream gradients of both signs, every fourth exactly 0."""

    def make(op: str, *args, **fixed):
        case = make_case(op, *args, token_weight=None, **fixed)
        case.upstream[0, ::4] = 0.0
        return case

    return make


def gradients(case, run=None, **extra) -> list[Tensor]:
    """[losses, a gradient per leaf] of a random weighting of the losses."""
    leaves = {name: leaf.detach().clone().requires_grad_(name not in case.frozen) for name, leaf in case.leaves.items()}
    function = run or (lambda leaves: case.function(sgpo_kernels)(**leaves, **{**case.fixed, **extra})[0])
    losses = function(leaves)
    (losses * case.upstream[0].to(losses.dtype)).sum().backward()
    return [losses.detach(), *(leaf.grad for leaf in leaves.values() if leaf.grad is not None)]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("bias", "temperature", "softcap"), [(False, 1.0, None), (True, 0.7, 3.0), (True, "rows", None)]
)
def test_values_statistics_and_gradients(make_rows, op, dtype, bias, temperature, softcap):
    case = make_rows(op, dtype, (13, 8, 37), bias=bias, temperature=temperature, logit_softcap=softcap)
    ours = case.check(chunk_rows=5)
    assert ours["loss"].shape == (13,)
    assert not ours["grad.hidden"][::4].any()
    assert softcap or ours["grad.hidden"].any()
    assert {ours[name].dtype for name in ours if name.startswith("grad.")} == {dtype}


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_triton_kernels(make_rows, op, dtype):
    case = make_rows(op, dtype, (11, 8, 37), temperature="rows", logit_softcap=3.0)
    ours = case.check(impl="triton", chunk_rows=5)
    assert not ours["grad.hidden"][::4].any()


@pytest.mark.parametrize("over_limit", ["mask", "clamp", "scale"])
@pytest.mark.parametrize("kind", ["forward_kl", "js"])
def test_limits(make_rows, kind, over_limit):
    case = make_rows(kind, torch.float64, max_token_kl=0.1, over_limit=over_limit)
    assert case.check()["over_limit"].any()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tolerance", [0.0, 0.2])
def test_the_gradient_is_that_of_the_op_with_the_upstream_gradient_as_weight(make_rows, op, dtype, tolerance):
    case = make_rows(op, dtype)
    losses, *ours = gradients(case, column_tolerance=tolerance, chunk_rows=7)
    case.fixed["token_weight"] = case.upstream[0]
    leaves, (loss, stats) = case.call(sgpo_kernels, column_tolerance=tolerance, chunk_rows=7)
    loss.backward()
    assert all(torch.equal(grad, leaf.grad) for grad, leaf in zip(ours, leaves.values(), strict=True))
    torch.testing.assert_close((losses * case.upstream[0]).sum(), loss.detach(), rtol=2e-6, atol=2e-6)
    assert bool((stats.column_share[stats.live] < 1).any()) == bool(tolerance)


def test_what_a_tolerance_drops_is_said_to_be_unknown(make_rows):
    case = make_rows("forward_kl")
    _, (_, exact) = case.call(sgpo_kernels)
    assert not exact.dropped.any()
    assert exact.column_share.eq(1).all()
    _, (_, stats) = case.call(sgpo_kernels, column_tolerance=0.02)
    assert stats.dropped.isnan().all()
    assert stats.column_share.isnan().all()
    assert torch.equal(stats.divergence, exact.divergence)


@pytest.mark.parametrize("op", ["policy", "policy_dual"])
def test_gradcheck_through_a_reduction_of_ones_own(make_rows, op):
    case = make_rows(op, torch.float64, (5, 3, 6), seed=3)
    fixed = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in case.fixed.items()}

    def run(*leaves):
        losses = case.function(sgpo_kernels)(**dict(zip(case.leaves, leaves, strict=True)), **fixed)[0]
        return losses[:2].mean(), losses[2:].square().sum()

    assert torch.autograd.gradcheck(run, [leaf.requires_grad_() for leaf in case.leaves.values()], atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("op", TWO)
def test_all_upstream_gradients_zero_and_no_rows(make_rows, op, impl):
    case = make_rows(op)
    case.upstream.zero_()
    losses, *grads = gradients(case, impl=impl)
    assert losses.any()
    assert len(grads) == 3
    assert not any(grad.any() for grad in grads)
    losses, *grads = gradients(make_rows(op, torch.float32, (0, 8, 37)), impl=impl)
    assert losses.shape == (0,)
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("op", TWO)
def test_rows_without_upstream_gradient_cost_no_product(make_rows, op, monkeypatch):
    """Forward takes all rows, backward those with a gradient."""
    seen = []
    whole = custom_op.fused_loss_op

    def spy(*args):
        given, _, _ = custom_op.split_arguments(args)
        seen.append(given.distill_weight if given.policy_weight is None else given.policy_weight)
        return whole(*args)

    monkeypatch.setattr(custom_op, "fused_loss_op", spy)
    case = make_rows(op, dead=0.0)
    gradients(case)
    assert [int((values != 0).sum()) for values in seen] == [18]


@pytest.mark.parametrize("op", TWO)
def test_the_same_call_gives_the_same_bits_and_leaves_inputs_alone(make_rows, op):
    case, twin = make_rows(op), make_rows(op)
    first, second = gradients(case, chunk_rows=5), gradients(case, chunk_rows=5)
    with testing.poisoned_empty():
        poisoned = gradients(case, chunk_rows=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = gradients(case, chunk_rows=5)
    for value, *others in zip(first, second, poisoned, cast, strict=True):
        assert all(torch.equal(value, other) for other in others)
    for name, value in {**case.leaves, **case.fixed}.items():
        before = {**twin.leaves, **twin.fixed}[name]
        assert torch.equal(value, before) if isinstance(value, Tensor) else value == before


@pytest.mark.parametrize("op", TWO)
def test_backward_twice_and_by_another_gradient(make_rows, op):
    """Nothing of a first backward is left in the second."""
    leaves, (losses, _) = make_rows(op, torch.float64).call(sgpo_kernels)
    (once,) = torch.autograd.grad(losses[:10].sum(), leaves["head"], retain_graph=True)
    (rest,) = torch.autograd.grad(losses[10:].sum(), leaves["head"], retain_graph=True)
    (both,) = torch.autograd.grad(losses.sum(), leaves["head"])
    torch.testing.assert_close(once + rest, both, rtol=1e-11, atol=1e-13)
    assert not torch.equal(once, rest)


@pytest.mark.parametrize("frozen", ["head", "bias", "hidden"])
@pytest.mark.parametrize("op", TWO)
def test_frozen_inputs_get_no_gradient_and_change_nothing_else(make_rows, op, frozen):
    case = make_rows(op)
    full = case.results()
    case.frozen = {frozen}
    ours = case.results()
    assert set(full) - set(ours) == {f"grad.{frozen}"}
    assert all(torch.equal(value, full[name]) for name, value in ours.items())


def test_a_head_tied_to_the_embedding_gets_both_gradients(make_rows):
    case = make_rows("policy", torch.float64, bias=False)
    fixed = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in case.fixed.items()}

    def gradient(module) -> Tensor:
        weight = case.leaves["head"].clone().requires_grad_()
        losses, _ = module.linear_policy_loss(torch.tanh(weight[case.fixed["targets"]]), weight, **fixed)
        return torch.autograd.grad(losses.square().mean(), weight)[0]

    torch.testing.assert_close(gradient(sgpo_kernels), gradient(reference), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("op", TWO)
def test_compile_keeps_one_graph_and_gives_the_same_bits(make_rows, op):
    case = make_rows(op)

    def run(leaves):
        doubled = {name: leaf * 2.0 for name, leaf in leaves.items()}
        return case.function(sgpo_kernels)(**doubled, **case.fixed)[0] * 3.0

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(*pair) for pair in zip(gradients(case, compiled), gradients(case, run), strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("op", TWO)
def test_activation_checkpointing(make_rows, op, reentrant):
    case = make_rows(op)

    def run(leaves):
        def inner(*values):
            return case.function(sgpo_kernels)(**dict(zip(leaves, values, strict=True)), **case.fixed)[0]

        return checkpoint(inner, *leaves.values(), use_reentrant=reentrant)

    assert all(torch.equal(*pair) for pair in zip(gradients(case, run), gradients(case), strict=True))


@pytest.mark.parametrize("op", TWO)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_head_grad_takes_the_heads_gradient_unrounded(make_rows, op, dtype):
    case = make_rows(op, dtype)
    truth = case.results(reference, torch.float64)["grad.head"]
    buffer = torch.ones(case.leaves["head"].shape)
    _, *grads = gradients(case, head_grad=buffer)
    assert len(grads) == 2
    assert float((buffer - 1 - truth).norm() / truth.norm()) < (1e-5 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "chunk"), [((200, 16, 1501), 16), ((300, 8, 301), 7)], ids=str)
@pytest.mark.parametrize("op", TWO)
def test_peak_is_below_the_formula(make_rows, op, shape, chunk, dtype):
    rows, width, vocab = shape
    case = make_rows(op, dtype, shape, dead=0.0)
    measured = testing.cpu_peak(lambda: gradients(case, chunk_rows=chunk))
    formula = sizes.extra_bytes(FORMULA.get(op, "divergence"), rows, width, vocab, dtype, "cpu", chunk=chunk)
    inputs = sum(leaf.numel() * leaf.element_size() for leaf in case.leaves.values())
    assert measured.peak_bytes <= formula + inputs
    assert measured.largest_bytes is not None
    assert measured.largest_bytes <= max(chunk * (-(-vocab // 16) * 16), vocab * width) * 4


@pytest.mark.parametrize("op", TWO)
def test_forward_makes_no_gradient(make_rows, op):
    """Neither dW [V, H] nor dH [N, H] nor logits [N, V]: a chunk and a few numbers per row."""
    leaves = {name: leaf.requires_grad_() for name, leaf in make_rows(op, shape=(64, 64, 4000)).leaves.items()}
    case = make_rows(op, shape=(64, 64, 4000))
    measured = testing.cpu_peak(lambda: case.function(sgpo_kernels)(**leaves, **case.fixed, chunk_rows=1))
    assert measured.peak_bytes < 4000 * 64 * 4 / 2
    assert measured.largest_bytes is not None
    assert measured.largest_bytes <= 4000 * 4


@pytest.mark.parametrize("op", TWO)
def test_a_second_derivative_is_refused(make_rows, op):
    leaves, (losses, _) = make_rows(op).call(sgpo_kernels)
    grads = torch.autograd.grad(losses.square().sum(), list(leaves.values()), create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        sum(grad.square().sum() for grad in grads).backward()


@pytest.mark.parametrize("op", TWO)
def test_torch_checks_the_operator(make_rows, op, monkeypatch):
    operator, seen = row_losses._row_losses, []
    monkeypatch.setattr(row_losses, "_row_losses", lambda *args: seen.append(args) or operator(*args))
    make_rows(op).call(sgpo_kernels)
    torch.library.opcheck(operator, seen[0])


@pytest.mark.parametrize("name", ["policy_weight", "distill_weight"])
def test_two_groups_need_their_weights(make_case, name):
    with pytest.raises(TypeError, match=f"{name}: expected a torch.Tensor, got NoneType"):
        make_case("sgpo", **{name: None}).call(sgpo_kernels)
