"""Where an op must be right or refuse: float16 sums, ratios, ids that nobody holds, default devices, derivatives."""

from __future__ import annotations

import pytest
import sgpo_kernels
import torch
import torch.distributed as dist
from sgpo_kernels import checks, testing
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

LOSSES = ("policy", "policy_on", "policy_dual", "forward_kl", "reverse_kl", "js", "sgpo")


def grown(case) -> dict[str, Tensor]:
    return {name: leaf.clone().requires_grad_() for name, leaf in case.leaves.items()}


def scalar(case, leaves: dict[str, Tensor], **extra) -> Tensor:
    output = case.function(sgpo_kernels)(**leaves, **{**case.fixed, **extra})
    return output[0].sum() if case.op == "logprob" else output[0]


# float16


def equal_rows(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hidden 1000, head 0, bias 0, targets 0): every row has the same dz, so that sums grow with the rows."""
    hidden, head, bias = torch.full((rows, 8), 1000.0), torch.zeros(16, 8), torch.zeros(16)
    leaves = (x.to(dtype).requires_grad_() for x in (hidden, head, bias))
    return (*leaves, torch.zeros(rows, dtype=torch.int64))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("op", ["policy", "logprob"])
def test_a_sum_over_many_rows_fits_into_float16(op, impl, compiled):
    """A mean over the rows: dW = -1000 * 15 / 16 whatever their number, 128 times that before the scale is back."""
    rows = 256
    hidden, head, bias, targets = equal_rows(rows, torch.float16)
    one = torch.ones(rows)

    def run(hidden, head, bias):
        if op == "logprob":
            return -sgpo_kernels.linear_logprob(hidden, head, targets, bias=bias, impl=impl)[0].mean()
        options = {"token_weight": one / rows, "clip_low": None, "clip_high": None, "bias": bias, "impl": impl}
        return sgpo_kernels.linear_policy_loss(hidden, head, targets, advantages=one, **options)[0]

    torch._dynamo.reset()
    run = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
    run(hidden, head, bias).backward()
    assert head.grad is not None
    assert bias.grad is not None
    assert head.grad.dtype == bias.grad.dtype == torch.float16
    torch.testing.assert_close(head.grad[0], torch.full((8,), -937.5).half(), rtol=2e-3, atol=0)
    torch.testing.assert_close(bias.grad[0], torch.tensor(-0.9375).half(), rtol=2e-3, atol=0)


def test_a_float16_bias_beside_a_bfloat16_head():
    """Ones that float16 cannot sum: 160,000 rows of weight 1 under an upstream gradient of 5e-5."""
    rows = 160_000
    hidden, head, _, targets = equal_rows(rows, torch.bfloat16)
    bias = torch.zeros(16).half().requires_grad_()
    (-sgpo_kernels.linear_logprob(hidden, head, targets, bias=bias)[0].sum() * 5e-5).backward()
    assert bias.grad is not None
    torch.testing.assert_close(bias.grad[0], torch.tensor(-7.5).half(), rtol=2e-3, atol=0)
    bias.grad, one = None, torch.ones(rows)
    loss, _ = sgpo_kernels.linear_policy_loss(
        hidden, head, targets, advantages=one, token_weight=one, clip_low=None, clip_high=None, bias=bias
    )
    (loss * 5e-5).backward()
    torch.testing.assert_close(bias.grad[0], torch.tensor(-7.5).half(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("tolerance", [0.0, 0.01])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_ratio_beyond_float16_is_refused(make_case, impl, tolerance):
    case = make_case("policy", torch.float16, dead=0.0)
    case.fixed |= {"advantages": -torch.ones(24), "token_weight": torch.full((24,), 1e-4), "dual_clip": None}
    case.fixed["old_logprobs"] = torch.full((24,), -20.0)
    with pytest.raises(ValueError, match=r"float16 row gradient: expected .* set dual_clip"):
        case.results(impl=impl, column_tolerance=tolerance)
    with torch.no_grad():
        assert bool(case.call(sgpo_kernels, impl=impl)[1][0].isfinite())
    bounded = case.results(impl=impl, column_tolerance=tolerance, dual_clip=3.0)
    assert all(value.isfinite().all() for value in bounded.values())


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_hidden_gradient_beyond_float16_is_refused(make_case, impl):
    """dz fits, its product with the head does not."""
    case = make_case("policy", torch.float16, dead=0.0)
    case.leaves["head"] *= 40
    case.fixed |= {"advantages": -torch.ones(24), "token_weight": torch.ones(24), "dual_clip": None}
    logprobs = case.results(old_logprobs=None)["logprobs"]
    case.fixed["old_logprobs"] = logprobs - 10.3
    with pytest.raises(ValueError, match="float16 row gradient"):
        case.results(impl=impl)


# ids


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path_factory.mktemp('gloo') / 'store'}", rank=0, world_size=1
    )
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("value", [37, -1, -100])
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("op", ["logprob", "policy", "policy_on", "sgpo"])
def test_an_id_that_no_rank_holds_is_refused(make_case, group, op, impl, value):
    case, name = make_case(op, dead=0.0), "policy_targets" if op == "sgpo" else "targets"
    case.fixed[name][5] = value
    with pytest.raises(ValueError, match=rf"^{name}: expected token ids that lie on some rank's piece"):
        case.call(sgpo_kernels, vocab_group=group, impl=impl)


@pytest.mark.parametrize("value", [37, -1])
@pytest.mark.parametrize("sharded", [False, True])
def test_on_cuda_a_device_side_assertion_watches_the_ids(monkeypatch, value, sharded):
    """Its condition, on tensors that only say they are on CUDA."""

    class Cuda(Tensor):
        is_cuda = property(lambda self: True)  # type: ignore[assignment]

    targets = torch.tensor([0, 36, value])
    if sharded:
        logits = torch.where(targets == value, -torch.inf, 0.0).as_subclass(Cuda)
        with pytest.raises(RuntimeError, match="token ids that lie on some rank's piece"):
            checks.check_found_labels(logits)
        checks.check_found_labels(logits[:2])
        checks.check_found_labels(logits[:0])
    else:
        ids = targets.as_subclass(Cuda)
        with pytest.raises(RuntimeError, match=r"token ids in \[0, 37\)"):
            checks.check_live_labels(ids, 37)
        checks.check_live_labels(ids[:2], 37)
        checks.check_live_labels(ids[:0], 37)


# default devices


def test_the_default_device_changes_nothing(make_case, op):
    case = make_case(op)
    expected = case.results()
    with torch.device("meta"):
        ours = {name: value for name, value in case.results().items()}
    assert all(torch.equal(value, expected[name]) for name, value in ours.items())


# derivatives


def dual(run, leaf: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return run(forward_ad.make_dual(leaf, torch.ones_like(leaf)))


@pytest.mark.parametrize(
    "compute",
    [
        lambda run, leaf: torch.func.jvp(run, (leaf,), (torch.ones_like(leaf),)),
        lambda run, leaf: torch.func.jacfwd(run)(leaf),
        dual,
    ],
    ids=["jvp", "jacfwd", "dual"],
)
def test_forward_mode_is_refused(make_case, op, compute):
    case = make_case(op)
    for name, leaf in case.leaves.items():

        def run(value, name=name):
            return scalar(case, {**case.leaves, name: value})

        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            compute(run, leaf)
    with forward_ad.dual_level():
        assert bool(scalar(case, case.leaves).isfinite())


@pytest.mark.parametrize(
    "compute",
    [
        lambda run, leaf: torch.func.grad(run)(leaf),
        lambda run, leaf: torch.func.vjp(run, leaf),
        lambda run, leaf: torch.func.jacrev(run)(leaf),
        lambda run, leaf: torch.func.hessian(run)(leaf),
        lambda run, leaf: torch.vmap(torch.func.grad(run))(leaf[None]),
    ],
    ids=["grad", "vjp", "jacrev", "hessian", "per_sample"],
)
def test_torch_func_is_refused_in_our_own_words(make_case, op, compute):
    case = make_case(op)
    name = next(iter(case.leaves))

    def run(value):
        return scalar(case, {**case.leaves, name: value})

    with pytest.raises(NotImplementedError, match="do not run inside torch"):
        compute(run, case.leaves[name])
    assert bool(scalar(case, case.leaves).isfinite())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_gradient_penalty_is_refused(make_case, op, checkpointed):
    """The upstream gradient is a constant 1: nothing but the saved gradients could carry the second derivative."""
    case = make_case(op)
    leaves = grown(case)
    names = list(leaves)

    def run(*values):
        return scalar(case, dict(zip(names, values, strict=True)))

    value = checkpoint(run, *leaves.values(), use_reentrant=False) if checkpointed else run(*leaves.values())
    grads = torch.autograd.grad(value, list(leaves.values()), create_graph=True)
    plain = grown(case)
    scalar(case, plain).backward()
    assert all(torch.equal(grad.detach(), plain[name].grad) for grad, name in zip(grads, names, strict=True))
    for grad in grads:
        with pytest.raises(RuntimeError, match="first derivatives only"):
            (value + grad.square().sum()).backward(retain_graph=True)


def test_create_graph_leaves_a_gradient_buffer_plain(make_case):
    case = make_case("policy")
    buffers = [torch.zeros_like(case.leaves["head"]) for _ in range(2)]
    for buffer, create_graph in zip(buffers, (False, True), strict=True):
        leaves = grown(case)
        scalar(case, leaves, head_grad=buffer).backward(create_graph=create_graph, inputs=[leaves["hidden"]])
    assert torch.equal(*buffers)
    assert not buffers[1].requires_grad


# buffers and names


@pytest.mark.parametrize("op", LOSSES)
def test_a_buffer_in_the_memory_of_the_head_is_refused(make_case, op):
    case = make_case(op)
    whole = torch.zeros(3 * 37, 8)
    leaves = grown(case)
    leaves["head"] = whole[20:57].requires_grad_()
    for buffer in (leaves["head"].detach(), whole[:37], whole[56:93]):
        with pytest.raises(ValueError, match="head_grad: expected memory of its own, got memory of the head"):
            scalar(case, leaves, head_grad=buffer.detach())
    scalar(case, leaves, head_grad=whole[57:94].detach()).backward()


def test_head_grad_holds_what_the_dtype_of_the_head_cannot(make_case):
    """bfloat16: the buffer rounds to the ordinary gradient, and is not that gradient."""
    for op in LOSSES:
        case = make_case(op, torch.bfloat16)
        buffer, ours, plain = torch.zeros(37, 8), grown(case), grown(case)
        scalar(case, ours, head_grad=buffer).backward()
        scalar(case, plain).backward()
        assert plain["head"].grad is not None
        assert torch.equal(buffer.bfloat16(), plain["head"].grad), op
        assert float((buffer != buffer.bfloat16().float()).float().mean()) > 0.5, op


@pytest.mark.parametrize("name", ["policy_weight", "distill_weight", "policy_targets"])
def test_errors_name_the_arguments_of_sgpo_loss(make_case, name):
    case = make_case("sgpo", dead=0.0)
    wrong = [case.fixed[name][:5], case.fixed[name].bfloat16()]
    if name == "policy_targets":
        wrong += [torch.full((24,), 37)]
    for value in wrong:
        with pytest.raises((ValueError, TypeError), match=rf"^{name}"):
            case.call(sgpo_kernels, **{name: value})


def test_memory_of_a_float16_head_stays_under_the_formula(make_case):
    from sgpo_kernels import sizes

    case = make_case("policy", torch.float16, (64, 64, 3008), dead=0.0)

    def run() -> None:
        _, output = case.call(sgpo_kernels, chunk_rows=4)
        output[0].backward()

    measured = testing.cpu_peak(run).peak_bytes
    inputs = sum(leaf.numel() * leaf.element_size() for leaf in case.leaves.values())
    assert measured <= inputs + sizes.extra_bytes("policy", 64, 64, 3008, torch.float16, "cpu", chunk=4)
