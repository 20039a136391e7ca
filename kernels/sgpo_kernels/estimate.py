"""How long the stages of one call of the loss take on a GPU, from what `dry_run` saw the code ask for.

    python -m sgpo_kernels.aot --estimate [--rows 8192 1024] [--hidden 3584] [--vocab 152064] [--live-share 0.005]

Equation: a step takes max(bytes / copy speed, flops / product speed, instructions / issue rate, special functions /
  their rate) + a kernel's start. The host runs ahead: it spends OPERATOR_US or KERNEL_US on each step, a step begins
  when the host has asked for it and the one before is done, and where the host waits it begins again WAKE_US after the
  device has caught up. `idle` is what the device waits. In a captured graph the host does nothing.
Source: `CARDS`, whose measured entries are of benchmarks/results/gpu_h100_products.txt (H100); instructions are those
  of the machine code, every one counted once per program, both sides of a branch included.
Limits: no caches, no overlap of kernels, no tiles of products that fill the chip badly; a torch operator is one kernel.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from sgpo_kernels import dry_run, sizes
from sgpo_kernels.dry_run import KERNELS, Case, Step

# In microseconds. Assumed: the device's start of a kernel, and how long after a wait the host asks for the next one.
# Fitted to the idle times of the H100's two profiled calls, exact and live: what the host spends on an operator of
# torch, with the Python and the views around it (which decides both), and on a launch of Triton (which hardly matters).
START_US, WAKE_US, OPERATOR_US, KERNEL_US = 2.0, 30.0, 100.0, 40.0
# Warp instructions that a processor issues per clock, and warps of special functions (16 lanes).
ISSUED, SPECIAL = 4.0, 0.5
PRODUCT, DH, DW, MEAN, REST, IDLE = "products", "dH", "dW", "mean head row", "other operators", "idle"
WHOLE_HEAD = KERNELS["rescale"].stage
ORDER = (PRODUCT, "scan", "divergence", "gradient", "peaks", "columns", DH, DW, MEAN, WHOLE_HEAD, "row values", REST)
Shapes = tuple[tuple[int, ...], ...]


class Card(NamedTuple):
    """A GPU: processors, their clock, products with float32 output, and copies (read and written); `measured` names
    the fields that are, the others are assumed."""

    name: str
    processors: int
    clock_ghz: float
    product_tflops: float
    copy_tbps: float
    measured: tuple[str, ...]

    def __str__(self) -> str:
        known = [f"{key} {value:g}{'' if key in self.measured else ' (assumed)'}" for key, value in self._numbers()]
        return f"{self.name}: {', '.join(known)}"

    def _numbers(self) -> list[tuple[str, float]]:
        return [(key, value) for key, value in self._asdict().items() if key not in ("name", "measured")]


CARDS = {
    "h100": Card("h100", 132, 1.7, 722.0, 2.96, ("processors", "product_tflops", "copy_tbps")),
    "h200": Card("h200", 132, 1.7, 790.0, 4.3, ("processors", "product_tflops", "copy_tbps")),
}


class Code(NamedTuple):
    """Warp instructions of one launch, and those of special functions among them."""

    instructions: float
    special: float


class Counts(NamedTuple):
    """Operators of torch, launches of Triton kernels, and how often the host waits."""

    operators: int
    kernels: int
    syncs: int


class Estimate(NamedTuple):
    """Milliseconds by stage, idle time last; what the host asks for in all and for one more chunk of policy rows;
    milliseconds from the first kernel to the last."""

    stages: dict[str, float]
    counts: Counts
    per_chunk: Counts
    total: float


def stages_of(calls: Sequence[tuple[str, Shapes]], hidden: int, vocab: int) -> list[str]:
    """The stage of each call, operator or kernel, from its name and the shapes that it was given."""
    chunks = [shapes[0][0] for name, shapes in calls if name == "mm" and shapes[1][-1] == vocab]
    rows = max(chunks, default=0)

    def stage(name: str, shapes: Shapes) -> str:
        if name in KERNELS:
            return KERNELS[name].stage
        if name == "bmm":
            return MEAN
        if name in ("mm", "addmm", "addmm_"):
            left, right = shapes[-2:] if name != "mm" else shapes[:2]
            if right[-1] == vocab:
                return PRODUCT
            if left[0] == 1:
                return MEAN
            return DH if left[0] == rows or left[1] == vocab else DW
        if name == "index_add_":
            return DW
        if name in ("addr_", "addr") or (name == "index" and shapes[:1] == ((vocab, hidden),)):
            return DH
        return WHOLE_HEAD if (vocab, hidden) in shapes[:1] else REST

    return [stage(name, shapes) for name, shapes in calls]


def busy_us(step: Step, card: Card, code: Code) -> float:
    """How long the device is at it, without the kernel's start."""
    clocks = card.processors * card.clock_ghz * 1e3
    return max(
        (step.read + step.written) / (card.copy_tbps * 1e6),
        step.flops / (card.product_tflops * 1e6),
        code.instructions / (ISSUED * clocks),
        code.special / (SPECIAL * clocks),
    )


def predict(steps: Sequence[Step], codes: Sequence[Code], case: Case, card: Card) -> Estimate:
    """The times of these steps on a card; `codes`: of each step (zeros for operators of torch)."""
    names = stages_of([(step.name, step.shapes) for step in steps], case.hidden, case.vocab)
    stages = dict.fromkeys(ORDER, 0.0)
    host = device = idle = first = 0.0
    for number, (step, code, name) in enumerate(zip(steps, codes, names, strict=True)):
        if not case.captured:
            host += KERNEL_US if step.launch else OPERATOR_US
        taken = busy_us(step, card, code) + START_US
        stages[name] = stages.get(name, 0.0) + taken / 1e3
        if number == 0:
            first = device = host
        idle += max(0.0, host - device)
        device = max(host, device) + taken
        if step.sync:
            host = device + WAKE_US
    stages = {name: ms for name, ms in stages.items() if ms}
    return Estimate({**stages, IDLE: idle / 1e3}, counts(steps), per_chunk(case), (device - first) / 1e3)


def counts(steps: Sequence[Step]) -> Counts:
    """What the host asks for in these steps."""
    kernels = sum(step.launch is not None for step in steps)
    return Counts(len(steps) - kernels, kernels, sum(step.sync for step in steps))


def per_chunk(case: Case) -> Counts:
    """What a third chunk adds to a second, of policy rows where the case has some; both fit into one slab."""
    chunk = sizes.CUDA_CHUNK_ROWS

    def of(rows: int) -> Counts:
        groups = (rows, 0) if case.policy_rows else (0, rows)
        return counts(dry_run.steps_of(case._replace(policy_rows=groups[0], distill_rows=groups[1])))

    return Counts(*(more - fewer for more, fewer in zip(of(3 * chunk), of(2 * chunk), strict=True)))


def codes_of(steps: Iterable[Step], arch: int = 90) -> list[Code]:
    """The instructions of each step, from its kernel compiled for a compute capability."""
    from sgpo_kernels import machine_code

    found: dict[str, machine_code.Code] = {}
    codes = []
    with machine_code.Target(arch) as target:
        for step in steps:
            if step.launch is None:
                codes.append(Code(0, 0))
                continue
            binary = target.compile(step.launch)
            if binary.hash not in found:
                found[binary.hash] = machine_code.read(binary.asm["cubin"])
            warps = step.launch.options["num_warps"]
            for size in step.launch.grid:
                warps *= size
            code = found[binary.hash]
            codes.append(Code(code.instructions * warps, code.special * warps))
    return codes


def estimates(case: Case, codes: Callable[[Iterable[Step]], list[Code]] = codes_of) -> dict[str, Estimate]:
    """The estimate of a case on every card."""
    steps = dry_run.steps_of(case)
    known = codes(steps)
    return {name: predict(steps, known, case, card) for name, card in CARDS.items()}


def rows_of(cases: dict[str, Case]) -> list[dict[str, Any]]:
    """One row per case and card, for a file or a table."""
    return [
        {"mode": mode, "card": card, "rows": [case.policy_rows, case.distill_rows], **found._asdict()}
        for mode, case in cases.items()
        for card, found in estimates(case).items()
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as columns of a text table, the stages in their order."""
    names = [name for name in (*ORDER, IDLE) if any(name in row["stages"] for row in rows)]
    names += sorted({name for row in rows for name in row["stages"]} - set(names))
    heads = [f"{row['mode']} {row['card']}" for row in rows]
    lines = [f"{'predicted, ms':30s}" + "".join(f"{text:>14s}" for text in heads)]
    lines += [f"{name:30s}" + "".join(f"{row['stages'].get(name, 0.0):14.2f}" for row in rows) for name in names]
    lines.append(f"{'first to last kernel':30s}" + "".join(f"{row['total']:14.2f}" for row in rows))
    for key, text in (("counts", "in all"), ("per_chunk", "per further chunk")):
        shown = ("/".join(map(str, row[key])) for row in rows)
        lines.append(f"{text:30s}" + "".join(f"{numbers:>14s}" for numbers in shown))
    lines.append("(operators of torch / Triton launches / host syncs)")
    return "\n".join(lines)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `--estimate`, whose defaults are Qwen2.5-7B's head and the rows of the benchmark."""
    parser.add_argument("--estimate", action="store_true", help="predicted times of one call instead of the table")
    parser.add_argument("--rows", type=int, nargs=2, default=[8192, 1024], help="policy and distillation rows")
    parser.add_argument("--hidden", type=int, default=3584)
    parser.add_argument("--vocab", type=int, default=152064)
    parser.add_argument("--live-share", type=float, default=Case._field_defaults["live_share"], help="live columns / V")


def report(options: argparse.Namespace) -> str:
    """What `--estimate` prints: a table, or with --json a row per line."""
    policy, distill = options.rows
    exact = Case(policy, distill, options.hidden, options.vocab, live=False, live_share=options.live_share)
    live = exact._replace(live=True)
    swept = live._replace(impl="triton-nologits")
    modes = {"exact": exact, "live": live, "nologits": swept, "captured": swept._replace(captured=True)}
    rows = rows_of(modes)
    if options.json:
        return "\n".join(json.dumps(row) for row in rows)
    return "\n".join([table(rows), *map(str, CARDS.values())])
