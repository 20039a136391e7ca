"""The Triton row kernels against float64: in Triton's interpreter on a CPU, compiled on CUDA."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import warnings

import pytest
import sgpo_kernels
import torch
from sgpo_kernels import backend, backend_torch, chunk_loop, reference, sizes, testing
from sgpo_kernels.inputs import ClipRange, KlLimit
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOSSES = ("policy", "policy_on", "policy_dual", "forward_kl", "reverse_kl", "js", "sgpo")
KINDS = ("forward_kl", "reverse_kl", "js")
BENT = {"temperature": "rows", "logit_softcap": 4.0}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several tiles in each direction at the sizes of these tests."""
    tiles = {name: block._replace(rows=2, columns=16) for name, block in sizes.DEFAULT_BLOCKS.items()}
    if DEVICE == "cpu":
        monkeypatch.setattr(sizes, "DEFAULT_BLOCKS", tiles)
        # Wide operands take half of each.
        monkeypatch.setattr(sizes, "PRODUCT_TILES", dict.fromkeys(sizes.PRODUCT_TILES, sizes.Tiles(32, 32, 32, 4, 2)))


def check(case, **extra) -> dict[str, Tensor]:
    """Every output, statistic and gradient against float64, with plain torch of the same dtype as the yardstick."""
    truth, plain = case.results(reference, torch.float64), case.results(reference)
    for store in (case.leaves, case.fixed):
        store.update({name: value.to(DEVICE) for name, value in store.items() if isinstance(value, Tensor)})
    case.upstream = case.upstream.to(DEVICE)
    ours = {name: value.cpu() for name, value in case.results(impl="triton", **extra).items()}
    for name, value in ours.items():
        if value.dtype == torch.bool:
            assert torch.equal(value, truth[name]), name
        else:
            testing.assert_close_to_reference(value, plain[name], truth[name], name=name, cancelled=8.0)
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("bias", "temperature", "softcap"),
    [(False, 1.0, None), (True, 1.0, None), (True, 0.7, 3.0), (False, "rows", 3.0), (True, "rows", None)],
)
def test_every_op_with_every_option(make_case, op, dtype, bias, temperature, softcap):
    case = make_case(op, dtype, (13, 8, 37), bias=bias, temperature=temperature, logit_softcap=softcap)
    check(case, chunk_rows=5)


def test_a_row_on_a_gate_is_inside(make_case):
    """Eq. 5 keeps d <= delta, and a ratio of exactly 1 + clip_high is not clipped, here as in plain torch."""
    case = make_case("forward_kl", dead=0.0, max_token_kl=None)
    limit = float(case.results(impl="triton")["divergence"].median())
    ours = case.results(impl="triton", max_token_kl=limit)
    on_limit = ours["divergence"] == limit
    assert on_limit.sum() == 1
    assert not ours["over_limit"][on_limit].any()
    assert ours["grad.hidden"][on_limit].any()
    # On-policy rows have a ratio of exactly 1.
    case = make_case("policy_on", dead=0.0, clip_low=0.0, clip_high=0.0)
    ours = case.results(impl="triton")
    assert not ours["clipped"].any()
    assert ours["grad.hidden"].any(dim=1).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("over_limit", "limit"),
    [("mask", 0.05), ("clamp", 0.05), ("scale", 0.05), ("mask", 0.4), ("clamp", 0.4), ("scale", 0.4), ("mask", None)],
)
def test_every_limit(make_case, kind, over_limit, limit):
    check(make_case(kind, max_token_kl=limit, over_limit=over_limit), chunk_rows=7)


@pytest.mark.parametrize("low", [None, 0.2])
@pytest.mark.parametrize("high", [None, 0.28])
@pytest.mark.parametrize("dual", [None, 1.2])
def test_every_combination_of_bounds(make_case, low, high, dual):
    check(make_case("policy", clip_low=low, clip_high=high, dual_clip=dual), chunk_rows=7)


@pytest.mark.parametrize("vocab", [1, 16, 33])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_ragged_shapes(make_case, op, vocab, rows):
    check(make_case(op, torch.float32, (rows, 5, vocab), dead=0.0))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_logits_of_a_thousand(make_case, op, sign):
    case = make_case(op, torch.float32, (6, 4, 19), bias=False)
    size = sign * 1000 / float(case.leaves["head"][:, 0].abs().max())
    for name in ("hidden", "policy_hidden", "distill_hidden"):
        if name in case.leaves:
            case.leaves[name][:, 0] = size
    if "teacher_hidden" in case.fixed:
        case.fixed["teacher_hidden"][:, 0] = -size
    for name in {"old_logprobs", "max_token_kl"} & set(case.fixed):
        case.fixed[name] = None
    check(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_states_give_exactly_zero(make_case, kind, dtype):
    case = make_case(kind, dtype, (9, 8, 37), spread=0.0)
    ours = check(case)
    assert not ours["divergence"].any()
    assert not any(value.any() for name, value in ours.items() if name.startswith("grad."))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spread", [1e-5, 1e-3, 1e-1])
def test_small_divergences_keep_their_relative_accuracy(make_case, kind, spread):
    case = make_case(kind, spread=spread, max_token_kl=None, dead=0.0, bias=False)
    truth = case.results(reference, torch.float64)["divergence"]
    ours = check(case)["divergence"].double()
    assert bool((ours >= 0).all())
    # What float32 logits leave of a difference of this size, and 1e-4.
    assert float(((ours - truth).abs() / truth).max()) < 1e-4 + 3e-6 / spread


@pytest.mark.parametrize("kind", KINDS)
def test_terms_of_a_divergence_match_float64_for_any_difference(kind):
    """Both series and both closed forms: differences of the log-probabilities from 1e-6 to 30."""
    size = torch.logspace(-6, 1.5, 60, dtype=torch.float64)
    logits = torch.randn(60, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    teacher = logits + size.unsqueeze(1) * torch.randn(
        60, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    eye, weight = torch.eye(16), torch.ones(60)
    student_h, teacher_h = logits.float(), teacher.float()
    exact = reference.linear_divergence(
        student_h.double(), teacher_h.double(), eye.double(), token_weight=weight.double(), kind=kind
    )[1].divergence
    inputs = (x.to(DEVICE) for x in (student_h, teacher_h, eye))
    _, stats = sgpo_kernels.linear_divergence(*inputs, token_weight=weight.to(DEVICE), kind=kind, impl="triton")
    assert float(((stats.divergence.cpu().double() - exact).abs() / (2e-6 * size + 1e-4 * exact)).max()) < 1


@pytest.mark.parametrize("op", LOSSES)
def test_dead_rows_are_never_read(make_case, op):
    case = make_case(op)
    clean = case.results(impl="triton")
    for name in ("hidden", "policy_hidden", "distill_hidden"):
        if name in case.leaves:
            case.leaves[name][case.weights()[-1 if name == "distill_hidden" else 0] == 0] = torch.nan
    ours = case.results(impl="triton")
    assert all(torch.equal(value, clean[name]) for name, value in ours.items())


@pytest.mark.parametrize("tolerance", [0.0, 0.05])
def test_same_bits_and_no_uninitialised_memory(make_case, op, tolerance):
    case = make_case(op, torch.float32, (13, 8, 37))
    extra = {} if op == "logprob" else {"column_tolerance": tolerance}
    first = case.results(impl="triton", chunk_rows=5, **extra)
    with testing.poisoned_empty(), warnings.catch_warnings():
        second = case.results(impl="triton", chunk_rows=5, **extra)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize(
    ("tolerance", "options"),
    [(2.0**-8, {}), (2.0**-8, BENT), (0.02, {}), (0.2, BENT), (0.2, {"bias": False})],
    ids=str,
)
@pytest.mark.parametrize("op", LOSSES)
def test_live_columns_agree_with_plain_torch(make_case, op, tolerance, options, monkeypatch):
    """The same columns, the same dropped mass, the same gradients, as long as the host learns of no diffuse chunk."""
    monkeypatch.setattr(chunk_loop, "read_later", lambda count: lambda: 0)
    case = make_case(op, torch.float32, (26, 8, 67), logit_scale=5.0, **options)
    ours, plain = (case.results(impl=impl, column_tolerance=tolerance, chunk_rows=6) for impl in ("triton", "torch"))
    if tolerance == 0.02 and not options:
        assert any(bool((value[value > 0] < 1).any()) for name, value in plain.items() if "column_share" in name)
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value, rtol=2e-4, atol=2e-5)


def test_tiles_that_are_not_read_hold_no_live_column(make_case):
    """Peaks of skipped tiles come back as 0; the true ones lie below the tolerance. At threshold 0 all are read."""
    from sgpo_kernels import backend_triton

    gen = torch.Generator().manual_seed(3)
    z = torch.randn(8, 64, generator=gen)
    z[:, 24:] -= 8
    z[5, 60] += 12
    targets = torch.randint(24, (8,), generator=gen)
    tolerance = torch.tensor(0.01)
    found = {}
    for name, module in {"triton": backend_triton, "torch": backend_torch}.items():
        logits = backend.Logits(z.clone(), None, None, None, {})
        parts = module.scan(logits, targets).unsqueeze(0)
        values = torch.zeros(backend.VALUE_ROWS, 8)
        one = torch.ones(8)
        table = module.policy_row_values(
            parts, 0, targets, None, one, one, ClipRange(None, None, None), torch.arange(8), one, values
        )
        side = ("score", logits, None, table, targets)
        live, found[name] = module.live_columns(*side, tolerance, all_peaks=False)
        columns = live.columns_A if live.taken is None else live.columns_A[: live.taken]
        assert columns.tolist() == found.setdefault("live", columns).tolist()
        assert not found[name][columns.long()].any()
        _, everything = module.live_columns(*side, torch.tensor(9.0), all_peaks=True)
        torch.testing.assert_close(everything, found.setdefault("everything", everything))
    dropped = torch.ones(64, dtype=torch.bool).index_fill(0, found["live"].long(), False)
    assert torch.equal(found["everything"] < tolerance, dropped)
    skipped = dropped & (found["triton"] == 0)
    assert skipped.any()
    assert bool((found["triton"] <= found["torch"] * (1 + 1e-5)).all())


def row_kernels(products: Tensor, teacher: Tensor, out: Tensor, kind: str) -> list[Tensor]:
    """What every kernel makes of the products; dz goes to `out`."""
    from sgpo_kernels import backend_triton

    rows, vocab = products.shape
    bias, inverse = torch.linspace(-1, 1, vocab, device=DEVICE), torch.full((rows,), 0.8, device=DEVICE)
    student, other = (backend.Logits(side, bias, 3.0, inverse, {}) for side in (products, teacher))
    values = torch.zeros(backend.VALUE_ROWS, rows, device=DEVICE)
    index, one = torch.arange(rows, device=DEVICE), torch.ones(rows, device=DEVICE)
    if kind == "score":
        targets, side = index + 1, None
        parts = backend_triton.scan(student, targets).unsqueeze(0)
        clip_range = ClipRange(None, None, None)
        table = backend_triton.policy_row_values(parts, 0, targets, None, one, one, clip_range, index, one, values)
    else:
        targets, side = None, other
        parts = torch.cat([backend_triton.scan(student, None), backend_triton.scan(other, None)]).unsqueeze(0)
        table = backend_triton.pair_row_values(parts, 0, index, values)
        sums = backend_triton.divergence_sums(kind, student, other, table)
        kl_limit = KlLimit(kind, None, "mask")
        backend_triton.divergence_row_values(sums, one, kl_limit, index, one, values, table)
    chunk = (kind, student, side, table, targets)
    _, peaks = backend_triton.live_columns(*chunk, torch.tensor(9.0, device=DEVICE), all_peaks=True)
    count = torch.tensor(4, dtype=torch.int32, device=DEVICE)
    columns = torch.tensor([1, 5, 7, vocab - 1, vocab - 1], dtype=torch.int32, device=DEVICE)
    live, kept, total = backend_triton.gradient_columns(*chunk, backend.LiveColumns(columns, count), torch.float32)
    live = live[:, :4]
    torch.testing.assert_close(total, live.sum(1))
    dz = backend_triton.gradient(kind, student, side, table, targets, out)
    return [value.clone() for value in (values, table, live, kept, peaks, dz)]


@pytest.mark.skipif(DEVICE == "cuda", reason="test_cuda has a tensor of this size")
@pytest.mark.parametrize("kind", ["score", *KINDS])
def test_rows_beyond_32_bits(kind):
    """Three rows 2^30 elements apart, so that the third lies where a 32-bit offset wraps around. The memory between
    them, and where wrapped offsets lead, is reserved and never touched."""
    stride, vocab = 2**30, 40
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, which Python names from 3.13 on
    base = torch.frombuffer(mmap.mmap(-1, (4 * stride + 4 * vocab) * 4, flags=flags), dtype=torch.float32)
    gen = torch.Generator().manual_seed(0)
    near = [torch.randn(3, vocab, generator=gen) for _ in range(2)] + [torch.empty(3, vocab)]
    far = [base.as_strided((3, vocab), (stride, 1), 2 * stride + place * vocab) for place in range(3)]
    for here, there in zip(near, far, strict=True):
        there.copy_(here)
    for ours, expected in zip(row_kernels(*far, kind), row_kernels(*near, kind), strict=True):
        assert torch.equal(ours, expected)


def test_no_gradient_gives_the_same_values(make_case, op):
    case = make_case(op)
    full = case.results(impl="triton")
    with torch.no_grad():
        ours = case.results(impl="triton")
    assert all(torch.equal(value, full[name]) for name, value in ours.items())


def test_float64_is_refused(make_case, op):
    with pytest.raises(NotImplementedError, match="float64"):
        make_case(op, torch.float64).call(sgpo_kernels, impl="triton")


def test_without_interpreter_or_cuda_it_says_what_to_do(make_case, op, monkeypatch):
    monkeypatch.setattr(sizes, "interpreting", lambda: False)
    with pytest.raises(NotImplementedError, match="needs tensors on CUDA, not on cpu"):
        make_case(op).call(sgpo_kernels, impl="triton")


@pytest.mark.parametrize("centred", [True, False])
def test_thresholds_and_bounds_are_those_of_plain_torch(centred):
    from sgpo_kernels import backend_triton

    gen = torch.Generator().manual_seed(0)
    table = torch.rand(backend.TABLE_ROWS, 300, generator=gen).to(DEVICE)
    table[backend.SLOPE] -= 0.5
    kept, total = table[backend.TOTAL] * 0.9, torch.randn(300, generator=gen).to(DEVICE)
    columns, count = torch.arange(7, device=DEVICE), torch.tensor(5, dtype=torch.int32, device=DEVICE)
    rows, scale = torch.randperm(320, generator=gen)[:300].to(DEVICE), torch.tensor(0.25, device=DEVICE)
    found = []
    for module, live in ((backend_torch, (columns[:5], None)), (backend_triton, (columns.int(), count))):
        values = torch.zeros(backend.VALUE_ROWS, 320, device=DEVICE)
        module.finish_columns(
            table, kept, total if centred else None, backend.LiveColumns(*live), scale, rows, 1000, values
        )
        found.append((values, module.column_threshold(table, 0.01), module.column_threshold(table * torch.nan, 0.01)))
    torch.testing.assert_close(*found, equal_nan=True)
    assert float(found[0][0][backend.SHARE].max()) == pytest.approx(5 / 1000)


@pytest.mark.parametrize("peaks", [0.01, 0.6])
@pytest.mark.parametrize("blocks", [1, 3, 200])
def test_live_columns_stand_in_their_order_and_above_the_limit_there_are_all(peaks, blocks):
    from sgpo_kernels import backend_triton

    vocab = 20_000
    found = torch.rand(blocks, vocab, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    largest = found.amax(0)
    threshold = largest.quantile(1 - peaks)
    (columns, count), dropped = backend_triton.placed(found, threshold)
    expected = (largest >= threshold).nonzero().squeeze(1) if peaks < 0.5 else torch.arange(vocab, device=DEVICE)
    assert columns[:count].tolist() == expected.tolist()
    assert bool((columns[count:] == vocab - 1).all())
    assert torch.equal(dropped, torch.where(largest < threshold, largest, 0.0))


@pytest.mark.parametrize("live", [0, 1, 40, 67])
def test_products_of_live_columns_are_those_of_plain_torch(live):
    from sgpo_kernels import backend_triton

    gen = torch.Generator().manual_seed(live)
    dz, hidden, head, sums = (torch.randn(n, k, generator=gen) for n, k in ((21, 67), (21, 35), (67, 35), (67, 35)))
    columns = torch.randperm(67, generator=gen)[:live].sort().values
    places = torch.cat([columns, torch.full((67 - live,), 66)]).int().to(DEVICE)
    dz, hidden, head, sums = (x.to(DEVICE) for x in (dz, hidden, head, sums))
    counted = backend.LiveColumns(places, torch.tensor(live, dtype=torch.int32, device=DEVICE))
    known = backend.LiveColumns(columns.to(DEVICE), None)
    padded = -(-live // 16) * 16
    dz[:, live:padded], dz[:, padded:] = 0.0, torch.nan
    ours = backend_triton.live_hidden(dz, head, counted)
    torch.testing.assert_close(ours, backend_torch.live_hidden(dz[:, :live], head, known))
    added, plain = sums.clone(), sums.clone()
    backend_triton.add_live_head(added, None, 1, dz, hidden, counted)
    backend_torch.add_live_head(plain, None, 1, dz[:, :live], hidden, known)
    torch.testing.assert_close(added, plain)
    # Rows that nobody has written hold anything; of the second launch's rows the first has written some.
    other = backend.LiveColumns(torch.arange(67, dtype=torch.int32, device=DEVICE), counted.taken)
    first, partly = torch.zeros(67, dtype=torch.int32, device=DEVICE), torch.full_like(sums, torch.nan)
    plain = torch.zeros_like(sums)
    for number, live_columns in enumerate((counted, other), start=1):
        backend_triton.add_live_head(partly, first, number, dz, hidden, live_columns)
        known = backend.LiveColumns(live_columns.columns_A[:live].long(), None)
        backend_torch.add_live_head(plain, None, number, dz[:, :live], hidden, known)
    factor = torch.tensor(1.5, device=DEVICE)
    ours = backend_triton.rescaled(partly, factor, torch.float32, first)
    torch.testing.assert_close(ours, plain * 1.5)
    assert first[places[:live].long()].tolist() == [1] * live


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rescaled_rounds_once(dtype):
    from sgpo_kernels import backend_triton

    grad, factor = torch.randn(3, 1001, device=DEVICE), torch.tensor(0.3, device=DEVICE)
    result = backend_triton.rescaled(grad, factor, dtype)
    assert result.dtype == dtype
    # The interpreter truncates to bfloat16.
    rtol = 2.0**-7 if dtype == torch.bfloat16 and DEVICE == "cpu" else 0.0
    torch.testing.assert_close(result, (grad * factor).to(dtype), rtol=rtol, atol=0)


@pytest.mark.parametrize("kernel", ["triton_gradients.gradient_tiles", "triton_statistics.label_row_values"])
def test_a_plane_that_moves_is_a_kernel_that_is_compiled_anew(kernel):
    """Triton finds compiled kernels by a key, which must hold the planes of the row table."""
    module, name = kernel.split(".")
    program = (
        "import sys; from sgpo_kernels import backend\n"
        "if sys.argv[1] == 'moved': backend.SLOPE, backend.STRENGTH = backend.STRENGTH, backend.SLOPE\n"
        f"from sgpo_kernels import {module}; print({module}.{name}.cache_key)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    keys = {
        subprocess.run([sys.executable, "-c", program, word], env=environment, capture_output=True, text=True).stdout
        for word in ("as it is", "moved", "moved")
    }
    assert "" not in keys
    assert len(keys) == 2
