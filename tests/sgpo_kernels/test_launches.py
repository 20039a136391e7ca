"""What a call asks of a GPU, counted without one: more operators, launches or waits than now are a regression."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from sgpo_kernels import dry_run, estimate
from sgpo_kernels.dry_run import KERNELS, Case
from sgpo_kernels.estimate import Counts

CALL = Case(8192, 1024, 3584, 152064, live=False)
# (operators of torch, launches of Triton kernels, host syncs) at most: of the whole call, of one more policy chunk, and
# of one more distillation chunk.
MOST = {
    False: (Counts(148, 43, 2), Counts(11, 4, 0), Counts(14, 8, 0)),
    True: (Counts(224, 79, 5), Counts(17, 8, 0), Counts(20, 12, 0)),
}


@pytest.mark.parametrize("live", [False, True])
def test_no_more_than_now(live):
    """Tight from above; below half of it the bound, and what is written about it, is out of date."""
    case = CALL._replace(live=live)
    whole, policy, distill = MOST[live]
    found = (
        (estimate.counts(dry_run.steps_of(case)), whole),
        (estimate.per_chunk(case), policy),
        (estimate.per_chunk(case._replace(policy_rows=0)), distill),
    )
    for got, most in found:
        assert all(number <= bound for number, bound in zip(got, most, strict=True)), (got, most)
        assert sum(got) > sum(most) / 2, (got, most)


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("rows", [(8192, 1024), (2048, 0), (0, 2048), (1000, 300)])
def test_every_kernel_is_described(live, rows):
    steps = dry_run.steps_of(CALL._replace(policy_rows=rows[0], distill_rows=rows[1], live=live))
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
    rounded = [step for step in steps if step.name == "rescale"]
    assert max(step.read + step.written for step in rounded) == pytest.approx(6 * CALL.hidden * CALL.vocab, rel=1e-6)


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
