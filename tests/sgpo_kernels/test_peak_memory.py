"""No [tokens, vocab] tensor, and the peak stays under the formula of the docstrings."""

from __future__ import annotations

import pytest
import sgpo_kernels
import torch
from sgpo_kernels import reference, sizes, testing

FORMULA = {"logprob": "logprob", "policy": "policy", "policy_on": "policy", "policy_dual": "policy", "sgpo": "sgpo"}


def peak(case, **extra) -> testing.Peak:
    def run() -> None:
        _, output = case.call(sgpo_kernels, **extra)
        (output[0].sum() + (output[1].sum() if case.op == "logprob" else 0)).backward()

    return testing.cpu_peak(run)


def inputs(case) -> int:
    """`Case.call` copies the leaves inside the measured region."""
    return sum(leaf.numel() * leaf.element_size() for leaf in case.leaves.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "chunk"), [((200, 16, 1501), 16), ((96, 64, 700), 96), ((300, 8, 301), 7), ((40, 96, 3000), 1)], ids=str
)
def test_peak_is_below_the_formula(make_case, op, shape, chunk, dtype):
    rows, width, vocab = shape
    case = make_case(op, dtype, shape, dead=0.0, bias=True)
    measured = peak(case, chunk_rows=chunk)
    groups = 2 if op == "sgpo" else 1
    formula = sizes.extra_bytes(FORMULA.get(op, "divergence"), groups * rows, width, vocab, dtype, "cpu", chunk=chunk)
    assert measured.peak_bytes <= formula + inputs(case)
    size = sizes.accumulate_dtype(dtype).itemsize
    # Rows of the products begin on 64-byte boundaries.
    padded = -(-vocab // 16) * 16
    largest = max(chunk * padded, vocab * width, rows * width) * size
    assert measured.largest_bytes is not None
    assert measured.largest_bytes <= largest


def test_peak_grows_with_the_rows_only_by_their_hidden_states(make_case, op):
    small, large = (peak(make_case(op, shape=(n, 8, 2000), dead=0.0), chunk_rows=16).peak_bytes for n in (64, 512))
    per_row = (large - small) / (512 - 64)
    assert per_row < 2000 * 4 / 4
    with_logits = 512 * 2000 * 4
    assert large < with_logits


def test_the_tracker_sees_inside_our_operators(make_case, op):
    """All rows as one chunk are [N, V], and a chunk is never less than its products."""
    case = make_case(op, shape=(200, 8, 1504), dead=0.0)
    whole, chunked = (peak(case, chunk_rows=rows) for rows in (200, 16))
    assert whole.largest_bytes == 200 * 1504 * 4
    assert chunked.largest_bytes == 16 * 1504 * 4
    assert whole.peak_bytes - chunked.peak_bytes >= 184 * 1504 * 4


@pytest.mark.parametrize("op", ["policy", "forward_kl"])
def test_the_tracker_does_see_the_logits_of_plain_torch(make_case, op):
    case = make_case(op, shape=(200, 8, 1000), dead=0.0)
    measured = testing.cpu_peak(lambda: case.results(reference))
    assert measured.peak_bytes > 2 * 200 * 1000 * 4
    assert measured.largest_bytes == 200 * 1000 * 4


@pytest.mark.parametrize("op", ["policy", "js", "sgpo"])
def test_a_frozen_head_costs_no_accumulator(make_case, op):
    case = make_case(op, shape=(32, 64, 4000), dead=0.0, bias=False)
    full = peak(case, chunk_rows=2).peak_bytes
    case.frozen = {"head"}
    assert full - peak(case, chunk_rows=2).peak_bytes >= 4000 * 64 * 4


@pytest.mark.parametrize("op", ["policy", "js", "sgpo"])
def test_dead_rows_cost_no_chunk(make_case, op):
    case = make_case(op, shape=(64, 8, 4000), dead=2.0)
    measured = peak(case, chunk_rows=64)
    assert measured.largest_bytes is not None
    assert measured.largest_bytes <= 4000 * 8 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["logprob", "policy", "divergence"])
@pytest.mark.parametrize("rows", [1500, 2500], ids=["one chunk", "two chunks"])
def test_the_estimate_is_the_measured_peak_of_a_forward_pass(kind, dtype, rows):
    width, vocab = 192, 8192
    hidden, teacher, head = (torch.zeros(n, width, dtype=dtype) for n in (rows, rows, vocab))
    ones, targets = torch.ones(rows), torch.zeros(rows, dtype=torch.int64)
    for leaf in (hidden, head):
        leaf.requires_grad_(kind != "logprob")

    def run() -> object:
        if kind == "logprob":
            return sgpo_kernels.linear_logprob(hidden, head, targets)
        if kind == "divergence":
            return sgpo_kernels.linear_divergence(hidden, teacher, head, token_weight=ones, max_token_kl=1.0)
        return sgpo_kernels.linear_policy_loss(
            hidden, head, targets, advantages=ones, token_weight=ones, clip_low=0.2, clip_high=0.28
        )

    measured = testing.cpu_peak(run).peak_bytes
    estimate = sizes.peak_bytes(kind, rows, width, vocab, dtype, "cpu", head_grad=kind != "logprob")
    assert estimate == pytest.approx(measured, rel=0.08)
    assert measured <= sizes.extra_bytes(kind, rows, width, vocab, dtype, "cpu")
