"""The two implementations of the row arithmetic have one interface, and Triton's names of planes are those of torch."""

from __future__ import annotations

import inspect

import pytest
import triton.language as tl
from sgpo_kernels import backend, backend_torch, backend_triton, triton_constants

FUNCTIONS = [name for name in vars(backend.Backend) if not name.startswith("_")]


@pytest.mark.parametrize("module", [backend_torch, backend_triton], ids=["torch", "triton"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_backend_has_the_functions_of_the_protocol(module, name):
    """Same parameters in the same order, same kinds, defaults and annotations, same result; `self` is the module."""
    assert len(FUNCTIONS) == 14
    declared, ours = (inspect.signature(getattr(owner, name)) for owner in (backend.Backend, module))
    assert list(declared.parameters.values())[1:] == list(ours.parameters.values())
    assert declared.return_annotation == ours.return_annotation


def test_planes_have_one_number():
    """Every name of a plane inside Triton kernels is the number that torch uses."""
    shared = [name for name, value in vars(triton_constants).items() if isinstance(value, tl.constexpr)]
    planes = [name for name in shared if hasattr(backend, name)]
    assert {"MAX", "TOTAL", "LOGPROB", "ROW_LOSS", "SIZE_SUM", "LABEL_LOGIT"} <= set(planes)
    assert all(getattr(triton_constants, name).value == getattr(backend, name) for name in planes)


def test_planes_of_one_tensor_are_different_and_fill_it():
    table = ("MAX", "LOG_SUM", "SLOPE", "STRENGTH", "CENTRE", "ENTROPY", "TEACHER_MAX", "TEACHER_LOG_SUM", "TOTAL")
    values = ("LOGPROB", "ROW_ENTROPY", "RATIO", "CLIPPED", "ROW_LOSS", "DROPPED", "SHARE")
    statistics, sums = ("TOP", "EXP_SUM", "WEIGHTED_SUM", "LABEL_LOGIT"), ("DIVERGENCE_SUM", "CENTRE_SUM", "SIZE_SUM")
    counts = (backend.TABLE_ROWS, backend.VALUE_ROWS, backend.STAT_ROWS, backend.SUM_ROWS)
    for names, count in zip((table, values, statistics, sums), counts, strict=True):
        assert sorted(getattr(backend, name) for name in names) == list(range(count))
