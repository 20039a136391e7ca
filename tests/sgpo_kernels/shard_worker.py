"""One rank of `test_shards`: every op on this rank's piece of the head, results saved for comparison.

python shard_worker.py FOLDER IMPL [column_tolerance]
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
import conftest

# (name of the case, op, build arguments); pieces of 21 and 16, or 13, 13 and 11 of 37 columns.
CASES = [(f"{op}-{dtype}", op, {"dtype": dtype}) for op in conftest.OPS for dtype in (torch.float64, torch.float32)]
CASES += [
    (f"{op}-options", op, {"dtype": torch.float64, "temperature": "rows", "logit_softcap": 3.0})
    for op in ("logprob", "policy", "js")
]
CASES += [(f"{op}-rows", op, {"dtype": torch.float64, "token_weight": None}) for op in ("policy", "js")]
CUTS = {1: (0, 37), 2: (0, 21, 37), 3: (0, 13, 26, 37)}


def results(case: conftest.Case, cuts: tuple[int, int] | None, **extra) -> dict[str, torch.Tensor]:
    """As `Case.results`, on the piece of the head (and of bias and teacher) that `cuts` names."""
    if cuts is not None:
        for name in ("head", "bias"):
            case.leaves[name] = case.leaves[name][cuts[0] : cuts[1]]
        extra |= {"vocab_group": dist.group.WORLD, "vocab_start": cuts[0]}
    return case.results(chunk_rows=7, **extra)


def main() -> None:
    folder, impl = Path(sys.argv[1]), sys.argv[2]
    tolerance = float(sys.argv[3])
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if ranks > 1:
        dist.init_process_group("gloo")
    saved = {}
    for name, op, arguments in CASES:
        if impl == "triton":
            if name.endswith("float64"):
                continue
            arguments = {**arguments, "dtype": torch.float32}
        if tolerance and name.endswith("-rows"):
            continue  # what it drops is NaN there
        case = conftest.build(op, **arguments)
        cuts = None if ranks == 1 else CUTS[ranks][rank : rank + 2]
        extra = {} if op == "logprob" else {"column_tolerance": tolerance}
        saved[name] = results(case, cuts, impl=impl, **extra)
    torch.save(saved, folder / f"{impl}-{ranks}-{rank}-{tolerance}.pt")
    if ranks > 1:
        dist.destroy_process_group()
        time.sleep(0.2)  # gloo's thread lets go of the last collective, which needs the interpreter


if __name__ == "__main__":
    main()
