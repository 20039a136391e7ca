"""The products of the loss head one by one, as the loss uses them, and the whole loss with other chunks and slabs.

    python -m benchmarks.products --out FILE.jsonl [--shape qwen2.5-7b] [--seconds 0.1]
    python -m benchmarks.products --out FILE.jsonl --sizes               ours with other chunk and slab rows
    python -m benchmarks.products --out FILE.jsonl --device cpu --shape tiny   the same code, small: does it run?

Rows hold the median ms and, for products, TFLOP/s (2 R V H operations); for passes over memory TB/s (bytes read plus
written). `z` = h W^T [R, V], `dH` = dz W [R, H], `dW` += dz^T h [V, H]: `in place` by one addmm on float32, `beta 0`
without the addition, `blocked` with a product and an addition per block of the vocabulary. --sizes: exact and live,
`sizes.SLAB_ROWS` and `sizes.CUDA_CHUNK_ROWS` set for the call (a CPU chunks by bytes: there the second does nothing).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from sgpo_kernels import sizes
from torch import Tensor

from benchmarks import measure, ops, states
from benchmarks.ceilings import median_s
from benchmarks.peers import PEERS, Forward

Call = Callable[[], object]
FORWARD_ROWS = (512, 1024, 2048)
SLAB_ROWS = (1024, 2048, 4096)
HEAD_BLOCKS = (2304, 4608, 18432)
MEAN_BLOCKS = (128, 512, 2048)
# (slab, chunk): chunks in slabs of the default, then slabs of the default's chunks.
EXACT_SIZES = ((4096, 512), (4096, 1024), (4096, 2048), (1024, 1024), (2048, 1024), (8192, 1024))
LIVE_SIZES = EXACT_SIZES[:3]


def widening(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """left @ right into float32 `out`, operands narrow; the CPU has no such product."""
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    return out.copy_(left.float() @ right.float())


def add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total += left @ right, float32 in place."""
    if left.is_cuda:
        return torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    return total.addmm_(left.float(), right.float())


def add_blocked(total: Tensor, left: Tensor, right: Tensor, rows: int) -> None:
    """The same with a product and an addition per `rows` rows of `total`."""
    for part, block in zip(total.split(rows), left.split(rows), strict=True):
        part.add_(widening(block, right, torch.empty_like(part)))


def mean_in_blocks(weights: Tensor, head: Tensor, rows: int) -> Tensor:
    """weights @ head as a batch of products of `rows` rows each, then their sum; the rest of the head is left out."""
    whole = len(head) // rows * rows
    left, right = weights[:whole].view(-1, 1, rows), head[:whole].view(-1, rows, head.shape[1])
    if not head.is_cuda:
        return torch.bmm(left.float(), right.float()).sum((0, 1))
    return torch.bmm(left, right, out_dtype=torch.float32).sum((0, 1))


class Timer:
    """Rows of calls on one device."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def row(self, name: str, call: Call, *, flop: int = 0, moved: int = 0, **sizes: int) -> dict[str, Any]:
        """Moved: bytes read plus bytes written."""
        took = median_s(call, self.seconds)
        rate = {"tflops": flop / took / 1e12} if flop else {"tb_per_s": moved / took / 1e12}
        return {"what": "product" if flop else "pass", "name": name, **sizes, "ms": took * 1e3, **rate}


def random(rows: int, columns: int, device: str) -> Tensor:
    return torch.randn(rows, columns, device=device, dtype=torch.bfloat16)


def forward_products(head: Tensor, timer: Timer) -> Iterator[dict[str, Any]]:
    """Logits and dH, with float32 and with bfloat16 output."""
    vocab, width = head.shape
    for rows in FORWARD_ROWS:
        hidden, flop = random(rows, width, str(head.device)), 2 * rows * head.numel()
        wide, narrow = head.new_empty(rows, vocab, dtype=torch.float32), head.new_empty(rows, vocab)
        yield timer.row("z f32", lambda h=hidden, z=wide: widening(h, head.t(), z), flop=flop, rows=rows)
        yield timer.row("z bf16", lambda h=hidden, z=narrow: torch.mm(h, head.t(), out=z), flop=flop, rows=rows)
        out = torch.empty_like(hidden, dtype=torch.float32)
        yield timer.row("dH f32", lambda z=narrow, out=out: widening(z, head, out), flop=flop, rows=rows)
        yield timer.row("dH bf16", lambda z=narrow: torch.mm(z, head), flop=flop, rows=rows)


def head_products(head: Tensor, timer: Timer) -> Iterator[dict[str, Any]]:
    """dW of a slab of rows: in place, without the addition, in blocks."""
    vocab, width = head.shape
    total = torch.zeros_like(head, dtype=torch.float32)
    for rows in SLAB_ROWS:
        left, hidden = random(rows, vocab, str(head.device)).t(), random(rows, width, str(head.device))
        size = {"flop": 2 * rows * head.numel(), "rows": rows}
        yield timer.row("dW in place", lambda a=left, h=hidden: add_product(total, a, h), **size)
        yield timer.row("dW beta 0", lambda a=left, h=hidden: widening(a, h, total), **size)
        for block in HEAD_BLOCKS:
            call = lambda a=left, h=hidden, b=block: add_blocked(total, a, h, b)  # noqa: E731
            yield timer.row("dW blocked", call, block=block, **size)


def passes(head: Tensor, timer: Timer) -> Iterator[dict[str, Any]]:
    """What runs over all of [V, H] besides the products: setting to 0, rounding, scaling, the mean head row."""
    total, one = torch.zeros_like(head, dtype=torch.float32), torch.ones(1, device=head.device)
    weights = torch.rand(len(head), device=head.device).to(head.dtype)
    row = torch.empty(1, head.shape[1], device=head.device)
    both = total.nbytes + head.nbytes
    yield timer.row("zero f32", total.zero_, moved=total.nbytes)
    yield timer.row("cast f32 to bf16", lambda: total.to(head.dtype), moved=both)
    yield timer.row("scale bf16", lambda: torch.mul(head, one, out=torch.empty_like(head)), moved=2 * head.nbytes)
    yield timer.row("scale f32 to bf16", lambda: torch.mul(total, one, out=torch.empty_like(head)), moved=both)
    yield timer.row("mean head row", lambda: widening(weights[None], head, row), moved=head.nbytes)
    for block in MEAN_BLOCKS:
        call = lambda b=block: mean_in_blocks(weights, head, b)  # noqa: E731
        yield timer.row("mean head row blocked", call, moved=head.nbytes, block=block)


def byte_products(head: Tensor, timer: Timer, rows: int = 1024) -> Iterator[dict[str, Any]]:
    """Logits of fp8 and int8 operands: the rate alone, scales are 1."""
    private: Any = torch
    hidden, flop = random(rows, head.shape[1], str(head.device)), 2 * rows * head.numel()
    small, weights = (x.to(torch.float8_e4m3fn) for x in (hidden, head))
    one = torch.ones((), device=head.device)
    for name, dtype, fast in (
        ("z fp8 to bf16", torch.bfloat16, False),
        ("z fp8 to f32", torch.float32, False),
        ("z fp8 to bf16 fast accumulation", torch.bfloat16, True),
    ):
        call = lambda t=dtype, f=fast: private._scaled_mm(  # noqa: E731
            small, weights.t(), one, one, out_dtype=t, use_fast_accum=f
        )
        yield timer.row(name, call, flop=flop, rows=rows)
    integers, integer_head = ((x * 40).clamp(-127, 127).to(torch.int8) for x in (hidden, head))
    yield timer.row("z int8", lambda: private._int_mm(integers, integer_head.t()), flop=flop, rows=rows)


def products(shape: ops.Shape, device: str, seconds: float) -> Iterator[dict[str, Any]]:
    head, timer = random(shape.vocab, shape.hidden, device), Timer(seconds)
    for part in (forward_products, head_products, passes):
        yield from part(head, timer)
    if device == "cuda":
        yield from byte_products(head, timer)


def chunk_and_slab(shape: ops.Shape, device: str, seconds: float) -> Iterator[dict[str, Any]]:
    """Time and peak of the sgpo case per (slab, chunk), by ours exact and live."""
    op, mix = ops.OPS["sgpo"], ops.MIXES["sgpo"]
    rows = ops.group_rows(op, mix, shape.rows)
    made = states.make("calibrated", shape.hidden, shape.vocab, *rows, dtype=torch.bfloat16, device=device, seed=0)
    inputs = ops.build(op, mix, made, seed=0)
    ours = "ours-triton" if device == "cuda" else "ours-torch"
    for peer, tried in ((ours, EXACT_SIZES), (f"{ours}-live", LIVE_SIZES)):
        forward = PEERS[peer].forward("sgpo")
        assert forward is not None
        for slab, chunk in tried:
            yield {"what": "size", "peer": peer, **sized(forward, inputs, slab, chunk, seconds)}


def sized(forward: Forward, inputs: ops.Inputs, slab: int, chunk: int, seconds: float) -> dict[str, Any]:
    """One forward and backward with these two numbers in `sizes`, which has its own again afterwards."""
    own = sizes.SLAB_ROWS, sizes.CUDA_CHUNK_ROWS
    sizes.SLAB_ROWS, sizes.CUDA_CHUNK_ROWS = slab, chunk
    call = lambda: measure.forward_backward(forward, inputs)  # noqa: E731
    try:
        _, peak = measure.with_peak(call, inputs.head.device.type)
        return {"slab": slab, "chunk": chunk, "ms": median_s(call, seconds) * 1e3, "peak_mib": peak}
    finally:
        sizes.SLAB_ROWS, sizes.CUDA_CHUNK_ROWS = own


def main() -> int:
    parser = argparse.ArgumentParser(description="The products of the loss head, one by one.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", action="store_true", help="ours with other chunk and slab rows instead")
    parser.add_argument("--shape", choices=sorted(ops.SHAPES), default="qwen2.5-7b")
    parser.add_argument("--seconds", type=float, default=0.1, help="per measurement, at least 5 calls")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: benchmarks.products needs a GPU that torch can see; there is none.", file=sys.stderr)
        return 2
    measure.require_own_kernels()
    common = {"shape": options.shape, **measure.origin(options.device, "benchmarks.products")}
    part = chunk_and_slab if options.sizes else products
    for row in part(ops.SHAPES[options.shape], options.device, options.seconds):
        print(row, flush=True)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, **common}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
