"""What only a CUDA device can show: the widening products, the host syncs, the allocator's peak."""

from __future__ import annotations

import pytest
import sgpo_kernels
import torch
from sgpo_kernels import launch, reference, testing
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def to_cuda(case):
    for store in (case.leaves, case.fixed):
        store.update({name: value.cuda() for name, value in store.items() if isinstance(value, Tensor)})
    case.upstream = case.upstream.cuda()
    return case


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(70, 64, 1003), (130, 128, 4096)], ids=str)
def test_cuda_agrees_with_float64(make_case, op, dtype, shape):
    case = make_case(op, dtype, shape)
    truth, plain = case.results(reference, torch.float64), case.results(reference)
    first, second = (to_cuda(case).results(chunk_rows=32) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        if value.dtype == torch.bool:
            assert torch.equal(value.cpu(), truth[name]), name
        else:
            testing.assert_close_to_reference(value.cpu(), plain[name], truth[name], name=name, cancelled=5.0)


def test_one_host_sync_per_group_of_rows(make_case, op):
    case = to_cuda(make_case(op, torch.bfloat16, (70, 64, 1003)))
    case.results(chunk_rows=32)
    assert testing.host_syncs(lambda: case.results(chunk_rows=32)) <= (2 if op == "sgpo" else 1)


@pytest.mark.parametrize(("op", "formula"), [("policy", "policy"), ("forward_kl", "divergence"), ("js", "divergence")])
def test_peak_is_below_the_formula(make_case, op, formula):
    shape = (2048, 512, 32000)
    case = to_cuda(make_case(op, torch.bfloat16, shape, dead=0.0))
    leaves = {name: leaf.requires_grad_() for name, leaf in case.leaves.items()}

    def run() -> None:
        case.function(sgpo_kernels)(**leaves, **case.fixed, chunk_rows=256)[0].backward()

    run()
    for leaf in leaves.values():
        leaf.grad = None
    assert testing.cuda_peak(run).peak_bytes <= launch.extra_bytes(formula, *shape, torch.bfloat16, "cuda", chunk=256)
