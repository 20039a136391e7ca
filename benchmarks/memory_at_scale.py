"""Peak memory of the SGPO loss at a real head, for more and more rows: it must not grow with them.

    python -m benchmarks.memory_at_scale --out FILE.jsonl [--shape qwen2.5-7b] [--rows 8192,32768,131072]

Rows: GiB that one forward and backward takes beyond its inputs, with and without the hidden gradients (which are
outputs, [N, H]), dense and with live columns, and the bound that `sizes.extra_bytes` promises.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path

import torch
from sgpo_kernels import sgpo_loss, sizes, testing

from benchmarks import measure
from benchmarks.ops import SHAPES

GIB = 1 << 30


def main() -> int:
    parser = argparse.ArgumentParser(description="Peak memory of the SGPO loss against the number of rows.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen2.5-7b")
    parser.add_argument("--rows", default="8192,32768,131072")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    device: str = options.device
    if device == "cuda" and not torch.cuda.is_available():
        print("error: benchmarks.memory_at_scale needs a GPU that torch can see; there is none.", file=sys.stderr)
        return 2
    shape, common = SHAPES[options.shape], measure.origin(device, "benchmarks.memory_at_scale")
    head = torch.randn(shape.vocab, shape.hidden, device=device, dtype=torch.bfloat16).div_(shape.hidden**0.5)
    head.requires_grad_()
    for rows in map(int, options.rows.split(",")):
        policy = torch.randn(rows, shape.hidden, device=device, dtype=torch.bfloat16, requires_grad=True)
        distill = torch.randn(rows // 8, shape.hidden, device=device, dtype=torch.bfloat16, requires_grad=True)
        teacher = torch.randn_like(distill)
        targets = torch.randint(shape.vocab, (rows,), device=device)
        weight, distill_weight = (torch.full((n,), 1 / n, device=device) for n in (rows, rows // 8))
        for tolerance in (0.0, 2.0**-12):
            for leaf in (policy, distill, head):
                leaf.grad = None
            constants = {
                "advantages": torch.ones_like(weight),
                "policy_weight": weight,
                "distill_weight": distill_weight,
            }
            gates = {"clip_low": 0.2, "clip_high": 0.28, "max_token_kl": 1.0, "column_tolerance": tolerance}
            call = functools.partial(sgpo_loss, policy, targets, distill, teacher, head, **constants, **gates)
            peak_of = testing.cuda_peak if device == "cuda" else testing.cpu_peak
            peak = peak_of(lambda call=call: call()[0].backward()).peak_bytes
            outputs = policy.nbytes + distill.nbytes
            bound = sizes.extra_bytes("sgpo", rows + rows // 8, shape.hidden, shape.vocab, torch.bfloat16, device)
            row = {
                "what": "memory",
                "shape": shape.name,
                "rows": rows,
                "column_tolerance": tolerance,
                "peak_gib": peak / GIB,
                "peak_without_hidden_grads_gib": (peak - outputs) / GIB,
                "bound_gib": bound / GIB,
            }
            print(row, flush=True)
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**row, **common}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
