"""Products with the head that leave row statistics and no logits: a persistent Triton kernel, cuBLAS beside it.

    python -m benchmarks.product_statistics --out FILE.jsonl [--shape qwen2.5-7b] [--seconds 0.1]
    TRITON_INTERPRET=1 python -m benchmarks.product_statistics --out FILE.jsonl --device cpu --shape tiny   float32

What: `one` keeps of each row in each column tile max, sum e^(z - max) and sum e^(z - max) (z - max), of each column in
  each row tile the largest z - z_y + strength (with peaks) or else the target's z. `two` multiplies student and
  teacher with the same tiles of the head and sums p_T f(u - guess), f(x) = e^x - 1 - x, u = z_S - z_T, around a
  guessed difference of the normalisers; with x = true difference - guess, KL = sum - f(x) afterwards.
Errors: against products in fp64, on the last rows; `kl_two_pass` against fp64 arithmetic on the float32 products of
  torch, whose own error is `kl_of_products`.
Limits: rows a multiple of BM, hidden size of 8 (TMA); not part of the loss, see README.md.
"""

# Triton reads the kernels, Python does not: the rules of its types do not hold.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from sgpo_kernels import sizes
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks import measure, states
from benchmarks.ceilings import median_s
from benchmarks.ops import SHAPES, Shape
from benchmarks.products import widening

LOG2E = tl.constexpr(1.4426950408889634)
CHECKED_ROWS = 128
Case = tuple[Callable[[], Any], Callable[[], dict[str, float]]]
"""(launch, errors after a launch)."""


@dataclass(frozen=True)
class Tiles:
    """BM x BN products in steps of BK; GROUP row tiles share a column tile; HALVES: the epilogue takes half a tile at a
    time, for fewer registers."""

    BM: int
    BN: int
    BK: int = 64
    GROUP: int = 8
    HALVES: bool = False
    num_stages: int = 3
    num_warps: int = 8


@triton.jit
def _place(tile, nm, nn, GROUP: tl.constexpr):
    """(row tile, column tile): down the group's rows first."""
    first = tile // (GROUP * nn) * GROUP
    size = min(nm - first, GROUP)
    return first + tile % size, (tile % (GROUP * nn)) // size


@triton.jit
def _keep(z, pm, rows, at, stats_ptr, target_ptr, zy_ptr, strength_ptr, out_ptr, M, N, T, W: tl.constexpr,
          PEAKS: tl.constexpr):  # fmt: skip
    columns = at * W + tl.arange(0, W)
    inside = columns < N
    top = tl.max(tl.where(inside[None, :], z, float("-inf")), 1)
    below = tl.where(inside[None, :], z - top[:, None], -100.0)
    exp = tl.exp2(below * LOG2E)
    base = stats_ptr + at * M + rows
    tl.store(base, top)
    tl.store(base + T * M, tl.sum(exp, 1))
    tl.store(base + 2 * T * M, tl.sum(exp * below, 1))
    if PEAKS:
        shift = tl.load(strength_ptr + rows) - tl.load(zy_ptr + rows)
        tl.store(out_ptr + pm.to(tl.int64) * N + columns, tl.max(z + shift[:, None], 0), mask=inside)
    else:
        target = tl.load(target_ptr + rows)
        taken = tl.sum(tl.where(columns[None, :] == target[:, None], z, 0.0), 1)
        tl.store(out_ptr + rows, taken, mask=(target >= at * W) & (target < at * W + W))


@triton.jit
def one(hidden, head, stats_ptr, target_ptr, zy_ptr, strength_ptr, out_ptr, M, N, K, T, PEAKS: tl.constexpr,
        PROGRAMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
        HALVES: tl.constexpr):  # fmt: skip
    """stats [3, T, M]; out: peaks [M / BM, N], or the targets' logits [M]."""
    nm, nn, nk = tl.cdiv(M, BM), tl.cdiv(N, BN), tl.cdiv(K, BK)
    for tile in tl.range(tl.program_id(0), nm * nn, PROGRAMS, flatten=True):
        pm, pn = _place(tile, nm, nn, GROUP)
        z = tl.zeros((BM, BN), tl.float32)
        for k in range(nk):
            z = tl.dot(hidden.load([pm * BM, k * BK]), head.load([pn * BN, k * BK]).T, z)
        rows = pm * BM + tl.arange(0, BM)
        if HALVES:
            left, right = z.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
            _keep(left, pm, rows, pn * 2, stats_ptr, target_ptr, zy_ptr, strength_ptr, out_ptr, M, N, T, BN // 2, PEAKS)
            _keep(right, pm, rows, pn * 2 + 1, stats_ptr, target_ptr, zy_ptr, strength_ptr, out_ptr, M, N, T, BN // 2,
                  PEAKS)  # fmt: skip
        else:
            _keep(z, pm, rows, pn, stats_ptr, target_ptr, zy_ptr, strength_ptr, out_ptr, M, N, T, BN, PEAKS)


@triton.jit
def _excess(x):
    """e^x - 1 - x."""
    series = x * x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720)))))
    return tl.where(tl.abs(x) < 0.25, series, tl.exp2(x * LOG2E) - 1.0 - x)


@triton.jit
def _exps(z, inside):
    top = tl.max(tl.where(inside[None, :], z, float("-inf")), 1)
    return top, tl.where(inside[None, :], tl.exp2((z - top[:, None]) * LOG2E), 0.0)


@triton.jit
def two(student, teacher, head, guess_ptr, stats_ptr, M, N, K, T, PROGRAMS: tl.constexpr, BM: tl.constexpr,
        BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, HALVES: tl.constexpr):  # fmt: skip
    """stats [5, T, M]: max and sum of the student, max and sum of the teacher, the KL's sum by the teacher's max."""
    tl.static_assert(not HALVES)
    nm, nn, nk = tl.cdiv(M, BM), tl.cdiv(N, BN), tl.cdiv(K, BK)
    for tile in tl.range(tl.program_id(0), nm * nn, PROGRAMS, flatten=True):
        pm, pn = _place(tile, nm, nn, GROUP)
        z_s, z_t = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
        for k in range(nk):
            w = head.load([pn * BN, k * BK]).T
            z_s = tl.dot(student.load([pm * BM, k * BK]), w, z_s)
            z_t = tl.dot(teacher.load([pm * BM, k * BK]), w, z_t)
        rows = pm * BM + tl.arange(0, BM)
        inside = (pn * BN + tl.arange(0, BN)) < N
        top_s, exp_s = _exps(z_s, inside)
        top_t, exp_t = _exps(z_t, inside)
        base = stats_ptr + pn * M + rows
        tl.store(base, top_s)
        tl.store(base + T * M, tl.sum(exp_s, 1))
        tl.store(base + 2 * T * M, top_t)
        tl.store(base + 3 * T * M, tl.sum(exp_t, 1))
        tl.store(base + 4 * T * M, tl.sum(exp_t * _excess(z_s - z_t - tl.load(guess_ptr + rows)[:, None]), 1))


ONE = [Tiles(128, 256, GROUP=group, HALVES=halves, num_stages=3 + halves) for halves in (False, True)
       for group in (8, 16)]  # fmt: skip
TWO = [Tiles(128, 128), Tiles(128, 128, num_stages=4), Tiles(128, 128, GROUP=16, num_stages=4), Tiles(64, 256)]
SMALL = Tiles(16, 32, 32, GROUP=2)


def measured(
    shape: Shape, device: str, seconds: float, one_rows: tuple[int, ...], two_rows: int, tried: tuple[list, list]
) -> Iterator[dict[str, Any]]:
    """Every tiling of `one` at each number of rows, without and with peaks, after cuBLAS; then those of `two`."""
    dtype, most = torch.bfloat16 if device == "cuda" else torch.float32, max(*one_rows, two_rows)
    made = states.spread(1, most, shape.hidden, shape.vocab, ratio=0.1, dtype=dtype, device=device)
    student, teacher, head = made.distill_hidden, made.teacher_hidden, made.head
    product = 2 * head.numel()
    for rows in one_rows:
        part = student[:rows]
        yield {"kernel": "torch", "rows": rows, **timed(lambda h=part: logits(h, head), rows * product, seconds)}
        for peaks, tiles in itertools.product((False, True), tried[0]):
            found = checked(one_case(part, head, tiles, peaks), rows * product, seconds)
            yield {"kernel": "one", "rows": rows, "peaks": peaks, **asdict(tiles), **found}
    for tiles in tried[1]:
        case = two_case(student[:two_rows], teacher[:two_rows], head, tiles)
        found = checked(case, 2 * two_rows * product, seconds)
        yield {"kernel": "two", "rows": two_rows, **asdict(tiles), **found}


def timed(call: Callable[[], Any], flop: int, seconds: float) -> dict[str, float]:
    took = median_s(call, seconds)
    return {"ms": took * 1e3, "tflops": flop / took / 1e12}


def checked(case: Case, flop: int, seconds: float) -> dict[str, Any]:
    """Errors after one launch, registers and spills where it was compiled, times."""
    call, errors = case
    kernel = call()
    use = {} if sizes.interpreting() else {"registers": kernel.n_regs, "spills": kernel.n_spills}
    return {"errors": errors(), **use, **timed(call, flop, seconds)}


def launched(kernel: Any, sides: tuple[Tensor, ...], head: Tensor, tiles: Tiles, *rest: Any, **flags: Any) -> Any:
    """The kernel on sides [M, K] and head [N, K]; TMA descriptors are made here."""
    (rows, width), vocab = sides[0].shape, len(head)
    assert rows % tiles.BM == 0
    blocks = [(side, tiles.BM) for side in sides] + [(head, tiles.BN)]
    found = [TensorDescriptor(x, list(x.shape), list(x.stride()), [size, tiles.BK]) for x, size in blocks]
    count = torch.cuda.get_device_properties(head.device).multi_processor_count if head.is_cuda else 4
    grid = (min(count, triton.cdiv(rows, tiles.BM) * triton.cdiv(vocab, tiles.BN)),)
    return kernel[grid](*found, *rest, rows, vocab, width, column_tiles(vocab, tiles), PROGRAMS=count, **flags,
                        **asdict(tiles))  # fmt: skip


def column_tiles(vocab: int, tiles: Tiles) -> int:
    return triton.cdiv(vocab, tiles.BN) * (1 + tiles.HALVES)


def folded(tops: Tensor, sums: Tensor) -> Tensor:
    """sum over tiles of e^(top - largest top) sums, fp64."""
    return ((tops.double() - tops.double().amax(0)).exp() * sums.double()).sum(0)


def normaliser(tops: Tensor, sums: Tensor) -> Tensor:
    return tops.double().amax(0) + folded(tops, sums).log()


def largest(difference: Tensor) -> float:
    return float(difference.abs().max())


def one_case(hidden: Tensor, head: Tensor, tiles: Tiles, peaks: bool) -> Case:
    rows, vocab = len(hidden), len(head)
    stats = head.new_zeros(3, column_tiles(vocab, tiles), rows, dtype=torch.float32)
    target = torch.randint(vocab, (rows,), device=head.device, dtype=torch.int32)
    zy = (hidden.float() * head[target.long()].float()).sum(1)
    strength = torch.randn_like(zy)
    out = zy.new_zeros(rows // tiles.BM, vocab) if peaks else torch.zeros_like(zy)

    def errors() -> dict[str, float]:
        last = slice(-tiles.BM, None)
        z = hidden[last].double() @ head.double().t()
        tops, sums, weighted = stats[..., last].double()
        shifted = weighted + sums * (tops - tops.amax(0)).clamp(min=-1e30)  # -inf: a half without columns
        below = z - z.amax(1, keepdim=True)
        mean = (below.softmax(1) * below).sum(1)
        found = {"lse": largest(normaliser(tops, sums) - z.logsumexp(1))}
        found["mean"] = largest(folded(tops, shifted) / folded(tops, sums) - mean)
        if peaks:
            return {**found, "peaks": largest(out[-1] - (z + (strength - zy)[last, None]).amax(0))}
        return {**found, "target": largest(out[last] - z.gather(1, target[last].long()[:, None])[:, 0])}

    return lambda: launched(one, (hidden,), head, tiles, stats, target, zy, strength, out, PEAKS=peaks), errors


def two_case(student: Tensor, teacher: Tensor, head: Tensor, tiles: Tiles) -> Case:
    """The guess is the true difference of the normalisers, rounded to bfloat16."""
    stats = head.new_zeros(5, column_tiles(len(head), tiles), len(student), dtype=torch.float32)
    parts = [[logits(x, head).logsumexp(1) for x in side.split(512)] for side in (student, teacher)]
    guess = (torch.cat(parts[0]) - torch.cat(parts[1])).bfloat16().float()

    def errors() -> dict[str, float]:
        last = slice(-min(CHECKED_ROWS, len(student)), None)
        top_s, sum_s, top_t, sum_t, terms = stats[..., last]
        x = normaliser(top_s, sum_s) - normaliser(top_t, sum_t) - guess[last].double()
        kl = folded(top_t, terms) / folded(top_t, sum_t) - (x.exp() - 1 - x)
        exact = two_pass(*(side[last].double() @ head.double().t() for side in (student, teacher)))
        theirs = two_pass(*(logits(side[last], head).double() for side in (student, teacher)))
        found = {"kl": kl - exact, "kl_relative": (kl - exact) / exact, "kl_of_products": theirs - exact}
        return {name: largest(gap) for name, gap in (found | {"kl_two_pass": kl - theirs, "largest_kl": exact}).items()}

    return lambda: launched(two, (student, teacher), head, tiles, guess, stats), errors


def logits(hidden: Tensor, head: Tensor) -> Tensor:
    return widening(hidden, head.t(), head.new_empty(len(hidden), len(head), dtype=torch.float32))


def two_pass(student: Tensor, teacher: Tensor) -> Tensor:
    logp, logp_teacher = student.log_softmax(1), teacher.log_softmax(1)
    return (logp_teacher.exp() * (logp_teacher - logp)).sum(1)


def main() -> int:
    parser = argparse.ArgumentParser(description="Products with the head that leave statistics and no logits.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen2.5-7b")
    parser.add_argument("--seconds", type=float, default=0.1, help="per measurement, at least 5 calls")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    small = options.device == "cpu"
    if not (sizes.interpreting() if small else torch.cuda.is_available()):
        print("error: benchmarks.product_statistics needs a GPU, or --device cpu and TRITON_INTERPRET=1.",
              file=sys.stderr)  # fmt: skip
        return 2
    measure.require_own_kernels()
    common = {
        "what": "statistics",
        "shape": options.shape,
        **measure.origin(options.device, "benchmarks.product_statistics"),
    }
    tries: Any = ((16,), 16, ([SMALL], [SMALL])) if small else ((2048, 8192), 1024, (ONE, TWO))
    for row in measured(SHAPES[options.shape], options.device, options.seconds, *tries):
        print(row, flush=True)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, **common}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
