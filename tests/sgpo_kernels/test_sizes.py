"""Sizes as pure functions, row helpers, and the helpers of `testing` themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sgpo_kernels import backend, backend_torch, sizes, testing
from sgpo_kernels.inputs import ClipRange

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@given(st.integers(0, 10**6), st.integers(1, 10**4), st.integers(1, 300_000), st.sampled_from(DTYPES))
def test_cpu_chunks_are_64_mib_at_most(rows, hidden, vocab, dtype):
    chunk = sizes.chunk_rows(rows, hidden, vocab, dtype, "cpu")
    assert 1 <= chunk <= max(rows, 1)
    assert chunk == 1 or chunk * vocab * sizes.accumulate_dtype(dtype).itemsize <= 64 << 20


def test_chunk_rows_of_the_7b_head():
    assert sizes.chunk_rows(8192, 3584, 152064, torch.bfloat16, "cpu") == 110
    assert sizes.chunk_rows(8192, 3584, 152064, torch.bfloat16, "cuda") == 1024
    assert sizes.chunk_rows(100, 3584, 152064, torch.bfloat16, "cuda") == 100


@pytest.mark.parametrize("op", ["logprob", "policy", "divergence", "sgpo"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_memory_formula_does_not_hold_the_logits(op, device):
    few, many = (sizes.extra_bytes(op, n, 3584, 152064, torch.bfloat16, device) for n in (8192, 16384))
    assert many - few == 8192 * (2 * 3584 * 2 + 48 * 4)
    without = sizes.extra_bytes(op, 8192, 3584, 152064, torch.bfloat16, device, head_grad=False)
    assert few - without >= 152064 * 3584 * 6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("device", "limit"), [("cpu", 64 << 20), ("cuda", 64 << 20)])
def test_head_blocks_fit_the_cache_of_the_device(dtype, device, limit):
    size = sizes.accumulate_dtype(dtype).itemsize
    assert sizes.head_block_rows(3584, dtype, device) * 3584 * size <= limit
    assert sizes.head_block_rows(10**9, dtype, device) == 128
    assert all(sizes.head_block_rows(hidden, dtype, device) % 128 == 0 for hidden in (576, 1536, 3584, 4096))


def test_row_blocks_stay_in_the_cache_of_a_cpu():
    assert sizes.block_rows(32768, torch.float32, "cpu") == 8
    assert sizes.block_rows(10**9, torch.float32, "cpu") == 1
    assert sizes.block_rows(152064, torch.bfloat16, "cuda") == 110


def test_the_7b_shape_stays_under_its_memory_goal():
    """4.6 GiB beyond inputs, hidden gradients and the rounded head gradient, for any number of rows: chunks of 1024
    rows in both contexts (512 would take 0.6 GiB less, and 1 % more time exact, 20 % live, on an H100)."""
    for rows in (9216, 147456):
        extra = sizes.extra_bytes("sgpo", rows, 3584, 152064, torch.bfloat16, "cuda")
        outputs = 2 * rows * 3584 * 2 + 152064 * 3584 * 2 + 48 * rows * 4
        blocks = sizes.WORK_BLOCKS * sizes.block_rows(152064, torch.bfloat16, "cuda") * 152064 * 4
        assert (extra - outputs - blocks) / 2**30 < 4.6


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=5))
def test_scale_is_a_power_of_two_just_above_the_largest_value(values):
    tensor = torch.tensor(values)
    scale = backend_torch.power_of_two_scale(tensor).item()
    largest = tensor.abs().max().item()
    assert torch.frexp(torch.tensor(scale)).mantissa.item() == 0.5
    if largest > 1e-30:
        assert largest <= scale <= 2 * largest
    else:
        assert scale == 1


@pytest.mark.parametrize("values", [[0.0], [float("inf")], [float("nan")]])
def test_scale_of_nothing_usable_is_one(values):
    assert backend_torch.power_of_two_scale(torch.tensor(values)).item() == 1


def score_table(logits: torch.Tensor, targets: torch.Tensor) -> tuple[backend.Logits, torch.Tensor]:
    """Finished logits and the row table of policy rows of weight and advantage 1, exactly on-policy."""
    side = backend.Logits(logits.clone(), None, None, None)
    parts = backend_torch.scan(side, targets).unsqueeze(0)
    one, rows = torch.ones(len(logits), dtype=logits.dtype), torch.arange(len(logits))
    values = logits.new_zeros(backend.VALUE_ROWS, len(logits))
    clip_range = ClipRange(None, None, None)
    return side, backend_torch.policy_row_values(parts, 0, targets, None, one, one, clip_range, rows, one, values)


def test_log_probabilities_keep_their_accuracy_for_large_logits():
    values = (torch.randn(8, 100, dtype=torch.float64) + 1000).float()
    _, table = score_table(values, torch.zeros(8, dtype=torch.int64))
    ours = backend_torch.log_probs(values, table[backend.MAX], table[backend.LOG_SUM])
    assert (ours - values.double().log_softmax(1)).abs().max() < 2e-6


def test_gradient_of_score_rows_is_the_gradient_of_the_log_probability():
    logits = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(9, (6,))
    (-logits.log_softmax(1).gather(1, targets.unsqueeze(1))).sum().backward()
    side, table = score_table(logits.detach(), targets)
    torch.testing.assert_close(backend_torch.gradient("score", side, None, table, targets, None), logits.grad)


def test_total_is_the_sum_of_the_core():
    logits, targets = torch.randn(6, 9, dtype=torch.float64), torch.randint(9, (6,))
    side, table = score_table(logits, targets)
    core = backend_torch.score_core(side.products_CV, table, targets)
    torch.testing.assert_close(table[backend.TOTAL], core.abs().sum(1))


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


def test_slabs_are_about_equally_full():
    assert sizes.slab_rows(9216, 1024) == 3072
    assert sizes.slab_rows(8192, 1024) == 4096
    assert sizes.slab_rows(300, 1024) == 1024
    for rows in range(1, 20_000, 37):
        slab = sizes.slab_rows(rows, 1024)
        assert slab % 1024 == 0
        assert slab <= sizes.SLAB_ROWS


@pytest.mark.parametrize("columns", [37, 256, 32768, 49152])
def test_rows_of_products_share_no_sets_of_the_cache(columns):
    buffer = sizes.padded_empty(3, columns, like=torch.empty(0))
    assert buffer.shape == (3, columns)
    assert buffer.stride(0) % 16 == 0
    assert buffer.stride(0) * 4 % 1024
    assert buffer.stride(0) - columns < 32


@pytest.mark.parametrize(("softcap", "kept"), [(None, False), (5.0, True)])
def test_scan_leaves_exponentials_of_score_rows(softcap, kept):
    """In place of the products; with a soft-cap, whose derivative needs them, and without labels the logits stay."""
    products, targets = torch.randn(4, 9, dtype=torch.float64), torch.randint(9, (4,))
    logits = products if softcap is None else (products / softcap).tanh() * softcap
    for labels in (targets, None):
        side = backend.Logits(products.clone(), None, softcap, None)
        stats = backend_torch.scan(side, labels)
        wanted = logits if kept or labels is None else (logits - stats[backend.TOP].unsqueeze(1)).exp()
        torch.testing.assert_close(side.products_CV, wanted)
