"""Time, memory and error of the loss ops beside their peers, in one process, one row per implementation.

python -m benchmarks.run --op sgpo --shape cpu-7b-proportions --mix sgpo --out runs/bench/ops.jsonl
python -m benchmarks.run --op divergence --states spread:0.3,spread:0.1,spread:0.03 --shape smollm2
python -m benchmarks.run --op policy,sgpo --shape qwen2.5-7b --device cuda --peers ours-triton,liger,liger-fused+fla

Options that take several values take them with commas. Per case (op, shape, mix, states, rows): every implementation is
held against fp64 on the first `--error-rows` rows; then peak memory and a bitwise repeat, untimed; then forward and
backward of all in turn, round by round. One of ours that raises gets no time, one that misses a tolerance or does not
repeat is timed all the same; either is "wrong", and the run ends with exit code 1. A peer that is not installed or
fails says so in its row. A row is appended as soon as it is final. SIGINT appends what is known of the others with
status "cut", also where a peer hangs, and ends the run with exit code 130. The module `measure` says in which units.
On the CPU only ratios are printed, since the machine is shared. Errors of usage are one sentence and exit code 2.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from triton.errors import TritonError

from benchmarks import measure
from benchmarks import ops as registry
from benchmarks import states as sources
from benchmarks.ops import Inputs, Mix, Op, Shape
from benchmarks.peers import PEERS, Forward, Peer, find
from sgpo.types import SgpoError

# What an implementation raises on inputs, devices or compilers that it cannot serve.
FAILURES = (RuntimeError, ValueError, TypeError, ImportError, AttributeError, AssertionError, TritonError)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BASELINE = "ours-torch"


@dataclass(frozen=True)
class Case:
    op: Op
    shape: Shape
    mix: Mix
    states: str
    rows: int


@dataclass
class Entry:
    """An implementation in a case, and its row as far as it is known."""

    peer: Peer
    row: dict[str, Any]
    forward: Forward
    runs: bool = True

    def stop(self, status: str, reason: str) -> None:
        """Nothing more is measured of it."""
        self.row.update(status=status, reason=reason)
        self.runs = False

    def miss(self, reason: str) -> None:
        """One of ours broke a promise; its time and memory are wanted all the same."""
        self.row.update(status="wrong", reason="; ".join(filter(None, (self.row.get("reason"), reason))))

    def attempt(self, step: Callable[[], Any]) -> Any:
        """step(), or None where it fails, which no implementation of ours may."""
        try:
            return step()
        except FAILURES as error:
            lines = str(error).strip().splitlines() or ["no message"]
            self.stop("wrong" if self.peer.ours else "failed", f"{type(error).__name__}: {lines[0]}")
            return None


class Journal:
    """The entries of the present case, and the file that gets each row once."""

    def __init__(self, path: Path):
        self.path = path
        self.stage = "start"
        self.open: list[Entry] = []
        self.lock = threading.Lock()

    def write(self, entries: Sequence[Entry]) -> None:
        """Appends the rows of those that are not written yet."""
        with self.lock:
            final = [entry for entry in self.open if entry in entries]
            self.open = [entry for entry in self.open if entry not in entries]
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(entry.row) + "\n" for entry in final)

    def cut(self) -> None:
        """What is known of the entries that are not written yet."""
        for entry in self.open:
            before = f"{entry.row['status']}, {entry.row['reason']}; " if "reason" in entry.row else ""
            entry.row.update(status="cut", reason=f"{before}stopped at {self.stage}")
        self.write(self.open)


def write_even_if_stuck(journal: Journal, patience_s: float = 2.0) -> None:
    """A call that hangs in C never sees KeyboardInterrupt: so long after SIGINT, a thread writes and ends the run."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)

    def watch() -> None:
        while os.read(reading, 1) != bytes([signal.SIGINT]):
            pass
        time.sleep(patience_s)
        journal.cut()
        os._exit(130)

    threading.Thread(target=watch, daemon=True).start()


def run_case(case: Case, options: argparse.Namespace, journal: Journal) -> list[Entry]:
    """All implementations of one case, measured."""
    policy_rows, distill_rows = registry.group_rows(case.op, case.mix, case.rows)
    _progress(case, "states")
    states = sources.make(
        case.states,
        case.shape.hidden,
        case.shape.vocab,
        policy_rows,
        distill_rows,
        dtype=DTYPES[options.dtype],
        device=options.device,
        seed=options.seed,
        data=options.data,
        cache=options.cache,
    )
    inputs = registry.build(case.op, case.mix, states, seed=options.seed)
    limit = options.error_rows or case.rows
    part = states.first(min(policy_rows, limit), min(distill_rows, max(1, limit * distill_rows // case.rows)))
    checked = registry.build(case.op, case.mix, part, seed=options.seed)
    common = {
        "benchmark": "ops",
        "op": case.op.name,
        "equation": case.op.equation,
        "shape": case.shape.name,
        "hidden": case.shape.hidden,
        "vocab": case.shape.vocab,
        "mix": case.mix.name,
        "rows": inputs.rows,
        "policy_rows": policy_rows,
        "distill_rows": distill_rows,
        "floor_units": inputs.floor_units,
        "error_rows": checked.rows,
        "dtype": options.dtype,
        "seed": options.seed,
        "states": case.states,
        "source": states.source,
        "states_summary": sources.summary(states, rows=options.summary_rows),
        **measure.origin(options.device),
    }
    entries = _entries(case, options, common)
    journal.open = list(entries)
    exact = measure.truth(checked)

    def stage(entry: Entry | None, name: str) -> None:
        journal.stage = name if entry is None else f"{name} of {entry.peer.name}"
        _progress(case, journal.stage)

    for entry in _running(entries, journal):
        stage(entry, "errors")
        _check(entry, checked, exact)
    del checked, part, exact
    for entry in _running(entries, journal):
        stage(entry, "memory")
        _memory(entry, inputs, options.device)
    stage(None, "time")
    _time(list(_running(entries, journal)), inputs, options)
    journal.write(entries)
    return entries


def _running(entries: Sequence[Entry], journal: Journal) -> Iterator[Entry]:
    """Those that still run; the rows of the others are final."""
    for entry in entries:
        if not entry.runs:
            journal.write([entry])
    yield from [entry for entry in entries if entry.runs]


def _progress(case: Case, stage: str) -> None:
    name = f"{case.op.name} {case.shape.name} {case.mix.name} {case.states} {case.rows}"
    print(f"[{time.strftime('%H:%M:%S')}] {name}: {stage}", file=sys.stderr, flush=True)


def _entries(case: Case, options: argparse.Namespace, common: dict[str, Any]) -> list[Entry]:
    entries = []
    for peer in options.peers:
        forward = peer.forward(case.op.name)
        if forward is None:
            continue
        entry = Entry(peer, {**common, "peer": peer.name, "note": peer.note(case.op.name), "status": "ok"}, forward)
        if reason := peer.missing(options.device):
            entry.stop("missing", reason)
        entries.append(entry)
    return entries


def _check(entry: Entry, inputs: Inputs, exact: measure.Truth) -> None:
    """Errors of an implementation against fp64."""
    result = entry.attempt(lambda: measure.forward_backward(entry.forward, inputs))
    if result is None:
        return
    output, gradients = result
    found = measure.errors(inputs, output, gradients, exact)
    entry.row.update(found)
    if not measure.finite(found):
        entry.stop("wrong", "values that are not finite")
    elif entry.peer.ours and (wrong := measure.complaints(inputs, output, found, exact)):
        entry.miss("; ".join(wrong))


def _memory(entry: Entry, inputs: Inputs, device: str) -> None:
    """Peak memory of one call, and whether a second one gives the same bits; both warm the implementation up."""

    def call() -> Any:
        return measure.forward_backward(entry.forward, inputs)

    def twice() -> tuple[Any, Any, float | None]:
        # The CPU tracker is a dispatch mode, under which torch.compile runs eagerly: not its memory.
        tracked = device.startswith("cuda") or entry.peer.name != "compile"
        first = call()
        second, peak_mib = measure.with_peak(call, device) if tracked else (call(), None)
        return first, second, peak_mib

    result = entry.attempt(twice)
    if result is None:
        return
    first, second, entry.row["peak_mib"] = result
    entry.row["bitwise_repeat"] = measure.same_bits(first, second)
    if entry.peer.ours and not entry.row["bitwise_repeat"]:
        entry.miss("the same call gave other bits")


def _time(entries: Sequence[Entry], inputs: Inputs, options: argparse.Namespace) -> None:
    """Times of these in turn, beside the matrix product of the same shape; those of a run that is cut count too."""
    runs: dict[str, Callable[[], object]] = {"product": measure.product(inputs)}
    for entry in entries:
        runs[entry.peer.name] = lambda forward=entry.forward: measure.forward_backward(forward, inputs)
        if entry.peer.ours:
            runs[f"{entry.peer.name} forward"] = lambda forward=entry.forward: _forward_only(forward, inputs)
    measure.time_round_robin({"product": runs["product"]}, rounds=1, device=options.device)
    limits: dict[str, Any] = {"rounds": options.rounds, "device": options.device, "seconds": options.seconds}
    for times in measure.rounds_of(runs, **limits):
        _put_times(entries, inputs, times)


def _put_times(entries: Sequence[Entry], inputs: Inputs, times: dict[str, list[float]]) -> None:
    product = measure.quantiles_ms(times["product"])
    flops = 2 * inputs.rows * inputs.head.shape[0] * inputs.head.shape[1]
    for entry in entries:
        entry.row.update(measure.quantiles_ms(times[entry.peer.name]))
        entry.row.update(rounds=len(times["product"]), product_ms_p50=product["ms_p50"])
        entry.row["product_tflops"] = flops / product["ms_p50"] / 1e9
        entry.row["units"] = entry.row["ms_p50"] / product["ms_p50"]
        if entry.peer.ours:
            entry.row.update(measure.quantiles_ms(times[f"{entry.peer.name} forward"], "forward_"))
            entry.row["forward_units"] = entry.row["forward_ms_p50"] / product["ms_p50"]


@torch.no_grad()
def _forward_only(forward: Forward, inputs: Inputs) -> object:
    return forward(inputs)


def table(entries: Sequence[Entry], device: str) -> str:
    """Ratios to ours-torch, units and errors; milliseconds on an accelerator only."""
    on_gpu = device.startswith("cuda")
    first = entries[0].row
    head = ["peer", *(["ms"] if on_gpu else []), f"time / {BASELINE}", "units", "forward", "peak MiB", "same bits"]
    errors = [key for key in first if key.endswith("_error")] or ["loss_error"]
    lines = [
        f"\n{first['op']}, {first['shape']} (H {first['hidden']}, V {first['vocab']}), {first['mix']} "
        f"{first['policy_rows']} + {first['distill_rows']} rows, {first['dtype']}, {first['states']}, "
        f"floor {first['floor_units']:.2f} units, errors on {first['error_rows']} rows",
        "| " + " | ".join([*head, *errors]) + " |",
        "|" + "---|" * (len(head) + len(errors)),
    ]
    base = next((e.row["ms_p50"] for e in entries if e.peer.name == BASELINE and e.runs), None)
    for entry in (entry for entry in entries if entry.runs):
        row = entry.row
        cells = [row["peer"], *([f"{row['ms_p50']:.2f}"] if on_gpu else [])]
        cells += [_number(row["ms_p50"] / base if base else None), _number(row["units"])]
        cells += [_number(row.get("forward_units")), _number(row["peak_mib"]), "yes" if row["bitwise_repeat"] else "NO"]
        lines.append("| " + " | ".join([*cells, *(_number(row[key], ".1e") for key in errors)]) + " |")
    lines += [f"{e.peer.name}: {e.row['status']}, {e.row['reason']}" for e in entries if e.row["status"] != "ok"]
    return "\n".join(lines)


def _number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


# command line


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", default="sgpo", help=", ".join(registry.OPS))
    parser.add_argument("--shape", default="cpu-7b-proportions", help=", ".join(registry.SHAPES))
    parser.add_argument("--mix", help=f"{', '.join(registry.MIXES)}; default: the op's first")
    parser.add_argument("--states", default="calibrated", help="calibrated, spread:RATIO, real:MODEL_FOLDER")
    parser.add_argument("--peers", help=f"default all: {', '.join(PEERS)}; a+b pairs a's policy op with b's divergence")
    parser.add_argument("--rows", help="rows of the larger group; default: the shape's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on the CPU, else bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=60.0, help="per case, no further round begins after that")
    parser.add_argument("--error-rows", type=int, help="rows the errors are taken on, 0 for all; CPU: 1024, else 0")
    parser.add_argument("--summary-rows", type=int, default=256, help="rows for the summary of the states")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=sources.DEFAULT_DATA)
    parser.add_argument("--cache", type=Path, help=".pt file that keeps a real model's states")
    parser.add_argument("--out", type=Path, default=Path("runs/ops.jsonl"))
    parser.add_argument("--quick", action="store_true", help="the shape tiny, 2 rounds: does everything run?")
    options = parser.parse_args(arguments)
    if options.quick:
        options.shape, options.rounds, options.summary_rows = "tiny", 2, 64
    on_cpu = options.device == "cpu"
    options.dtype = options.dtype or ("float32" if on_cpu else "bfloat16")
    options.error_rows = (1024 if on_cpu else 0) if options.error_rows is None else options.error_rows
    options.peers = [find(name) for name in (options.peers.split(",") if options.peers else PEERS)]
    return options


def cases(options: argparse.Namespace) -> list[Case]:
    """Every combination that was asked for. Raises SgpoError where one does not exist."""
    found = []
    shapes = [_lookup(registry.SHAPES, name, "shape") for name in options.shape.split(",")]
    for name, shape in itertools.product(options.op.split(","), shapes):
        op = _lookup(registry.OPS, name, "op")
        mixes = [_lookup(registry.MIXES, mix, "row mix") for mix in (options.mix or op.mixes[0]).split(",")]
        rows = [_positive(text) for text in options.rows.split(",")] if options.rows else [shape.rows]
        for mix, states, count in itertools.product(mixes, options.states.split(","), rows):
            registry.group_rows(op, mix, count)
            found.append(Case(op, shape, mix, states, count))
    return found


def _lookup(table: dict[str, Any], name: str, kind: str) -> Any:
    if name not in table:
        raise SgpoError(f"Unknown {kind} {name!r}: expected one of {', '.join(table)}.")
    return table[name]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 8 or int(text) % 8:
        raise SgpoError(f"--rows takes multiples of 8, got {text!r}.")
    return int(text)


def main(arguments: Sequence[str] | None = None, *, alone: bool = False) -> int:
    """`alone`: the process has nothing else to do, so that a run that hangs may end it."""
    try:
        options = parse(arguments)
        measure.require_own_kernels()
        if options.device.startswith("cuda") and not torch.cuda.is_available():
            raise SgpoError("--device cuda needs a GPU that torch can see; there is none.")
        if options.rounds < 1:
            raise SgpoError("--rounds must be at least 1.")
        wrong = False
        options.out.parent.mkdir(parents=True, exist_ok=True)
        journal = Journal(options.out)
        if alone:
            write_even_if_stuck(journal)
        for case in cases(options):
            try:
                entries = run_case(case, options, journal)
            except KeyboardInterrupt:
                journal.cut()
                return 130
            except BaseException:
                journal.cut()
                raise
            if entries:
                print(table(entries, options.device), flush=True)
            wrong |= any(entry.row["status"] == "wrong" and entry.peer.ours for entry in entries)
    except SgpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main(alone=True))
