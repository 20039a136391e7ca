"""What this GPU can do at best: matrix products with bf16 and with float32 output, and copies.

    python -m benchmarks.ceilings --out FILE.jsonl [--seconds 1.0]

Rows: `product` per head shape and output dtype in TFLOP/s (median over rounds; 2 N H V operations at N = 8192), `copy`
in TB/s (bytes read plus bytes written of a 1 GiB tensor). The kernel benchmarks quote percentages of these.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.ops import SHAPES

ROWS = 8192
BLOCK = 1024


def median_s(run: Callable[[], object], seconds: float) -> float:
    """Median seconds of one call, by CUDA events, over at least 5 calls and about `seconds`."""
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


def products(seconds: float) -> list[dict[str, Any]]:
    rows = []
    for name in ("qwen2.5-7b", "qwen2.5-1.5b", "llama-8b"):
        shape = SHAPES[name]
        hidden = torch.randn(ROWS, shape.hidden, device="cuda", dtype=torch.bfloat16)
        head = torch.randn(shape.vocab, shape.hidden, device="cuda", dtype=torch.bfloat16)
        for out in (torch.bfloat16, torch.float32):
            logits = torch.empty(BLOCK, shape.vocab, device="cuda", dtype=out)

            def run(hidden=hidden, head=head, logits=logits, out=out) -> None:
                for part in hidden.split(BLOCK):
                    if out == torch.float32:
                        torch.mm(part, head.t(), out_dtype=torch.float32, out=logits)
                    else:
                        torch.mm(part, head.t(), out=logits)

            took = median_s(run, seconds)
            flop = 2 * ROWS * shape.hidden * shape.vocab
            rows.append(
                {"what": "product", "shape": name, "out": str(out), "ms": took * 1e3, "tflops": flop / took / 1e12}
            )
    return rows


def copies(seconds: float) -> list[dict[str, Any]]:
    source = torch.empty(1 << 28, device="cuda", dtype=torch.float32).normal_()
    target = torch.empty_like(source)
    took = median_s(lambda: target.copy_(source), seconds)
    return [{"what": "copy", "ms": took * 1e3, "tb_per_s": 2 * source.nbytes / took / 1e12}]


def main() -> int:
    parser = argparse.ArgumentParser(description="Ceilings of this GPU.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1.0, help="per measurement")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: benchmarks.ceilings needs a GPU that torch can see; there is none.", file=sys.stderr)
        return 2
    common = measure.origin("cuda")
    for part in (products, copies):
        with options.out.open("a", encoding="utf-8") as file:
            for row in part(options.seconds):
                print(row, flush=True)
                file.write(json.dumps({**row, **common}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
