"""The custom operators as torch sees them: its own checks, Inductor, graphs kept for a second backward, soft-cap."""

from __future__ import annotations

import pytest
import sgpo_kernels
import torch
import torch._dynamo.testing
from sgpo_kernels import checks, custom_op, logprob
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IMPLS = ("torch",)
LOSSES = ("policy", "policy_on", "policy_dual", "forward_kl", "reverse_kl", "js", "sgpo")


def grown(case) -> dict[str, Tensor]:
    return {name: leaf.clone().requires_grad_() for name, leaf in case.leaves.items()}


def scalar(case, leaves: dict[str, Tensor], **extra) -> Tensor:
    output = case.function(sgpo_kernels)(**leaves, **{**case.fixed, **extra})
    return (output[0] * case.upstream[0] + output[1] * case.upstream[1]).sum() if case.op == "logprob" else output[0]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("module", [custom_op, logprob], ids=["fused_loss", "logprob"])
def test_torch_checks_the_operators_of_a_backward_pass(make_case, module, impl, monkeypatch):
    """Schema, aliasing and fake implementation of what backward calls, on the arguments of a real call."""
    name = "scaled_op" if module is custom_op else "_linear_logprob_backward"
    operator, calls = getattr(module, name), []
    monkeypatch.setattr(module, name, lambda *args: calls.append(args) or operator(*args))
    case = make_case("sgpo" if module is custom_op else "logprob")
    scalar(case, grown(case), impl=impl).backward()
    assert len(calls) == (len(case.leaves) if module is custom_op else 1)
    for args in calls:
        plain = [value.detach() if isinstance(value, Tensor) else value for value in args]
        torch.library.opcheck(operator, plain, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op", ["policy_on", "js", "sgpo"])
@pytest.mark.parametrize("options", [{}, {"column_tolerance": 0.02, "logit_softcap": 3.0}], ids=["exact", "live"])
def test_torch_checks_the_loss_operator_with_absent_arguments(make_case, op, options, impl, monkeypatch):
    """Absent groups, bias and old log-probs, frozen inputs: each of them changes the shapes that the fake returns."""
    operator, calls = custom_op.fused_loss_op, []
    monkeypatch.setattr(custom_op, "fused_loss_op", lambda *args: calls.append(args) or operator(*args))
    case = make_case(op, bias=op == "sgpo", **options)
    for frozen in ((), ("head",), tuple(name for name in case.leaves if "hidden" in name)):
        case.frozen = set(frozen)
        case.call(sgpo_kernels, impl=impl)
    case.frozen = {"head"}
    assert len(calls) == 3
    for args in calls:
        torch.library.opcheck(operator, args)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op", ["logprob", "sgpo"])
def test_inductor_gives_the_same_gradients(make_case, op, impl):
    case = make_case(op, temperature="rows")

    def run(leaves):
        warmer = {name: torch.tanh(leaf) * 2.0 for name, leaf in leaves.items()}
        return scalar(case, warmer, impl=impl) * 3.0

    torch._dynamo.reset()
    eager, ours = grown(case), grown(case)
    run(eager).backward()
    compiled = torch.compile(run, fullgraph=True, backend="inductor")
    compiled(ours).backward()
    for name, leaf in ours.items():
        torch.testing.assert_close(leaf.grad, eager[name].grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_new_rows_of_the_same_shape_do_not_recompile(make_case, impl):
    """Weights, advantages, targets and how many rows are dead change from step to step."""
    cases = [make_case("sgpo", seed=seed, dead=0.1 + 0.2 * seed) for seed in range(4)]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def run(leaves, fixed):
        return sgpo_kernels.sgpo_loss(**leaves, **fixed, impl=impl)[0]

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for case in cases:
        first, second = grown(case), grown(case)
        compiled(first, case.fixed).backward()
        run(second, case.fixed).backward()
        assert all(torch.equal(leaf.grad, second[name].grad) for name, leaf in first.items())
    assert counter.frame_count == 1


@pytest.mark.parametrize("impl", IMPLS)
def test_a_gradient_buffer_is_refused_inside_a_graph(make_case, impl):
    case = make_case("policy")
    buffer = torch.zeros_like(case.leaves["head"])

    def run(leaves):
        return scalar(case, leaves, head_grad=buffer, impl=impl)

    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match="head_grad is not available"):
        torch.compile(run, fullgraph=True, backend="eager")(grown(case))
    assert not buffer.any()
    # Where graphs may break, the call itself runs outside of them.
    torch._dynamo.reset()
    torch.compile(run, backend="eager")(grown(case)).backward()
    expected = grown(case)
    scalar(case, expected, impl=impl).backward()
    assert torch.equal(buffer, expected["head"].grad)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op", LOSSES)
def test_a_kept_graph_adds_to_the_buffer_each_time(make_case, op, impl):
    case = make_case(op)
    expected = grown(case)
    scalar(case, expected, impl=impl).backward()
    buffer, leaves = torch.zeros_like(case.leaves["head"]), grown(case)
    loss = scalar(case, leaves, impl=impl, head_grad=buffer)
    assert not buffer.any()
    (2 * loss).backward(retain_graph=True)
    assert torch.equal(buffer, 2 * expected["head"].grad)
    (-0.5 * loss).backward()
    torch.testing.assert_close(buffer, 1.5 * expected["head"].grad, rtol=1e-6, atol=1e-9)
    assert leaves["head"].grad is None
    for name in leaves.keys() - {"head"}:
        torch.testing.assert_close(leaves[name].grad, 1.5 * expected[name].grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("op", LOSSES)
def test_a_checkpointed_call_adds_to_the_buffer_once(make_case, op, reentrant, impl):
    """With live columns, under autocast: neither changes a bit."""
    case = make_case(op, column_tolerance=0.02)
    buffers = [torch.zeros_like(case.leaves["head"]) for _ in range(2)]
    plain, ours = grown(case), grown(case)
    scalar(case, plain, impl=impl, head_grad=buffers[0]).backward()
    names = list(ours)

    def inner(*values):
        return scalar(case, dict(zip(names, values, strict=True)), impl=impl, head_grad=buffers[1])

    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = checkpoint(inner, *ours.values(), use_reentrant=reentrant)
    loss.backward()
    assert buffers[0].any()
    assert torch.equal(*buffers)
    assert all(torch.equal(ours[name].grad, plain[name].grad) for name in names if name != "head")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("temperature", [1.0, "rows"])
@pytest.mark.parametrize("op", ["logprob", "policy", "policy_dual", "forward_kl", "reverse_kl", "js", "sgpo"])
def test_gradcheck_through_the_softcap(make_case, op, temperature, impl):
    case = make_case(op, torch.float64, (5, 3, 6), logit_softcap=1.5, temperature=temperature, seed=3)
    if impl == "triton":
        pytest.skip("Triton does not take float64")
    fixed = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in case.fixed.items()}
    # Finite differences would see the teacher through a shared head.
    names = [name for name in case.leaves if op != "sgpo" or "hidden" in name]
    fixed |= {name: leaf for name, leaf in case.leaves.items() if name not in names}
    if op in checks.KINDS:
        fixed |= {"teacher_head": case.leaves["head"].clone(), "teacher_bias": case.leaves["bias"].clone()}

    def run(*values):
        output = case.function(sgpo_kernels)(**dict(zip(names, values, strict=True)), **fixed, impl=impl)
        return output if op == "logprob" else output[0]

    assert torch.autograd.gradcheck(run, [case.leaves[name].clone().requires_grad_() for name in names], atol=1e-6)
