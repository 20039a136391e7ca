"""Sizes as pure functions, row helpers, and the helpers of `testing` themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sgpo_kernels import launch, rowmath, testing

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@given(st.integers(0, 10**6), st.integers(1, 10**4), st.integers(1, 300_000), st.sampled_from(DTYPES))
def test_cpu_chunks_are_64_mib_at_most(rows, hidden, vocab, dtype):
    chunk = launch.chunk_rows(rows, hidden, vocab, dtype, "cpu")
    assert 1 <= chunk <= max(rows, 1)
    assert chunk == 1 or chunk * vocab * launch.accumulate_dtype(dtype).itemsize <= 64 << 20


def test_chunk_rows_of_the_7b_head():
    assert launch.chunk_rows(8192, 3584, 152064, torch.bfloat16, "cpu") == 110
    assert launch.chunk_rows(8192, 3584, 152064, torch.bfloat16, "cuda") == 1024
    assert launch.chunk_rows(100, 3584, 152064, torch.bfloat16, "cuda") == 100


@pytest.mark.parametrize("op", ["logprob", "policy", "divergence", "sgpo"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_memory_formula_does_not_hold_the_logits(op, device):
    few, many = (launch.extra_bytes(op, n, 3584, 152064, torch.bfloat16, device) for n in (8192, 16384))
    assert many - few == 8192 * (2 * 3584 * 2 + 32 * 4)
    without = launch.extra_bytes(op, 8192, 3584, 152064, torch.bfloat16, device, head_grad=False)
    assert few - without >= 152064 * 3584 * 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_blocks_cover_64_mib(dtype):
    size = launch.accumulate_dtype(dtype).itemsize
    assert launch.head_block_rows(3584, dtype) * 3584 * size <= 64 << 20
    assert launch.head_block_rows(10**9, dtype) == 128


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=5))
def test_scale_is_a_power_of_two_just_above_the_largest_value(values):
    tensor = torch.tensor(values)
    scale = rowmath.power_of_two_scale(tensor).item()
    largest = tensor.abs().max().item()
    assert torch.frexp(torch.tensor(scale)).mantissa.item() == 0.5
    if largest > 1e-30:
        assert largest <= scale <= 2 * largest
    else:
        assert scale == 1


@pytest.mark.parametrize("values", [[0.0], [float("inf")], [float("nan")]])
def test_scale_of_nothing_usable_is_one(values):
    assert rowmath.power_of_two_scale(torch.tensor(values)).item() == 1


def test_log_softmax_in_place_keeps_accuracy_for_large_logits():
    logits = torch.randn(8, 100, dtype=torch.float64) + 1000
    values = logits.float()
    truth = values.double().log_softmax(1)
    probs = rowmath.log_softmax_(values)
    assert (values - truth).abs().max() < 2e-6
    assert (probs - truth.exp()).abs().max() < 1e-6


def test_one_hot_minus_is_the_gradient_of_the_log_probability():
    logits = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    targets, slope = torch.randint(9, (6,)), torch.randn(6, dtype=torch.float64)
    (slope * logits.log_softmax(1).gather(1, targets.unsqueeze(1)).squeeze(1)).sum().backward()
    ours = rowmath.one_hot_minus_(logits.detach().softmax(1), targets, slope)
    torch.testing.assert_close(ours, logits.grad)


@pytest.mark.parametrize(("shift", "passes"), [(0.0, True), (1.5e-3, True), (2.5e-3, False), (torch.nan, False)])
def test_close_to_reference_allows_twice_the_framework_error(shift, passes):
    truth = torch.ones(4, dtype=torch.float64)
    same_dtype = (truth + 1e-3).float()
    ours = (truth + torch.tensor([0, 0, 0, shift])).float()
    if passes:
        testing.assert_close_to_reference(ours, same_dtype, truth)
    else:
        with pytest.raises(AssertionError, match=r"error|finite"):
            testing.assert_close_to_reference(ours, same_dtype, truth)


def test_close_to_reference_wants_one_shape():
    with pytest.raises(AssertionError, match="shape"):
        testing.assert_close_to_reference(torch.ones(4), torch.ones(4), torch.ones(4, 1))


def test_cpu_peak_counts_what_is_alive_together():
    def run() -> None:
        first = torch.zeros(1000)
        del first
        second, third = torch.zeros(500), torch.zeros(600)
        second.add_(1)
        third[:10].mul_(2)

    measured = testing.cpu_peak(run)
    assert measured.peak_bytes == 1100 * 4
    assert measured.largest_bytes == 4000


def test_cpu_peak_ignores_what_was_there_before():
    before = torch.zeros(10_000)
    assert testing.cpu_peak(lambda: before.add_(1).view(100, 100)).peak_bytes == 0


def test_poisoned_empty_fills_with_nan_and_restores():
    enabled = torch.are_deterministic_algorithms_enabled()
    with testing.poisoned_empty():
        assert torch.empty(5).isnan().all()
    assert torch.are_deterministic_algorithms_enabled() == enabled
