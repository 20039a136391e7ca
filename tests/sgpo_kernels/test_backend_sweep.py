"""impl="triton-nologits": the same values as with logits, a superset of the live columns, the same gradients."""

from __future__ import annotations

import pytest
import sgpo_kernels
import torch
from sgpo_kernels import backend_triton, chunk_loop, sizes

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NOLOGITS = "triton-nologits"


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles in each direction at the sizes of these tests."""
    if DEVICE == "cpu":
        blocks = {name: block._replace(rows=2, columns=16) for name, block in sizes.DEFAULT_BLOCKS.items()}
        monkeypatch.setattr(sizes, "DEFAULT_BLOCKS", blocks)
        # Wide operands take half of each.
        monkeypatch.setattr(sizes, "PRODUCT_TILES", dict.fromkeys(sizes.PRODUCT_TILES, sizes.Tiles(32, 32, 32, 4, 2)))


@pytest.fixture
def scans(monkeypatch) -> list[int]:
    """One entry per chunk that is scanned from logits."""
    seen: list[int] = []
    real = backend_triton.scan
    monkeypatch.setattr(backend_triton, "scan", lambda logits, labels: (seen.append(1), real(logits, labels))[1])
    return seen


def results(case, impl: str, **options) -> dict[str, torch.Tensor]:
    for store in (case.leaves, case.fixed):
        store.update({name: value.to(DEVICE) for name, value in store.items() if isinstance(value, torch.Tensor)})
    case.upstream = case.upstream.to(DEVICE)
    return case.results(impl=impl, **options)


@pytest.mark.parametrize(
    ("op", "dtype", "temperature"),
    [("policy", torch.float32, "rows"), ("policy_dual", torch.bfloat16, 1.0), ("sgpo", torch.bfloat16, "rows")],
    ids=str,
)
def test_it_agrees_with_logits(make_case, op, dtype, temperature, scans):
    case = make_case(op, dtype, (26, 16, 67), bias=False, temperature=temperature, logit_scale=5.0)
    options = {"column_tolerance": 2.0**-12, "chunk_rows": 20}
    plain = results(case, "triton", **options)
    before = len(scans)
    ours = results(case, NOLOGITS, **options)
    assert len(scans) - before == (0 if op.startswith("policy") else 2)
    rtol = 1e-4 if dtype == torch.float32 else 2.0**-6
    for name, value in plain.items():
        if name.endswith("column_share"):
            assert bool((ours[name] >= value - 1e-6).all())
        elif value.dtype == torch.bool:
            assert torch.equal(ours[name], value), name
        elif not name.endswith("dropped"):
            size = max(float(value.abs().float().max()), 0.01)
            torch.testing.assert_close(ours[name], value, rtol=rtol, atol=rtol * size)


@pytest.mark.parametrize("shift", [-1.0, 0.0, 4.0])
def test_any_guess_is_right_and_a_near_one_keeps_few_columns(make_case, shift):
    """Old log-probs that are off, either way: the live columns still hold those of the exact peaks, and the bound."""
    case = make_case("policy_on", torch.float32, (20, 32, 200), bias=False, logit_scale=9.0, dead=0.0)
    # The rows' own labels, as sampling would give them.
    hidden, head = case.leaves["hidden"], case.leaves["head"]
    logp = (hidden @ head.t()).log_softmax(1)
    case.fixed["targets"] = logp.exp().multinomial(1, generator=torch.Generator().manual_seed(0)).squeeze(1)
    old = logp.gather(1, case.fixed["targets"].unsqueeze(1)).squeeze(1)
    case.fixed.update(old_logprobs=old + shift, clip_low=None, clip_high=None)
    tolerance = 2.0**-6
    exact, ours = (results(case, impl, column_tolerance=tolerance, chunk_rows=20) for impl in ("triton", NOLOGITS))
    live, kept = (found["grad.head"].any(1) for found in (exact, ours))
    assert bool((kept >= live).all())
    assert 0 < int(live.sum()) < 100
    wrong = (ours["grad.hidden"] - results(case, "torch")["grad.hidden"]).abs().amax(1)
    assert bool((wrong <= 1.7 * (ours["dropped"] + 1e-4) * head.abs().max()).all())
    if shift == 0.0:
        assert float(ours["column_share"].mean()) <= 1.1 * float(exact["column_share"].mean())


def test_log_probs_need_no_logits(make_case, scans):
    case = make_case("logprob", torch.float32, (26, 16, 67), bias=False)
    with torch.no_grad():
        plain, ours = (case.call(sgpo_kernels, impl=impl, chunk_rows=20)[1] for impl in ("torch", NOLOGITS))
    assert not scans
    for value, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"bias": True}, {"logit_softcap": 4.0}, {"old_logprobs": None}, {"column_tolerance": 0.0}, {"width": 10}],
    ids=str,
)
def test_rows_that_need_logits_get_them(make_case, options, scans):
    width = options.pop("width", 16)
    tolerance = options.pop("column_tolerance", 2.0**-8)
    case = make_case("policy", torch.float32, (26, width, 67), **{"bias": False, **options})
    plain, ours = (results(case, impl, column_tolerance=tolerance, chunk_rows=20) for impl in ("triton", NOLOGITS))
    assert len(scans) == 2 * (len(scans) // 2) > 0
    assert all(torch.equal(ours[name], value) for name, value in plain.items())


@pytest.mark.parametrize("where", ["hidden", "old_logprobs"])
def test_nan_does_not_vanish(make_case, where):
    case = make_case("policy", torch.float32, (26, 16, 67), bias=False, dead=0.0)
    store = case.leaves if where == "hidden" else case.fixed
    store[where][3] = torch.nan
    ours = results(case, NOLOGITS, column_tolerance=2.0**-8)
    assert ours["loss"].isnan()
    assert ours["grad.hidden"][3].isnan().any()


@pytest.mark.parametrize("impl", ["triton", NOLOGITS])
def test_diffuse_chunks_become_dense(make_case, impl, monkeypatch):
    """Where all columns live, the third chunk and those after it are multiplied densely, with the same result."""
    dense = []
    real = chunk_loop._ChunkLoop._dense
    monkeypatch.setattr(
        chunk_loop._ChunkLoop, "_dense", lambda self, group, chunk, *rest: (
            dense.append(int(chunk.rows_C[0])), real(self, group, chunk, *rest))[1],
    )  # fmt: skip
    case = make_case("policy", torch.float32, (40, 16, 67), bias=False, logit_scale=0.5, dead=0.0)
    exact = results(case, "triton", chunk_rows=8)
    dense.clear()
    ours = results(case, impl, chunk_rows=8, column_tolerance=2.0**-14)
    assert dense == [16, 24, 32]
    for name, value in exact.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6)


def test_same_bits_each_time(make_case):
    case = make_case("policy", torch.float32, (26, 16, 67), bias=False)
    first, second = (results(case, NOLOGITS, column_tolerance=2.0**-6, chunk_rows=20) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
