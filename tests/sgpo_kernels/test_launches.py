"""What a call asks of a GPU, counted without one: more operators, launches or waits than now are a regression."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from sgpo_kernels import dry_run, estimate, sizes
from sgpo_kernels.dry_run import KERNELS, Case
from sgpo_kernels.estimate import Counts

CALL = Case(8192, 1024, 3584, 152064, live=False)
LIVE = CALL._replace(live=True)
SWEPT = LIVE._replace(impl="triton-nologits")
MODES = {"exact": CALL, "live": LIVE, "nologits": SWEPT, "captured": SWEPT._replace(captured=True)}
# (operators of torch, launches of Triton kernels, host syncs) at most: of the whole call, of one more policy chunk, and
# of one more distillation chunk.
MOST = {
    "exact": (Counts(125, 43, 2), Counts(8, 4, 0), Counts(11, 8, 0)),
    "live": (Counts(144, 106, 2), Counts(8, 11, 0), Counts(11, 15, 0)),
    "nologits": (Counts(152, 114, 2), Counts(9, 12, 0), Counts(11, 15, 0)),
    "captured": (Counts(170, 114, 0), Counts(9, 12, 0), Counts(11, 15, 0)),
}


@pytest.mark.parametrize("mode", MODES)
def test_no_more_than_now(mode):
    """Tight from above; below half of it the bound, and what is written about it, is out of date."""
    case, (whole, policy, distill) = MODES[mode], MOST[mode]
    found = (
        (estimate.counts(dry_run.steps_of(case)), whole),
        (estimate.per_chunk(case), policy),
        (estimate.per_chunk(case._replace(policy_rows=0)), distill),
    )
    for got, most in found:
        assert all(number <= bound for number, bound in zip(got, most, strict=True)), (got, most)
        assert sum(got) > sum(most) / 2, (got, most)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [(8192, 1024), (2048, 0), (0, 2048), (1000, 300)])
def test_every_kernel_is_described(mode, rows):
    steps = dry_run.steps_of(MODES[mode]._replace(policy_rows=rows[0], distill_rows=rows[1]))
    launched = [step for step in steps if step.launch is not None]
    assert {step.name for step in launched} - set(KERNELS) == set()
    for step in launched:
        assert set(KERNELS[step.name].writes) <= set(step.launch.given), step.name
        assert set(KERNELS[step.name].partly) <= set(step.launch.given), step.name
        assert step.written > 0, step.name


def test_products_and_passes_are_those_of_the_definition():
    """Three products of every policy row, four of every distillation row; the products are read by scan once."""
    steps = dry_run.steps_of(CALL)
    product = 2 * CALL.hidden * CALL.vocab
    assert sum(step.flops for step in steps) == product * (3 * CALL.policy_rows + 4 * CALL.distill_rows)
    scanned = sum(step.read for step in steps if step.name == "scan_tiles")
    assert scanned == 4 * CALL.vocab * (CALL.policy_rows + 2 * CALL.distill_rows)
    rounded = [step for step in steps if step.name == "rescale_rows"]
    assert max(step.read + step.written for step in rounded) == pytest.approx(6 * CALL.hidden * CALL.vocab, rel=1e-3)


def test_without_logits_there_is_no_matrix_of_their_size():
    """Policy rows alone: the sweep is the one product of every row, and nothing of [C, V] float32 exists."""
    steps = dry_run.steps_of(SWEPT._replace(distill_rows=0))
    assert {step.name for step in steps} & {"scan_tiles", "peak_tiles", "gradient_column_tiles"} == set()
    product = 2 * CALL.hidden * CALL.vocab * CALL.policy_rows
    assert sum(step.flops for step in steps if step.name == "sweep") == product
    assert sum(step.flops for step in steps) < 1.05 * product
    logits = sizes.CUDA_CHUNK_ROWS * CALL.vocab * 4
    assert max(step.written for step in steps if step.name not in ("rescale_rows", "live_head")) < logits / 4


def test_bytes_of_operators():
    with dry_run.Recorder(vocab=50, live_columns=7) as recorder:
        rows = dry_run.device_empty(40, 8, dtype=torch.float32)
        index = dry_run.device_empty(10, dtype=torch.int64)
        assert rows.is_cuda
        picked = rows[index]
        rows.index_add_(0, index, picked)
        assert int((index == 3).sum()) == 7
        assert dry_run.device_empty(50, dtype=torch.bool).nonzero().shape == (7, 1)
        assert torch.zeros(3, device=rows.device).is_cuda
    found = [(step.name, step.read, step.written, step.sync) for step in recorder.steps]
    assert found[0] == ("index", 320, 320, False)
    assert found[1] == ("index_add_", 640, 320, False)
    assert [name for name, *_, sync in found if sync] == ["_local_scalar_dense", "nonzero"]


def test_a_host_that_is_slow_leaves_the_device_idle(monkeypatch):
    """Where the host takes longer than the device, the call takes as long as the host does."""
    steps = dry_run.steps_of(CALL._replace(live=True))
    codes = [estimate.Code(0, 0)] * len(steps)
    card = estimate.CARDS["h100"]
    quick = estimate.predict(steps, codes, CALL, card)
    monkeypatch.setattr(estimate, "OPERATOR_US", 1000.0)
    slow = estimate.predict(steps, codes, CALL, card)
    assert slow.stages["idle"] > 10 * quick.stages["idle"]
    assert slow.total >= slow.counts.operators - 2
