"""The ops inside what people put around them: torch.compile, checkpointing, wide gradient buffers, operator checks."""

from __future__ import annotations

import pytest
import sgpo_kernels
import torch
import torch._dynamo.testing
from sgpo_kernels import custom_op, logprob, reference
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOSSES = ("policy", "policy_on", "policy_dual", "forward_kl", "reverse_kl", "js", "sgpo")


def scalar(case, module, leaves: dict[str, Tensor], **extra) -> Tensor:
    output = case.function(module)(**leaves, **{**case.fixed, **extra})
    return (output[0] * case.upstream[0] + output[1] * case.upstream[1]).sum() if case.op == "logprob" else output[0]


def gradients(function, case, **extra) -> list[Tensor]:
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in case.leaves.items()}
    value = function(leaves, **extra)
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves.values())]


def test_compile_keeps_one_graph_and_gives_the_same_bits(make_case, op):
    case = make_case(op)

    def run(leaves, **extra):
        # Work around the op, so that there is a graph to keep whole.
        doubled = {name: leaf * 2.0 for name, leaf in leaves.items()}
        return scalar(case, sgpo_kernels, doubled, **extra) + 1.0

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(gradients(compiled, case), gradients(run, case), strict=True):
        assert torch.equal(ours, eager)


@pytest.mark.parametrize("name", ["clip_high", "max_token_kl", "column_tolerance", "temperature"])
def test_annealing_does_not_recompile_for_ever(make_case, name):
    """A float is made a run-time value at its first change: two graphs at most, for any number of values."""
    case = make_case("sgpo")
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def run(hidden, value):
        leaves = {**case.leaves, "policy_hidden": hidden * 2.0}
        return case.function(sgpo_kernels)(**leaves, **{**case.fixed, name: value})[0]

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for step in range(6):
        value = 0.25 + 0.01 * step
        torch.testing.assert_close(
            compiled(case.leaves["policy_hidden"], value), run(case.leaves["policy_hidden"], value), rtol=0, atol=0
        )
    assert counter.frame_count <= 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(make_case, op, reentrant):
    case = make_case(op)

    def run(leaves):
        names = list(leaves)

        def inner(*values):
            return scalar(case, sgpo_kernels, dict(zip(names, values, strict=True)))

        return checkpoint(inner, *leaves.values(), use_reentrant=reentrant)

    plain = gradients(lambda leaves: scalar(case, sgpo_kernels, leaves), case)
    for ours, value in zip(gradients(run, case), plain, strict=True):
        assert torch.equal(ours, value)


@pytest.mark.parametrize("op", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head_grad_takes_the_gradients_of_all_micro_batches_unrounded(make_case, op, dtype):
    case = make_case(op, dtype)
    truth = case.results(reference, torch.float64)["grad.head"]
    buffer = torch.ones(case.leaves["head"].shape)
    for _ in range(3):
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in case.leaves.items()}
        (scalar(case, sgpo_kernels, leaves, head_grad=buffer) * -1.7).backward()
        assert leaves["head"].grad is None
        assert leaves["bias"].grad is not None
    error = float((buffer - 1 - 3 * truth).norm() / (3 * truth).norm())
    assert error < (5e-3 if dtype == torch.bfloat16 else 1e-5)


def test_head_grad_is_counted_once_under_checkpointing(make_case):
    case = make_case("policy")
    buffers = [torch.zeros(case.leaves["head"].shape) for _ in range(2)]
    for buffer, checkpointed in zip(buffers, (False, True), strict=True):
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in case.leaves.items()}

        def run(hidden, leaves=leaves, buffer=buffer):
            return scalar(case, sgpo_kernels, {**leaves, "hidden": hidden}, head_grad=buffer)

        value = checkpoint(run, leaves["hidden"], use_reentrant=False) if checkpointed else run(leaves["hidden"])
        value.backward()
    assert buffers[0].any()
    assert torch.equal(*buffers)


@pytest.mark.parametrize(
    ("buffer", "kind", "word"),
    [
        (torch.zeros(37, 8).bfloat16(), TypeError, "float32"),
        (torch.zeros(36, 8), ValueError, "shape"),
        (torch.zeros(37, 8, device="meta"), ValueError, "device"),
        (torch.zeros(37, 8, requires_grad=True), ValueError, "buffer"),
    ],
    ids=["dtype", "shape", "device", "grad"],
)
def test_a_wrong_head_grad_is_refused(make_case, buffer, kind, word):
    with pytest.raises(kind, match=word):
        make_case("policy").call(sgpo_kernels, head_grad=buffer)


def test_head_grad_of_a_frozen_head_is_refused(make_case):
    case = make_case("policy")
    case.frozen = {"head"}
    with pytest.raises(ValueError, match="frozen head"):
        case.call(sgpo_kernels, head_grad=torch.zeros(37, 8))


@pytest.mark.parametrize("op", LOSSES)
@pytest.mark.parametrize(("value", "kind"), [(-0.1, ValueError), (1.5, ValueError), ("x", TypeError)])
def test_a_wrong_column_tolerance_is_refused(make_case, op, value, kind):
    with pytest.raises(kind, match="column_tolerance"):
        make_case(op).call(sgpo_kernels, column_tolerance=value)


@pytest.mark.parametrize(("value", "kind"), [(0.0, ValueError), (-3.0, ValueError), ("x", TypeError)])
def test_a_wrong_softcap_is_refused(make_case, op, value, kind):
    with pytest.raises(kind, match="logit_softcap"):
        make_case(op).call(sgpo_kernels, logit_softcap=value)


@pytest.mark.parametrize("op", ["logprob", "policy", "forward_kl", "sgpo"])
def test_torch_checks_the_operators(make_case, op, monkeypatch):
    """Schema, fake implementation and autograd registration, by torch's own checks on the arguments of a real call."""
    module, name = (logprob, "_linear_logprob") if op == "logprob" else (custom_op, "fused_loss_op")
    operator, seen = getattr(module, name), []
    monkeypatch.setattr(module, name, lambda *args: seen.append(args) or operator(*args))
    make_case(op).call(sgpo_kernels)
    torch.library.opcheck(operator, seen[0])


@pytest.mark.parametrize("softcap", [0.5, 5.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_softcap_against_the_reference(make_case, op, dtype, softcap):
    make_case(op, dtype, logit_softcap=softcap, temperature=0.8).check(chunk_rows=5)


def test_gradcheck_with_softcap(make_case):
    case = make_case("policy", torch.float64, (5, 3, 6), logit_softcap=1.5, seed=3)
    fixed = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in case.fixed.items()}

    def run(hidden, head, bias):
        return sgpo_kernels.linear_policy_loss(hidden, head, bias=bias, **fixed)[0]

    assert torch.autograd.gradcheck(run, [leaf.requires_grad_() for leaf in case.leaves.values()], atol=1e-6)


@pytest.mark.parametrize("op", ["policy", "forward_kl"])
def test_seventy_thousand_rows(make_case, op):
    """As one chunk. Offsets beyond 32 bits: test_rows_beyond_32_bits, and test_cuda at real size."""
    case = make_case(op, torch.float32, (70_000, 4, 33), bias=False)
    case.check(chunk_rows=70_000)
