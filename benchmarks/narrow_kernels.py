"""A narrow product with the head, and the exact logits of the entries near each row's maximum: three Triton kernels.

    python -m benchmarks.narrow_kernels [--arch 90]      compiles them without a GPU; registers, spills, shared memory

What: `product` multiplies fp8 operands with a scale per row of each, accumulates in float32, writes the logits
  (bfloat16) and each row's maximum per column tile. `choose` walks the narrow logits: first it counts
  the entries within `distance` nats of the row's maximum and sums e^z of the others, then it writes down their columns,
  in order. `exact_rows` takes one row per program: float32 products of the bfloat16 states with its gathered head rows,
  their sum of e^z, and the band's: the sums, exact and narrow, over entries less than BAND nats above the tail.
  `summed` adds it up: near entries exact, the tail times the band's exact over its narrow sum (pooled over the rows
  where fewer than FEW entries are in the band).
Equation: see `benchmarks.narrow_logits`, correction `band`; `reference` is the same in plain torch.
Limits: not part of the loss, not run on a GPU. The list of entries has a capacity; a fuller one raises, which waits
  for the host. Rows with many near entries are one program's work: `benchmarks.narrow_logits` says how many there are.
"""

# Triton reads the kernels, Python does not: the rules of its types do not hold.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from sgpo_kernels import machine_code, sizes
from sgpo_kernels.aot import SHARED_LIMIT
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.product_statistics import _place

LOG2E = tl.constexpr(1.4426950408889634)
BAND, FEW = 2.0, 32


class Tiles(NamedTuple):
    """BM x BN products in steps of BK (twice as wide ones spill), GROUP row tiles share a column tile; BE entries at a
    time, BH of their width; BC columns to choose from."""

    BM: int = 128
    BN: int = 128
    BK: int = 128
    GROUP: int = 8
    BE: int = 16
    BH: int = 256
    BC: int = 2048


LARGE, SMALL = Tiles(), Tiles(16, 32, 32, 2, 4, 32, 64)


@triton.jit
def product(hidden, head, row_scale_ptr, column_scale_ptr, z_ptr, top_ptr, M, N, K, PROGRAMS: tl.constexpr,
            BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """z [M, N] and top [N tiles, M] of hidden [M, K] and head [N, K]."""
    nm, nn, nk = tl.cdiv(M, BM), tl.cdiv(N, BN), tl.cdiv(K, BK)
    for tile in tl.range(tl.program_id(0), nm * nn, PROGRAMS, flatten=True):
        pm, pn = _place(tile, nm, nn, GROUP)
        z = tl.zeros((BM, BN), tl.float32)
        for k in range(nk):
            h, w = hidden.load([pm * BM, k * BK]), head.load([pn * BN, k * BK]).T
            # The tensor cores' own sums of fp8 products are short of bits: each step's is added up in registers.
            z = tl.dot(h, w, z, max_num_imprecise_acc=BK)
        rows, columns = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN)
        inside = columns < N
        z = z * tl.load(row_scale_ptr + rows)[:, None]
        z = z * tl.load(column_scale_ptr + columns, mask=inside, other=0.0)[None, :]
        z = z.to(z_ptr.dtype.element_ty)
        tl.store(z_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :], z, mask=inside[None, :])
        tl.store(top_ptr + pn * M + rows, tl.max(tl.where(inside[None, :], z.to(tl.float32), float("-inf")), 1))


@triton.jit
def choose(z_ptr, top_ptr, target_ptr, count_ptr, tail_ptr, place_ptr, column_ptr, distance, M, N,
           WRITE: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Per row and column tile: count [M, T] and the tail's sum of e^(z - top) [M, T]; with WRITE the columns from
    place [M, T] on. The target counts as near."""
    row, tile, tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    columns = tile * BN + tl.arange(0, BN)
    inside = columns < N
    z = tl.load(z_ptr + row.to(tl.int64) * N + columns, mask=inside, other=float("-inf")).to(tl.float32)
    below = tl.load(top_ptr + row) - z
    near = ((below < distance) | (columns == tl.load(target_ptr + row))) & inside
    if WRITE:
        slot = tl.load(place_ptr + row * tiles + tile) + tl.cumsum(near.to(tl.int32), 0) - 1
        tl.store(column_ptr + slot, columns, mask=near)
    else:
        tl.store(count_ptr + row * tiles + tile, tl.sum(near.to(tl.int32), 0))
        tl.store(tail_ptr + row * tiles + tile, tl.sum(tl.where(near, 0.0, tl.exp2(-below * LOG2E)), 0))


@triton.jit
def exact_rows(hidden_ptr, head_ptr, z_ptr, top_ptr, target_ptr, first_ptr, column_ptr, out_ptr, distance, band, M, N,
               K, BE: tl.constexpr, BH: tl.constexpr):  # fmt: skip
    """out [5, M]: sum of e^(z - top) of the near entries; the band's exact sum, narrow sum, count; the target's z."""
    row = tl.program_id(0)
    top, target = tl.load(top_ptr + row), tl.load(target_ptr + row)
    first, end = tl.load(first_ptr + row), tl.load(first_ptr + row + 1)
    total, exact, narrow = tl.zeros((BE,), tl.float32), tl.zeros((BE,), tl.float32), tl.zeros((BE,), tl.float32)
    count, taken = tl.zeros((BE,), tl.float32), tl.zeros((BE,), tl.float32)
    for start in range(first, end, BE):
        places = start + tl.arange(0, BE)
        live = places < end
        columns = tl.load(column_ptr + places, mask=live, other=0).to(tl.int64)
        parts = tl.zeros((BE, BH), tl.float32)
        for k in range(0, K, BH):
            at = k + tl.arange(0, BH)
            h = tl.load(hidden_ptr + row.to(tl.int64) * K + at, mask=at < K, other=0.0).to(tl.float32)
            mask = live[:, None] & (at < K)[None, :]
            w = tl.load(head_ptr + columns[:, None] * K + at[None, :], mask=mask, other=0.0).to(tl.float32)
            parts += w * h[None, :]
        z = tl.sum(parts, 1)
        e = tl.where(live, tl.exp2((z - top) * LOG2E), 0.0)
        rough = tl.load(z_ptr + row.to(tl.int64) * N + columns, mask=live, other=0.0).to(tl.float32)
        inside = live & (top - rough >= distance - band) & (columns != target)
        total += e
        exact += tl.where(inside, e, 0.0)
        narrow += tl.where(inside, tl.exp2((rough - top) * LOG2E), 0.0)
        count += inside.to(tl.float32)
        taken += tl.where(live & (columns == target), z, 0.0)
    tl.store(out_ptr + row, tl.sum(total, 0))
    tl.store(out_ptr + M + row, tl.sum(exact, 0))
    tl.store(out_ptr + 2 * M + row, tl.sum(narrow, 0))
    tl.store(out_ptr + 3 * M + row, tl.sum(count, 0))
    tl.store(out_ptr + 4 * M + row, tl.sum(taken, 0))


class Scaled(NamedTuple):
    """x = values times scale, a scale per row; values in fp8, on the interpreter the same numbers in float32."""

    values: Tensor
    scale: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Scaled:
        scale = x.float().abs().amax(1).clamp(min=1e-30) / 448.0
        values = (x.float() / scale.unsqueeze(1)).to(torch.float8_e4m3fn)
        return cls(values.float() if sizes.interpreting() else values, scale)


class RowValues(NamedTuple):
    """[M] each: log-probability of the target, the tail's share of the sum, near entries."""

    logprob: Tensor
    tail: Tensor
    near: Tensor


def log_probs(
    hidden: Tensor, head: Tensor, narrow_head: Scaled, target: Tensor, *, distance: float, capacity: int,
    tiles: Tiles = LARGE,
) -> RowValues:  # fmt: skip
    """The target's log-probabilities of hidden [M, K] and head [N, K], both bfloat16 (float32 on the interpreter).

    Raises ValueError where more than `capacity` entries are near.
    """
    (rows, width), vocab = hidden.shape, len(head)
    narrow, count = Scaled.of(hidden), triton.cdiv(vocab, tiles.BN)
    z = hidden.new_empty(rows, vocab)
    top = narrow.scale.new_empty(count, rows)
    sides = ((narrow.values, tiles.BM), (narrow_head.values, tiles.BN))
    sides = [TensorDescriptor(x, list(x.shape), list(x.stride()), [size, tiles.BK]) for x, size in sides]
    programs = torch.cuda.get_device_properties(head.device).multi_processor_count if head.is_cuda else 4
    product[(min(programs, triton.cdiv(rows, tiles.BM) * count),)](
        *sides, narrow.scale, narrow_head.scale, z, top, rows, vocab, width, PROGRAMS=programs,
        **_product(tiles))  # fmt: skip
    top, target, groups = top.amax(0), target.int(), triton.cdiv(vocab, tiles.BC)
    counts = target.new_zeros(rows, groups)
    tails, places, columns = torch.zeros_like(counts, dtype=torch.float32), counts, target.new_empty(capacity)

    def walk(write: bool, at: Tensor) -> None:
        choose[(rows, groups)](z, top, target, counts, tails, at, columns, distance, rows, vocab, WRITE=write,
                              BN=tiles.BC)  # fmt: skip

    walk(False, places)
    ends = counts.flatten().cumsum(0, dtype=torch.int32)
    if int(ends[-1]) > capacity:
        raise ValueError(f"{int(ends[-1])} entries are near, capacity is {capacity}: raise it or lower distance")
    walk(True, ends - counts.flatten())
    firsts = torch.cat([ends.new_zeros(1), ends.view(rows, groups)[:, -1]])
    out = top.new_empty(5, rows)
    exact_rows[(rows,)](hidden, head, z, top, target, firsts, columns, out, distance, BAND, rows, vocab, width,
                        BE=tiles.BE, BH=tiles.BH)  # fmt: skip
    return summed(*out, tails.sum(1), top, counts.sum(1))


def _product(tiles: Tiles) -> dict[str, int]:
    return {key: value for key, value in tiles._asdict().items() if key in ("BM", "BN", "BK", "GROUP")}


def summed(
    near: Tensor,
    exact: Tensor,
    narrow: Tensor,
    count: Tensor,
    taken: Tensor,
    tail: Tensor,
    top: Tensor,
    entries: Tensor,
) -> RowValues:
    """Near entries exact, the tail times the band's exact over its narrow sum."""
    pooled = torch.where(narrow.sum() > 0, exact.sum() / narrow.sum(), 1.0)
    factor = torch.where((count >= FEW) & (narrow > 0), exact / narrow, pooled)
    total = near + factor * tail
    return RowValues(taken - top - total.log(), factor * tail / total, entries)


def reference(hidden: Tensor, head: Tensor, target: Tensor, *, distance: float, rough: torch.dtype) -> RowValues:
    """The same in plain torch, products in fp64; narrow logits are rounded to `rough`."""
    sides = (Scaled.of(x) for x in (hidden, head))
    wide, other = ((x.values.double(), x.scale.double()) for x in sides)
    zn = ((wide[0] @ other[0].t()) * wide[1].unsqueeze(1) * other[1]).to(rough).double()
    z, at, top = hidden.double() @ head.double().t(), target.unsqueeze(1), zn.amax(1)
    below = top.unsqueeze(1) - zn
    near = (below < distance).scatter(1, at, True)
    band = (near & (below >= distance - BAND)).scatter(1, at, False)
    e, n = (z - top.unsqueeze(1)).exp(), (-below).exp()
    sums = ((e * near).sum(1), (e * band).sum(1), (n * band).sum(1), band.sum(1), z.gather(1, at).squeeze(1))
    return summed(*sums, (n * ~near).sum(1), top, near.sum(1))


# compiling


class Resources(NamedTuple):
    """Registers, stack bytes, spill instructions, shared bytes."""

    kernel: str
    registers: int
    stack: int
    spills: int
    shared: int


def compiled(arch: int, tiles: Tiles = LARGE) -> Iterator[Resources]:
    """Every kernel for a compute capability, without a GPU, with aligned operands."""
    operands = {
        "hidden": f"tensordesc<fp8e4nv[{tiles.BM}, {tiles.BK}]>",
        "head": f"tensordesc<fp8e4nv[{tiles.BN}, {tiles.BK}]>",
    }
    pointers = {"hidden_ptr": "*bf16", "head_ptr": "*bf16", "z_ptr": "*bf16"}
    integers = ("target_ptr", "count_ptr", "place_ptr", "column_ptr", "first_ptr")
    pointers |= dict.fromkeys(integers, "*i32")
    variants = [(product, {**_product(tiles), "PROGRAMS": 132}, 8), (exact_rows, {"BE": tiles.BE, "BH": tiles.BH}, 4)]
    variants += [(choose, {"WRITE": write, "BN": tiles.BC}, 4) for write in (False, True)]
    for kernel, options, warps in variants:
        signature: dict[str, str] = {}
        for name in kernel.arg_names:
            kind = (
                "constexpr" if name in options else operands.get(name) or ("i32" if name in ("M", "N", "K") else "fp32")
            )
            signature[name] = pointers.get(name, "*fp32") if name.endswith("_ptr") else kind
        aligned = [i for i, name in enumerate(kernel.arg_names) if name.endswith("_ptr") or name in ("N", "K")]
        attributes: Any = {(i,): [["tt.divisibility", 16]] for i in aligned}
        source = ASTSource(fn=kernel, signature=signature, constexprs=options, attrs=attributes)
        binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
        code = machine_code.read(binary.asm["cubin"])
        yield Resources(kernel.__name__, code.registers, code.stack, code.spills, binary.metadata.shared)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile the kernels of narrow logits ahead of time.")
    parser.add_argument("--arch", type=int, default=90, choices=(90, 100))
    options = parser.parse_args()
    if sizes.interpreting():
        print("error: kernels cannot be compiled with TRITON_INTERPRET=1.", file=sys.stderr)
        return 2
    rows = list(compiled(options.arch))
    print(*rows, sep="\n")
    return int(any(row.stack or row.spills or row.shared > SHARED_LIMIT[options.arch] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
