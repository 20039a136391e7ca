"""Times the tiles of every Triton row kernel on this GPU and prints the best as a table for `sizes.TUNED_BLOCKS`.

    python -m benchmarks.tune_blocks --out FILE.jsonl [--shape qwen2.5-7b] [--rows 1024] [--seconds 75]
    TRITON_INTERPRET=1 python -m benchmarks.tune_blocks --out FILE.jsonl --device cpu --shape tiny --rows 8   small

One chunk of calibrated states as a training step has it; each kernel alone, by `triton.testing.do_bench` (median),
every candidate beside the default, kernels in turn, so that a cut run has tried some of each. Rows hold ms and the
bytes per second that a single pass over the products makes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from sgpo_kernels import backend_triton, sizes
from sgpo_kernels.backend import VALUE_ROWS, Logits
from sgpo_kernels.inputs import ClipRange, KlLimit
from sgpo_kernels.sizes import Blocks

from benchmarks import measure, states
from benchmarks.ops import SHAPES

# "peaks" follows the columns of "scan": both are searched on the columns that scan prefers.
TILES = {
    "scan": ((1, 1024), (2, 1024), (4, 1024), (1, 2048), (2, 2048), (8, 512)),
    "divergence": ((1, 1024), (2, 1024), (4, 512), (1, 2048)),
    "peaks": ((2, 1024), (4, 1024), (8, 1024)),
    "gradient": ((1, 1024), (2, 1024), (4, 1024), (1, 2048), (8, 512)),
    "columns": ((4, 128), (8, 128), (16, 128), (16, 64), (4, 256)),
}
CANDIDATES = {kernel: [Blocks(r, c, warps) for r, c in tiles for warps in (4, 8)] for kernel, tiles in TILES.items()}


class Chunk:
    """The logits and tables of one chunk of policy rows and one of distillation rows."""

    def __init__(self, shape: str, rows: int, device: str):
        found = SHAPES[shape]
        self.states = states.make(
            "calibrated", found.hidden, found.vocab, rows, rows, dtype=torch.bfloat16, device=device, seed=0
        )
        head = self.states.head.t()

        def logits(hidden: torch.Tensor) -> Logits:
            if device == "cpu":  # which has no widening product
                return Logits(hidden.float() @ head.float(), None, None, None, {})
            return Logits(torch.mm(hidden, head, out_dtype=torch.float32), None, None, None, {})

        self.policy = logits(self.states.policy_hidden)
        self.student, self.teacher = logits(self.states.distill_hidden), logits(self.states.teacher_hidden)
        self.targets = self.states.policy_targets
        self.rows = torch.arange(rows, device=device)
        self.one = torch.ones(rows, device=device)
        self.out = torch.empty(rows, found.vocab, device=device, dtype=torch.bfloat16)
        self.values = torch.zeros(VALUE_ROWS, rows, device=device)
        self.table = self.policy_row_values()
        self.pair = self.pair_row_values()
        self.threshold = torch.full((), 2.0**-12, device=device)
        self.live, _ = backend_triton.live_columns(
            "score", self.policy, None, self.table, self.targets, self.threshold, all_peaks=False
        )

    def policy_row_values(self) -> torch.Tensor:
        parts = backend_triton.scan(self.policy, self.targets).unsqueeze(0)
        clip_range = ClipRange(0.2, 0.28, None)
        return backend_triton.policy_row_values(
            parts, 0, self.targets, None, self.one, self.one, clip_range, self.rows, self.one, self.values
        )

    def pair_row_values(self) -> torch.Tensor:
        both = torch.cat([backend_triton.scan(side, None) for side in (self.student, self.teacher)]).unsqueeze(0)
        table = backend_triton.pair_row_values(both, 0, self.rows, self.values)
        sums = backend_triton.divergence_sums("forward_kl", self.student, self.teacher, table)
        kl_limit = KlLimit("forward_kl", 1.0, "mask")
        backend_triton.divergence_row_values(sums, self.one, kl_limit, self.rows, self.one, self.values, table)
        return table

    def calls(self) -> dict[str, tuple[Callable[[], Any], int]]:
        """(call, passes over [C, V] float32) per kernel."""
        score = ("score", self.policy, None, self.table, self.targets)
        pair = ("forward_kl", self.student, self.teacher, self.pair, None)
        return {
            "scan": (lambda: backend_triton.scan(self.policy, self.targets), 1),
            "divergence": (lambda: backend_triton.divergence_sums(*pair[:4]), 2),
            "peaks": (lambda: backend_triton.live_columns(*score, self.threshold, all_peaks=False), 1),
            "gradient": (lambda: backend_triton.gradient(*pair, self.out), 2),
            "columns": (lambda: backend_triton.gradient_columns(*score, self.live, torch.bfloat16), 0),
        }


def candidates() -> Iterator[tuple[str, Blocks]]:
    """The default of every kernel, then its candidates, one of each kernel in turn."""
    tried = [dict.fromkeys([sizes.DEFAULT_BLOCKS[kernel], *blocks]) for kernel, blocks in CANDIDATES.items()]
    for turn in itertools.zip_longest(*tried):
        yield from ((kernel, block) for kernel, block in zip(CANDIDATES, turn, strict=True) if block is not None)


def tune(chunk: Chunk, seconds: float) -> Iterator[dict[str, Any]]:
    """A row per kernel and candidate; after `seconds` no new candidate is begun."""
    end, calls = time.monotonic() + seconds, chunk.calls()
    sizes.TUNED_BLOCKS.clear()  # they would hide the candidates
    for kernel, block in candidates():
        if time.monotonic() > end:
            print(f"# {seconds:.0f} s are over: the remaining candidates are not tried", flush=True)
            return
        call, passes = calls[kernel]
        default = sizes.DEFAULT_BLOCKS[kernel]
        sizes.DEFAULT_BLOCKS[kernel] = block
        try:
            if kernel in ("scan", "peaks"):  # peaks reads the tile maxima that scan left
                chunk.policy_row_values()
            ms = median_ms(call, chunk.one.device.type)
        finally:  # the columns of scan decide where peaks may skip: the default stays for the other kernels
            sizes.DEFAULT_BLOCKS[kernel] = default
            if kernel == "scan":
                chunk.policy_row_values()
        bytes_read = passes * chunk.policy.products_CV.nbytes
        yield {
            "kernel": kernel,
            "block": block,
            "default": block == default,
            "ms": ms,
            "tb_per_s": bytes_read / ms / 1e9,
        }


def median_ms(call: Callable[[], Any], device: str) -> float:
    if device == "cpu":
        return 1e3 * timeit.timeit(call, number=1)
    import triton

    ms: Any = triton.testing.do_bench(call, warmup=10, rep=50, return_mode="median")
    return ms


def table(rows: list[dict[str, Any]], device: str) -> str:
    """The fastest of each kernel as an entry of `sizes.TUNED_BLOCKS`, beside the default's time."""
    arch = torch.cuda.get_device_capability() if device == "cuda" else None
    lines = [f"{arch}: {{"]
    for kernel in CANDIDATES:
        found = [row for row in rows if row["kernel"] == kernel]
        if not found:
            continue
        best = min(found, key=lambda row: row["ms"])
        of_default = "".join(f", default {row['ms']:.3f} ms" for row in found if row["default"])
        lines.append(
            f'    "{kernel}": {best["block"]},  # {best["ms"]:.3f} ms, {best["tb_per_s"]:.2f} TB/s{of_default}, '
            f"{len(found)} tried"
        )
    return "\n".join([*lines, "}"])


def main() -> int:
    parser = argparse.ArgumentParser(description="Choose the tiles of the row kernels for this GPU.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen2.5-7b")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=75.0, help="no new candidate is begun after so long")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: benchmarks.tune_blocks needs a GPU that torch can see; there is none.", file=sys.stderr)
        return 2
    if options.device == "cpu" and not sizes.interpreting():
        print(
            "error: benchmarks.tune_blocks --device cpu needs TRITON_INTERPRET=1 in the environment.", file=sys.stderr
        )
        return 2
    common = {"shape": options.shape, "rows": options.rows, **measure.origin(options.device, "benchmarks.tune_blocks")}
    rows: list[dict[str, Any]] = []
    print(f"# {common['device_name']}, {options.shape}, {options.rows} rows", flush=True)
    try:
        for row in tune(Chunk(options.shape, options.rows, options.device), options.seconds):
            rows.append(row)
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"what": "blocks", **row, **common}) + "\n")
    finally:
        print(table(rows, options.device), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
