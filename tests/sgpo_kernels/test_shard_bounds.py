"""A sharded head on confident states: live columns of every rank against float64, and what only shards can break."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch

PATH = Path(__file__).with_name("shard_bounds_worker.py")
RUNS = (("torch", 2), ("torch", 3), ("triton", 3))


@pytest.fixture(scope="module")
def worker():
    spec = spec_from_file_location("shard_bounds_worker", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=RUNS, ids=str)
def ranks(request, launcher, tmp_path_factory) -> tuple[str, list[Any]]:
    """The implementation, and (live results, op results) of each rank."""
    impl, count = request.param
    folder = tmp_path_factory.mktemp("shards")
    launcher([str(PATH), str(folder), impl], processes=count)
    return impl, [torch.load(folder / f"{count}-{rank}.pt") for rank in range(count)]


def test_live_columns_of_shards_keep_the_bound(ranks, worker):
    """Without a tolerance the whole result; with one, losses to the bit, and what is missing lies under the bound."""
    impl, ranks = ranks
    thinned = 0
    for case in worker.cases(impl):
        kind, dtype, seed, tolerance, chunk = case
        states = worker.properties.confident(kind, seed, worker.DTYPES[dtype])
        loss, stats, grads = states.run(impl="torch", chunk_rows=chunk)
        parts = [live[case] for live, _ in ranks]
        close = {"rtol": 1e-9, "atol": 1e-12} if dtype == "float64" else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(parts[0][0], loss, **close)
        for name, value in stats._asdict().items():
            if name == "column_share":
                continue
            assert all(torch.equal(part[1][name], parts[0][1][name]) for part in parts), (case, name)
            if name != "dropped":
                torch.testing.assert_close(parts[0][1][name], value, **close)
        assert all(torch.equal(part[2]["hidden"], parts[0][2]["hidden"]) for part in parts), case
        dropped = parts[0][1]["dropped"].double()
        assert tolerance or not dropped.any()
        _, dz = states.slopes()
        rounding = {"float64": 1e-11, "float32": 2e-5}[dtype] * (states.weight.abs().double() + dz.abs().sum(1))
        top = float(states.head.abs().max())
        off = (parts[0][2]["hidden"].double() - dz @ states.head.double()).abs().amax(1)
        assert bool((off <= (dropped + rounding) * top).all()), case
        ours = {name: torch.cat([part[2][name] for part in parts]).double() for name in grads if name != "hidden"}
        exact = {"head": dz.t() @ states.hidden.double(), "bias": dz.sum(0)}
        for name, value in ours.items():
            reach = 1.0 if name == "bias" else float(states.hidden.abs().max())
            assert float((value - exact[name]).abs().max()) <= reach * float((dropped + rounding).sum()), (case, name)
        shares = torch.stack([part[1]["column_share"] for part in parts])[:, states.weight != 0]
        thinned += bool((shares < 1).any())
        if chunk == 60 and tolerance:
            # One chunk: a column that was dropped has no gradient at all.
            lost = (dz * ~ours["head"].any(1)).abs().sum(1)
            assert bool((lost <= dropped + 1e-30).all()), case
            if kind in ("policy", "forward_kl") and states.fixed["logit_softcap"] is None:
                slack = len(parts) * 2.0**-17 * states.weight.abs().double() * 2 + rounding
                ratio = stats.ratio.double().clamp(min=1) if kind == "policy" else 1.0
                assert bool((dropped <= lost * 1.01 + slack * ratio).all()), case
    assert thinned >= (8 if impl == "triton" else 16)


def test_what_only_shards_can_break(ranks, worker):
    """Targets of the last piece only, a sharded teacher head, a gradient buffer, and pieces so uneven that each rank
    would choose its own rows per chunk."""
    impl, ranks = ranks
    expected = worker.op_results({"impl": "torch"}, None)
    close = {"rtol": 2e-4, "atol": 2e-5} if impl == "triton" else {"rtol": 1e-9, "atol": 1e-11}
    assert {name.split("-")[0] for name in expected} == {"last", "teacher", "buffer"}
    for case, results in expected.items():
        parts = [ops[case] for _, ops in ranks]
        for name, value in results.items():
            if name in ("grad.head", "grad.bias"):
                ours = torch.cat([part[name] for part in parts])
            else:
                ours = parts[0][name]
                assert all(torch.equal(part[name], ours) for part in parts), (case, name)
            torch.testing.assert_close(
                ours.to(value.dtype), value, **close, msg=lambda text, at=(case, name): f"{at} {text}"
            )
