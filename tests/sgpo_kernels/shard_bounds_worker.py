"""One rank of `test_shard_bounds`: confident states on this rank's piece of the head.

python shard_bounds_worker.py FOLDER IMPL
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sgpo_kernels import sizes

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import conftest
import test_properties as properties
from processes import PATIENCE_S

VOCAB = 240
CUTS = {1: (0, VOCAB), 2: (0, 101, VOCAB), 3: (0, 7, 130, VOCAB)}
DTYPES = {"float64": torch.float64, "float32": torch.float32}
KINDS = ("policy", "forward_kl", "reverse_kl", "js")
# (kind, dtype, seed of the states, column tolerance, rows per chunk); seed 0 has no bias and no soft-cap, 13 has both.
LIVE = [
    (kind, dtype, seed, tolerance, chunk)
    for kind in KINDS
    for dtype in DTYPES
    for seed, tolerance, chunk in ((0, 0.0, 9), (13, 0.0, 60), (0, 2.0**-5, 60), (13, 2.0**-7, 9), (16, 2.0**-8, 60))
]


def cases(impl: str) -> list[tuple[str, str, int, float, int]]:
    """Triton does not take float64."""
    return [case for case in LIVE if impl != "triton" or case[1] == "float32"]


def cut_states(states: properties.States, start: int, end: int) -> properties.States:
    bias = None if states.bias is None else states.bias[start:end]
    return replace(states, head=states.head[start:end], bias=bias)


def live_results(options: dict[str, Any], start: int, end: int) -> dict[str, Any]:
    found = {}
    for case in cases(options["impl"]):
        kind, dtype, seed, tolerance, chunk = case
        states = cut_states(properties.confident(kind, seed, DTYPES[dtype]), start, end)
        loss, stats, grads = states.run(**options, column_tolerance=tolerance, chunk_rows=chunk)
        found[case] = loss, stats._asdict(), grads
    return found


def op_results(options: dict[str, Any], cuts: tuple[int, int] | None) -> dict[str, dict[str, torch.Tensor]]:
    """Ops of 37 columns: targets on the last piece only, a teacher head of its own, a gradient buffer."""
    found = {}
    start, end = (0, 37) if cuts is None else cuts
    dtype = torch.float32 if options["impl"] == "triton" else torch.float64
    for op in ("logprob", "policy_on", "sgpo"):
        case = conftest.build(op, dtype, dead=0.1)
        name = "policy_targets" if op == "sgpo" else "targets"
        case.fixed[name] = 34 + case.fixed[name] % 3
        case.fixed.pop("old_logprobs", None)
        case.leaves |= {leaf: case.leaves[leaf][start:end] for leaf in ("head", "bias")}
        found[f"last-{op}"] = case.results(**options)
    for op in KINDS[1:]:
        case = conftest.build(op, dtype, dead=0.1)
        gen = torch.Generator().manual_seed(5)
        case.fixed["teacher_hidden"] = torch.randn(24, 11, generator=gen, dtype=torch.float64).to(dtype)
        case.fixed["teacher_head"] = torch.randn(37, 11, generator=gen, dtype=torch.float64)[start:end].to(dtype)
        case.fixed["teacher_bias"] = torch.randn(37, generator=gen, dtype=torch.float64)[start:end].to(dtype)
        case.leaves |= {leaf: case.leaves[leaf][start:end] for leaf in ("head", "bias")}
        found[f"teacher-{op}"] = case.results(**options, over_limit="scale")
        case.frozen = {"hidden"}
        buffer = torch.ones(end - start, 8, dtype=dtype)
        found[f"buffer-{op}"] = {**case.results(**options, head_grad=buffer), "grad.head": buffer}
    return found


def main() -> None:
    folder, impl = Path(sys.argv[1]), sys.argv[2]
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE_S))
    start, end = CUTS[ranks][rank : rank + 2]
    # Two tiles per piece, and few of them for Triton's interpreter.
    small_tiles = {name: block._replace(rows=16, columns=64) for name, block in sizes.DEFAULT_BLOCKS.items()}
    sizes.DEFAULT_BLOCKS.update(small_tiles)
    options = {"impl": impl, "vocab_group": dist.group.WORLD, "vocab_start": start}
    live = live_results(options, start, end)
    # Rows per chunk that follow from each rank's own number of columns, as at a real vocabulary.
    sizes.CPU_CHUNK_BYTES = 800
    small = {2: (0, 27, 37), 3: (0, 30, 34, 37)}[ranks][rank : rank + 2]
    ops = op_results({**options, "vocab_start": small[0]}, small)
    torch.save((live, ops), folder / f"{ranks}-{rank}.pt")
    dist.destroy_process_group()
    time.sleep(0.2)  # gloo's thread lets go of the last collective, which needs the interpreter


if __name__ == "__main__":
    main()
