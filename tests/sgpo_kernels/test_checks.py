"""Errors at the border: the type, the argument named, what was expected and what came."""

from __future__ import annotations

import logging

import pytest
import sgpo_kernels
import torch
from sgpo_kernels import sizes

WIDE = torch.zeros(24, 9)


def change(name, value):
    return lambda case: {**case.leaves, **case.fixed, name: value(case) if callable(value) else value}


def hidden_name(case):
    return "policy_hidden" if case.op == "sgpo" else "hidden"


ANY = [
    ("impl", "cuda", ValueError, "impl"),
    ("chunk_rows", 0, ValueError, "chunk_rows"),
    ("chunk_rows", -3, ValueError, "chunk_rows"),
    ("chunk_rows", 2.0, TypeError, "chunk_rows"),
    ("chunk_rows", True, TypeError, "chunk_rows"),
    ("temperature", 0.0, ValueError, "temperature"),
    ("temperature", -1.0, ValueError, "temperature"),
    ("temperature", float("inf"), ValueError, "temperature"),
    ("temperature", float("nan"), ValueError, "temperature"),
    ("temperature", "hot", TypeError, "temperature"),
    ("temperature", torch.ones(5), ValueError, "temperature"),
    ("temperature", lambda case: torch.ones(48 if case.op == "sgpo" else 24).long(), TypeError, "temperature"),
    ("temperature", lambda case: torch.zeros(48 if case.op == "sgpo" else 24), ValueError, "temperature"),
    (
        "temperature",
        lambda case: torch.ones(48 if case.op == "sgpo" else 24).requires_grad_(),
        ValueError,
        "temperature",
    ),
    ("head", lambda case: case.leaves["head"].double(), TypeError, "head"),
    ("head", lambda case: case.leaves["head"][:, :5], ValueError, "head"),
    ("head", lambda case: case.leaves["head"][:0], ValueError, "head"),
    ("head", lambda case: case.leaves["head"].to("meta"), ValueError, "head"),
    ("head", [1.0], TypeError, "head"),
    ("bias", torch.zeros(3), ValueError, "bias"),
    ("bias", torch.zeros(37, 1), ValueError, "bias"),
    ("bias", torch.zeros(37).long(), TypeError, "bias"),
    ("bias", lambda case: case.leaves["bias"].to("meta"), ValueError, "bias"),
]


@pytest.mark.parametrize(("name", "value", "kind", "word"), ANY)
def test_arguments_of_every_op(make_case, op, name, value, kind, word):
    case = make_case(op)
    with pytest.raises(kind, match=word):
        case.function(sgpo_kernels)(**change(name, value)(case))


def test_triton_is_refused_where_it_cannot_run(make_case, op, monkeypatch):
    with pytest.raises(NotImplementedError, match='impl="triton" does not take float64: use impl="auto"'):
        make_case(op, torch.float64).call(sgpo_kernels, impl="triton")
    monkeypatch.setattr(sizes, "interpreting", lambda: False)
    with pytest.raises(NotImplementedError, match='impl="triton" needs tensors on CUDA, not on cpu'):
        make_case(op).call(sgpo_kernels, impl="triton")
    monkeypatch.setattr(sizes.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotImplementedError, match="which is not installed"):
        make_case(op).call(sgpo_kernels, impl="triton")


@pytest.mark.parametrize("value", [torch.zeros(24), torch.zeros(2, 12, 8), WIDE, torch.zeros(24, 8).long(), None])
def test_hidden_states(make_case, op, value):
    case = make_case(op)
    with pytest.raises((ValueError, TypeError), match=r"hidden|head"):
        case.function(sgpo_kernels)(**change(hidden_name(case), value)(case))


@pytest.mark.parametrize("op", ["logprob", "policy", "sgpo"])
@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (torch.zeros(24), TypeError),
        (torch.zeros(24, dtype=torch.int32), TypeError),
        (torch.zeros(23, dtype=torch.int64), ValueError),
        (torch.zeros(24, 1, dtype=torch.int64), ValueError),
        (torch.full((24,), -100), ValueError),
        (torch.full((24,), 37), ValueError),
        (torch.zeros(24, dtype=torch.int64, device="meta"), ValueError),
    ],
)
def test_targets(make_case, op, value, kind):
    case = make_case(op, dead=0.0)
    with pytest.raises(kind, match="targets"):
        case.function(sgpo_kernels)(**change("policy_targets" if op == "sgpo" else "targets", value)(case))


ROW_VALUES = [
    (op, name)
    for op, names in {
        "policy": ("token_weight", "advantages", "old_logprobs"),
        "js": ("token_weight",),
        "sgpo": ("policy_weight", "distill_weight", "advantages", "old_logprobs"),
    }.items()
    for name in names
]


@pytest.mark.parametrize(("op", "name"), ROW_VALUES)
@pytest.mark.parametrize(
    ("value", "kind", "word"),
    [
        (torch.ones(24).bfloat16(), TypeError, "float32"),
        (torch.ones(24).double(), TypeError, "float32"),
        (torch.ones(24).bool(), TypeError, "float32"),
        (torch.ones(23), ValueError, "24"),
        (torch.ones(24, 1), ValueError, "24"),
        (torch.ones(24, requires_grad=True), ValueError, "detach"),
        (torch.ones(24, device="meta"), ValueError, "device"),
        (1.0, TypeError, "Tensor"),
    ],
)
def test_row_values(make_case, op, name, value, kind, word):
    case = make_case(op)
    with pytest.raises(kind, match=word):
        case.function(sgpo_kernels)(**change(name, value)(case))


@pytest.mark.parametrize("op", ["policy", "sgpo"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("clip_low", -0.1), ("clip_low", 1.5), ("clip_high", -0.1), ("clip_high", float("nan")), ("dual_clip", 1.0)],
)
def test_clip_ranges(make_case, op, name, value):
    case = make_case(op)
    with pytest.raises(ValueError, match=name):
        case.function(sgpo_kernels)(**change(name, value)(case))


@pytest.mark.parametrize("op", ["forward_kl", "reverse_kl", "js", "sgpo"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kind", "kl"),
        ("kind", None),
        ("over_limit", "drop"),
        ("max_token_kl", 0.0),
        ("max_token_kl", -1.0),
        ("max_token_kl", float("inf")),
    ],
)
def test_divergence_settings(make_case, op, name, value):
    case = make_case(op)
    with pytest.raises(ValueError, match=name):
        case.function(sgpo_kernels)(**change(name, value)(case))


@pytest.mark.parametrize(
    ("extra", "kind", "word"),
    [
        ({"teacher_hidden": torch.zeros(23, 8)}, ValueError, "teacher_hidden"),
        ({"teacher_hidden": WIDE}, ValueError, "teacher_hidden"),
        ({"teacher_hidden": torch.zeros(24, 8).double()}, TypeError, "teacher_hidden"),
        ({"teacher_head": torch.zeros(36, 8)}, ValueError, "teacher_head"),
        ({"teacher_head": torch.zeros(37, 9)}, ValueError, "teacher_head"),
        ({"teacher_head": torch.zeros(37, 8).double()}, TypeError, "teacher_head"),
        ({"teacher_bias": torch.zeros(36)}, ValueError, "teacher_bias"),
    ],
)
@pytest.mark.parametrize("op", ["forward_kl", "reverse_kl", "js"])
def test_teacher_side(make_case, op, extra, kind, word):
    case = make_case(op)
    with pytest.raises(kind, match=word):
        case.function(sgpo_kernels)(**{**case.leaves, **case.fixed, **extra})


def test_a_message_says_what_was_expected_what_came_and_what_to_do(make_case):
    case = make_case("policy")
    with pytest.raises(TypeError) as caught:
        case.function(sgpo_kernels)(**change("advantages", torch.ones(24).half())(case))
    message = str(caught.value)
    assert message == "advantages.dtype: expected float32, got torch.float16; keep per-row values in float32."


def test_second_derivatives_are_refused(make_case, op):
    leaves, output = make_case(op).call(sgpo_kernels)
    grads = torch.autograd.grad(output[0].sum() ** 2, list(leaves.values()), create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grads[0].sum().backward()


def test_auto_says_once_what_it_chose(make_case, caplog):
    sizes._announce_auto.cache_clear()
    case = make_case("policy")
    with caplog.at_level(logging.INFO, logger="sgpo_kernels"):
        case.results()
        case.results(impl="auto")
        case.results(impl="torch")
    assert [record.message for record in caplog.records] == ['impl="auto" chose "torch" for torch.float32 on cpu']


def test_the_package_exports_the_ops_and_nothing_else():
    ops = {"linear_logprob", "linear_policy_loss", "linear_divergence", "sgpo_loss"}
    assert set(sgpo_kernels.__all__) == ops | {"PolicyStats", "DivergenceStats", "SgpoStats"}
