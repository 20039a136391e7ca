"""Where the time of one forward and backward of the SGPO loss goes: a row per kernel, idle gaps, host syncs.

    python -m benchmarks.stages --out FILE.jsonl [--shape qwen2.5-7b] [--mix sgpo] [--top 12]
    TRITON_INTERPRET=1 python -m benchmarks.stages --out FILE.jsonl --device cpu --shape tiny    does it run?
    python -m benchmarks.stages --beside benchmarks/results/gpu_h100.jsonl [--markdown]   predicted and measured

Calibrated states; the peers of MODES, each warmed up, timed without the profiler
(`call_ms`, median), then one call under torch.profiler. Rows with a `kernel`: ms, calls, share of the busy time, and
`op`, the torch operator that launched it with the shapes it got. Row `kernel` null: `wall_ms` from the first kernel's
start to the last one's end, `busy_ms` while at least one ran, `idle_ms` the sum of the gaps, `host_syncs`. On a CPU
operators stand in for kernels; nested ones count in each. --beside takes the rows of such a run and prints the stages
as measured beside those that `sgpo_kernels.aot --estimate` predicts; for that a GPU need not wait.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sgpo_kernels import dry_run, estimate, sizes, testing
from torch.profiler import ProfilerActivity, profile

from benchmarks import measure, ops, states
from benchmarks.peers import PEERS

MODES = {"exact": "ours-triton", "live": "ours-triton-live", "nologits": "ours-triton-nologits"}
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
WARM_UP = 3


class Event(NamedTuple):
    """What ran on the device, in microseconds, and which operator launched it ("" where none is known)."""

    name: str
    op: str
    start: float
    end: float


def trace(call: Callable[[], object], device: str) -> list[Event]:
    """The events of one call by their start, as the profiler's trace file has them."""
    gpu = [ProfilerActivity.CUDA] if device == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *gpu], record_shapes=True) as recorded:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(file))
        found = [event for event in json.loads(file.read_text())["traceEvents"] if event.get("ph") == "X"]
    launchers = {_external(event): event for event in found if event.get("cat") == "cpu_op"}
    wanted = ON_GPU if device == "cuda" else ("cpu_op",)
    events = [
        Event(event["name"], _operator(launchers.get(_external(event))), start, start + event["dur"])
        for event in found
        if event.get("cat") in wanted and (start := event["ts"]) is not None
    ]
    return sorted(events, key=lambda event: event.start)


def _external(event: dict[str, Any]) -> Any:
    return event.get("args", {}).get("External id")


def _operator(event: dict[str, Any] | None) -> str:
    if event is None:
        return ""
    shapes = [
        "x".join(map(str, shape)) for shape in event.get("args", {}).get("Input Dims", []) if shape and _is_shape(shape)
    ]
    return " ".join([event["name"], *shapes[:3]])


def _is_shape(value: Any) -> bool:
    return all(isinstance(size, int) for size in value)


def rows_of(events: Sequence[Event]) -> Iterator[dict[str, Any]]:
    """First the row of the whole, then those of the kernels, the longest first."""
    start = end = events[0].start if events else 0.0
    busy = 0.0
    for event in events:
        busy += max(0.0, event.end - max(event.start, end))
        end = max(end, event.end)
    wall = end - start
    total = {"wall_ms": wall / 1e3, "busy_ms": busy / 1e3, "idle_ms": (wall - busy) / 1e3}
    yield {"kernel": None, "calls": len(events), **total}
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        groups[event.name, event.op].append(event.end - event.start)
    for (name, op), times in sorted(groups.items(), key=lambda item: -sum(item[1])):
        ms = sum(times) / 1e3
        yield {"kernel": name, "op": op, "ms": ms, "calls": len(times), "share": 1e3 * ms / max(busy, 1e-9)}


def measured(mode: str, inputs: ops.Inputs, device: str) -> list[dict[str, Any]]:
    forward = PEERS[MODES[mode]].forward(inputs.op.name)
    assert forward is not None

    def call() -> object:
        return measure.forward_backward(forward, inputs)

    times = measure.time_round_robin({mode: call}, rounds=WARM_UP + 5, device=device, seconds=20)[mode]
    syncs = testing.host_syncs(call) if device == "cuda" else None
    total, *kernels = rows_of(trace(call, device))
    total.update(call_ms=measure.quantiles_ms(times[WARM_UP:] or times)["ms_p50"], host_syncs=syncs)
    return [total, *kernels]


def table(mode: str, rows: Sequence[dict[str, Any]], top: int) -> str:
    total, *kernels = rows
    lines = [
        f"\n{mode}: call {total['call_ms']:.2f} ms; profiled: wall {total['wall_ms']:.2f}, "
        f"busy {total['busy_ms']:.2f}, idle {total['idle_ms']:.2f} ms; {total['calls']} kernels, "
        f"{total['host_syncs']} host syncs",
        "      ms calls  share  kernel | operator",
    ]
    for row in kernels[:top]:
        name = f"{row['kernel'][:70]} | {row['op'][:50]}"
        lines.append(f"{row['ms']:8.3f} {row['calls']:5d} {row['share']:6.1%}  {name}")
    rest = kernels[top:]
    if rest:
        lines.append(f"{sum(row['ms'] for row in rest):8.3f} {sum(row['calls'] for row in rest):5d}         the others")
    return "\n".join(lines)


def predicted(groups: tuple[int, int], hidden: int, vocab: int) -> dict[str, dict[str, Any]]:
    """By mode, the estimate for the card that torch sees (none: an H100), made in a process of its own: it stands in
    for a GPU there."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "H100"
    card = next((card for card in estimate.CARDS if card in name.lower()), "h100")
    numbers = map(str, ("--rows", *groups, "--hidden", hidden, "--vocab", vocab))
    command = [sys.executable, "-m", "sgpo_kernels.aot", "--estimate", "--json", *numbers]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {row["mode"]: row for row in rows if row["card"] == card}


def stage_times(rows: Sequence[dict[str, Any]], hidden: int, vocab: int) -> dict[str, float]:
    """Milliseconds by stage of the rows of one mode; kernels that are in no row count as other operators."""
    total, *kernels = rows
    calls = []
    for row in kernels:
        name, *words = row["op"].split() or [""]
        shapes = tuple(tuple(map(int, word.split("x"))) for word in words if re.fullmatch(r"\d+(x\d+)*", word))
        own = row["kernel"] in dry_run.KERNELS
        calls.append((row["kernel"] if own else name.removeprefix("aten::"), shapes))
    times = {
        estimate.IDLE: total["idle_ms"],
        estimate.REST: max(0.0, total["busy_ms"] - sum(row["ms"] for row in kernels)),
    }
    for row, stage in zip(kernels, estimate.stages_of(calls, hidden, vocab), strict=True):
        times[stage] = times.get(stage, 0.0) + row["ms"]
    return times


def beside(times: dict[str, dict[str, float]], estimates: dict[str, dict[str, Any]], markdown: bool = False) -> str:
    """Predicted and measured milliseconds of each stage, by mode."""
    heads = [f"{text} {mode}" for mode in times for text in ("predicted", "measured")]
    lines = [["ms", *heads]]
    for stage in (*estimate.ORDER, estimate.IDLE):
        pairs = [(estimates[mode]["stages"].get(stage, 0.0), times[mode].get(stage, 0.0)) for mode in times]
        if any(max(pair) for pair in pairs):
            lines.append([stage, *(f"{value:.2f}" if max(pair) else "-" for pair in pairs for value in pair)])
    sums = [(estimates[mode]["total"], sum(times[mode].values())) for mode in times]
    lines.append(["first to last kernel", *(f"{value:.2f}" for pair in sums for value in pair)])
    if markdown:
        lines.insert(1, ["---"] * len(lines[0]))
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n".join(f"{line[0]:28s}" + "".join(f"{cell:>18s}" for cell in line[1:]) for line in lines)


def beside_file(file: Path, markdown: bool) -> str:
    """The table for the rows of the newest commit in a file, which come first; they are of the shape's usual rows."""
    found = [row for line in file.read_text().splitlines() if (row := json.loads(line)).get("what") == "stages"]
    newest = [row for row in found if row["commit"] == found[0]["commit"]]
    shape = ops.SHAPES[newest[0]["shape"]]
    groups = ops.group_rows(ops.OPS["sgpo"], ops.MIXES[newest[0]["mix"]], shape.rows)
    modes = {mode: [row for row in newest if row["mode"] == mode] for mode in MODES}
    modes = {mode: rows for mode, rows in modes.items() if rows}
    times = {mode: stage_times(rows, shape.hidden, shape.vocab) for mode, rows in modes.items()}
    return beside(times, predicted(groups, shape.hidden, shape.vocab), markdown)


def main() -> int:
    parser = argparse.ArgumentParser(description="Kernels, gaps and host syncs of one call of the SGPO loss.")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--beside", type=Path, help="no run: the committed rows of this file beside the prediction")
    parser.add_argument("--markdown", action="store_true", help="with --beside")
    parser.add_argument("--shape", choices=sorted(ops.SHAPES), default="qwen2.5-7b")
    parser.add_argument("--mix", choices=ops.OPS["sgpo"].mixes, default="sgpo")
    parser.add_argument("--rows", type=int, help="of the larger group; default: the shape's")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--top", type=int, default=12, help="kernels in the printed table; the file has all")
    options = parser.parse_args()
    if options.beside is not None:
        print(beside_file(options.beside, options.markdown))
        return 0
    if options.out is None:
        parser.error("--out or --beside is needed")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: benchmarks.stages needs a GPU that torch can see; there is none.", file=sys.stderr)
        return 2
    if options.device == "cpu" and not sizes.interpreting():
        print("error: benchmarks.stages --device cpu needs TRITON_INTERPRET=1 in the environment.", file=sys.stderr)
        return 2
    inputs = make_inputs(options)
    case = {"what": "stages", "shape": options.shape, "mix": options.mix, "rows": inputs.rows}
    origin = measure.origin(options.device, "benchmarks.stages")
    for mode in MODES:
        rows = measured(mode, inputs, options.device)
        with options.out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({**case, "mode": mode, **row, **origin}) + "\n" for row in rows)
        print(table(mode, rows, options.top), flush=True)
    return 0


def make_inputs(options: argparse.Namespace) -> ops.Inputs:
    op, mix, shape = ops.OPS["sgpo"], ops.MIXES[options.mix], ops.SHAPES[options.shape]
    groups = ops.group_rows(op, mix, options.rows or shape.rows)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    made = states.make("calibrated", shape.hidden, shape.vocab, *groups, dtype=dtype, device=options.device, seed=0)
    return ops.build(op, mix, made, seed=0)


if __name__ == "__main__":
    sys.exit(main())
