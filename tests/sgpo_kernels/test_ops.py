"""The rules that hold for every op: accuracy, dead rows, empty inputs, frozen inputs, bitwise repeat, chunk size."""

from __future__ import annotations

import pytest
import sgpo_kernels
import torch
from sgpo_kernels import chunk_loop, reference, sizes, testing
from sgpo_kernels import head as head_module
from torch import Tensor

OPS = ("logprob", "policy", "policy_on", "policy_dual", "forward_kl", "reverse_kl", "js", "sgpo")
LOSS_UPSTREAM = -1.7  # as in conftest
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 3, 5), (7, 16, 33), (40, 24, 257))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("bias", "temperature"), [(False, 1.0), (True, 0.7), (True, "rows")])
def test_values_statistics_and_gradients(make_case, op, shape, dtype, bias, temperature):
    case = make_case(op, dtype, shape, bias=bias, temperature=temperature)
    ours = case.check(chunk_rows=3)
    assert {ours[name].dtype for name in ours if name.startswith("grad.")} == {dtype}


@pytest.mark.parametrize("seed", range(6))
def test_values_and_gradients_for_other_draws(make_case, op, seed):
    case = make_case(op, torch.float32, (30, 12, 101), seed=seed + 1, temperature=1.3)
    case.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("logit_scale", [1e-3, 10.0])
def test_flat_and_confident_rows(make_case, op, dtype, logit_scale):
    case = make_case(op, dtype, logit_scale=logit_scale, bias=False)
    case.check()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_logits_of_a_thousand_stay_finite_and_right(make_case, op, dtype, sign):
    """The first hidden unit drives the logits to +-1000; the teacher's to the opposite sign."""
    case = make_case(op, dtype, (12, 4, 19), bias=False)
    size = sign * 1000 / float(case.leaves["head"][:, 0].abs().max())
    for name in ("hidden", "policy_hidden", "distill_hidden"):
        if name in case.leaves:
            case.leaves[name][:, 0] = size
    if "teacher_hidden" in case.fixed:
        case.fixed["teacher_hidden"][:, 0] = -size
    for name in {"old_logprobs", "max_token_kl"} & set(case.fixed):
        case.fixed[name] = None
    case.check()


def test_gradient_scales_with_the_upstream_gradient(make_case, op):
    case = make_case(op, torch.float64)
    once = case.results()
    case.upstream = case.upstream * 4
    leaves, output = case.call(sgpo_kernels)
    if op == "logprob":
        scalar = (output[0] * case.upstream[0] + output[1] * case.upstream[1]).sum()
    else:
        scalar = output[0] * (4 * LOSS_UPSTREAM)
    scalar.backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, 4 * once[f"grad.{name}"], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("op", OPS[1:])
def test_dead_rows_are_never_read_and_get_exact_zeros(make_case, op):
    case = make_case(op)
    clean = case.results()
    dead = {"distill_hidden": case.weights()[-1] == 0}
    dead["hidden"] = dead["policy_hidden"] = case.weights()[0] == 0
    for name, rows in dead.items():
        if name in case.leaves:
            assert rows.any()
            assert not rows.all()
            case.leaves[name][rows] = torch.nan
    if "teacher_hidden" in case.fixed:
        case.fixed["teacher_hidden"][dead["distill_hidden"]] = torch.nan
    for name in ("targets", "policy_targets"):
        if name in case.fixed:
            case.fixed[name][dead["hidden"]] = -100
    ours = case.results()
    for name, value in ours.items():
        assert torch.equal(value, clean[name]), name
    for name, rows in dead.items():
        if name in case.leaves:
            assert not ours[f"grad.{name}"][rows].any()
    for name, value in ours.items():
        if value.shape == dead["hidden"].shape:
            assert not value[dead["distill_hidden" if "divergence." in name else "hidden"]].any(), name


@pytest.mark.parametrize("op", ["policy", "policy_on", "policy_dual", "sgpo"])
def test_rows_of_advantage_zero_are_dropped(make_case, op):
    case = make_case(op, dead=0.0)
    name = "policy_hidden" if op == "sgpo" else "hidden"
    case.fixed["advantages"][::2] = 0
    case.leaves[name][::2] = torch.inf
    ours = case.results()
    live = ours["policy.live" if op == "sgpo" else "live"]
    assert not live[::2].any()
    assert live[1::2].all()
    assert not ours[f"grad.{name}"][::2].any()
    assert all(torch.isfinite(value).all() for value in ours.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS[1:])
def test_all_weights_zero(make_case, op, dtype):
    case = make_case(op, dtype, dead=2.0)
    ours = case.results()
    assert sum(name.startswith("grad.") for name in ours) == len(case.leaves)
    assert not any(value.any() for value in ours.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows_at_all(make_case, op, dtype):
    case = make_case(op, dtype, (0, 6, 11))
    ours = case.results()
    for name, leaf in case.leaves.items():
        assert ours[f"grad.{name}"].shape == leaf.shape
        assert not ours[f"grad.{name}"].any()
    assert ours["logprobs" if op == "logprob" else "loss"].sum() == 0


@pytest.mark.parametrize("vocab", [1, 2, 3, 63, 64, 65])
def test_ragged_vocabulary(make_case, op, vocab):
    case = make_case(op, torch.float32, (9, 5, vocab))
    case.check()


@pytest.mark.parametrize("frozen", ["head", "bias", "hidden", "all"])
def test_frozen_inputs_get_no_gradient_and_change_nothing_else(make_case, op, frozen):
    case = make_case(op)
    full = case.results()
    matches = {"all": ("",), "hidden": ("hidden",)}.get(frozen, (frozen,))
    case.frozen = {name for name in case.leaves if any(match in name for match in matches)}
    ours = case.results()
    assert {name[5:] for name in ours if name.startswith("grad.")} == set(case.leaves) - case.frozen
    assert all(torch.equal(value, full[name]) for name, value in ours.items())


def test_no_grad_gives_the_same_values(make_case, op):
    case = make_case(op)
    full = case.results()
    with torch.no_grad():
        ours = case.results()
    assert not any(name.startswith("grad.") for name in ours)
    assert all(torch.equal(value, full[name]) for name, value in ours.items())


def test_only_the_loss_carries_a_gradient(make_case, op):
    _, output = make_case(op).call(sgpo_kernels)
    if op == "logprob":
        assert all(value.requires_grad for value in output)
    else:
        assert output[0].requires_grad
        stats = [x for part in output[1] for x in (part if isinstance(part, tuple) else (part,))]
        assert not any(value.requires_grad for value in stats)


def test_a_head_tied_to_the_embedding_gets_both_gradients(make_case, op):
    case = make_case(op, torch.float64, bias=False)
    hidden_name = "policy_hidden" if op == "sgpo" else "hidden"
    tokens = torch.randint(case.leaves["head"].shape[0], (case.leaves[hidden_name].shape[0],))

    def gradient(module) -> Tensor:
        weight = case.leaves["head"].clone().requires_grad_()
        leaves = {**case.leaves, "head": weight, hidden_name: torch.tanh(weight[tokens])}
        fixed = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in case.fixed.items()}
        output = case.function(module)(**leaves, **fixed)
        (output[0].sum() if op == "logprob" else output[0]).backward()
        assert weight.grad is not None
        return weight.grad

    torch.testing.assert_close(gradient(sgpo_kernels), gradient(reference), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_call_gives_the_same_bits_and_leaves_inputs_alone(make_case, op, dtype):
    case, twin = make_case(op, dtype, (33, 16, 129)), make_case(op, dtype, (33, 16, 129))
    first, second = case.results(chunk_rows=8), case.results(chunk_rows=8)
    assert all(torch.equal(first[name], second[name]) for name in first)
    leaves, output = case.call(sgpo_kernels)
    (output[0].sum() + (output[1].sum() if op == "logprob" else 0)).backward()
    for name, leaf in leaves.items():
        assert torch.equal(leaf, twin.leaves[name])
    for name, value in case.fixed.items():
        assert torch.equal(value, twin.fixed[name]) if isinstance(value, Tensor) else value == twin.fixed[name]


@pytest.mark.parametrize("chunk_rows", [1, 2, 5, 23, 24, 1000, None])
def test_chunk_size_does_not_matter(make_case, op, chunk_rows):
    case = make_case(op, torch.float64)
    ours, whole = case.results(chunk_rows=chunk_rows), case.results(chunk_rows=24)
    for name, value in ours.items():
        torch.testing.assert_close(value, whole[name], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(make_case, op, dtype):
    case = make_case(op, dtype)
    plain = case.results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = case.results()
    for name in plain:
        assert ours[name].dtype == plain[name].dtype
        assert torch.equal(ours[name], plain[name]), name


def test_uninitialised_memory_is_never_used(make_case, op):
    case = make_case(op)
    plain = case.results(chunk_rows=5)
    with testing.poisoned_empty():
        poisoned = case.results(chunk_rows=5)
    assert all(torch.equal(plain[name], poisoned[name]) for name in plain)


def test_inputs_may_have_any_strides(make_case, op):
    case = make_case(op)
    plain = case.results()
    for name, leaf in case.leaves.items():
        wide = torch.stack([leaf, leaf], dim=-1)
        case.leaves[name] = wide[..., 0]
        assert leaf.numel() == 1 or not case.leaves[name].is_contiguous()
    leaves = {name: leaf.requires_grad_() for name, leaf in case.leaves.items()}
    output = case.function(sgpo_kernels)(**leaves, **case.fixed)
    value = output[0].sum() if op == "logprob" else output[0]
    expected = plain["logprobs"].sum() if op == "logprob" else plain["loss"]
    torch.testing.assert_close(value, expected)
    value.backward()
    assert all(leaf.grad is not None and torch.isfinite(leaf.grad).all() for leaf in leaves.values())


def test_backward_works_when_the_head_was_released_in_between(make_case, op):
    """As ZeRO-3 does: the parameter's data is taken away after forward and gathered again before backward."""
    case = make_case(op)
    expected = case.results()
    leaves, output = case.call(sgpo_kernels)
    whole = leaves["head"].data
    leaves["head"].data = torch.empty(0)
    leaves["head"].data = whole
    if op == "logprob":
        (output[0] * case.upstream[0] + output[1] * case.upstream[1]).sum().backward()
    else:
        (output[0] * LOSS_UPSTREAM).backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, expected[f"grad.{name}"], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("op", OPS[1:])
def test_backward_twice_accumulates(make_case, op):
    leaves, output = make_case(op).call(sgpo_kernels)
    output[0].backward(retain_graph=True)
    once = {name: leaf.grad.clone() for name, leaf in leaves.items()}
    output[0].backward()
    assert all(torch.equal(leaf.grad, 2 * once[name]) for name, leaf in leaves.items())


@pytest.mark.parametrize("op", OPS[1:])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_tiny_weights_survive_the_half_dtypes(make_case, op, dtype):
    """Weights of 1e-7 and a loss scale of 2^20: in float16 dz itself would have vanished."""
    case = make_case(op, dtype, (16, 8, 21), bias=False)
    for name in ("token_weight", "policy_weight", "distill_weight"):
        if name in case.fixed:
            case.fixed[name] *= 1e-7

    def gradients(module, kind) -> dict[str, Tensor]:
        leaves, output = case.call(module, kind)
        (output[0] * 2.0**20).backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    ours, truth = gradients(sgpo_kernels, None), gradients(reference, torch.float64)
    for name, value in ours.items():
        testing.assert_close_to_reference(value, truth[name], truth[name], name=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_widening_path_of_accelerators(make_case, op, dtype, monkeypatch):
    """On CUDA the operands stay half and dW is summed in blocks; an upcast plays the widening product here."""

    def keep_half(head: Tensor, bias: Tensor | None) -> head_module.Head:
        return head_module.Head(head.detach(), None if bias is None else bias.float())

    def widening(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.mm(left.float(), right.float(), out=out)

    monkeypatch.setattr(head_module.Head, "of", keep_half)
    monkeypatch.setattr(head_module, "mm", widening)
    monkeypatch.setattr(chunk_loop, "mm", widening)
    monkeypatch.setattr(sizes, "HEAD_BLOCK_BYTES", {"cpu": 1})
    assert sizes.head_block_rows(24, dtype, "cpu") == 128
    case = make_case(op, dtype, (40, 24, 300))
    for slab in (4096, 20, 7):
        monkeypatch.setattr(sizes, "SLAB_ROWS", slab)
        case.check(chunk_rows=7)
