"""What this GPU can do at best: matrix products with bf16 and with float32 output, and copies.

    python -m benchmarks.ceilings --out FILE.jsonl [--seconds 1.0]
    python -m benchmarks.ceilings --out FILE.jsonl --device cpu          the same code, small: does it run?

Rows: `product` per head shape and output dtype in TFLOP/s (median over rounds; 2 N H V operations at N = 8192), `copy`
in TB/s (bytes read plus bytes written of a 1 GiB tensor). The kernel benchmarks quote percentages of these.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.ops import SHAPES

ROWS = 8192
BLOCK = 1024
HEADS = ("qwen2.5-7b", "qwen2.5-1.5b", "llama-8b")
COPY_ELEMENTS = 1 << 28


def median_s(run: Callable[[], object], seconds: float) -> float:
    """Median seconds of one call, by CUDA events where there are any, over at least 5 calls and about `seconds`."""
    if not torch.cuda.is_available():
        return statistics.median(timeit.repeat(run, number=1, repeat=5))
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    times, end = [], time.monotonic() + seconds
    while len(times) < 5 or time.monotonic() < end:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


def products(device: str, seconds: float) -> Iterator[dict[str, Any]]:
    for name in HEADS if device == "cuda" else ("tiny",):
        shape = SHAPES[name]
        hidden = torch.randn(ROWS, shape.hidden, device=device, dtype=torch.bfloat16)
        head = torch.randn(shape.vocab, shape.hidden, device=device, dtype=torch.bfloat16)
        # The CPU has no widening product.
        for out in (torch.bfloat16, torch.float32) if device == "cuda" else (torch.bfloat16,):
            logits = torch.empty(BLOCK, shape.vocab, device=device, dtype=out)

            def run(hidden=hidden, head=head, logits=logits, out=out) -> None:
                for part in hidden.split(BLOCK):
                    if out == torch.float32:
                        torch.mm(part, head.t(), out_dtype=torch.float32, out=logits)
                    else:
                        torch.mm(part, head.t(), out=logits)

            took = median_s(run, seconds)
            flop = 2 * ROWS * shape.hidden * shape.vocab
            yield {"what": "product", "shape": name, "out": str(out), "ms": took * 1e3, "tflops": flop / took / 1e12}


def copies(device: str, seconds: float) -> Iterator[dict[str, Any]]:
    source = torch.empty(COPY_ELEMENTS if device == "cuda" else 1 << 20, device=device).normal_()
    target = torch.empty_like(source)
    took = median_s(lambda: target.copy_(source), seconds)
    yield {"what": "copy", "ms": took * 1e3, "tb_per_s": 2 * source.nbytes / took / 1e12}


def main() -> int:
    parser = argparse.ArgumentParser(description="Ceilings of this GPU.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1.0, help="per measurement")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: benchmarks.ceilings needs a GPU that torch can see; there is none.", file=sys.stderr)
        return 2
    common = measure.origin(options.device, "benchmarks.ceilings")
    for part in (products, copies):
        for row in part(options.device, options.seconds):
            print(row, flush=True)
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**row, **common}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
