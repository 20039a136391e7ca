"""`sgpo plan`: what a run will need, told before anything is loaded, and whether it fits."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from sgpo.config import Config
from sgpo.planning.architectures import Architecture, check_sequence_parallel, find_architecture
from sgpo.planning.changes import cheapest_changes, largest_micro_batch
from sgpo.planning.memory import CARDS_GIB, GIB, HEADROOM, Place, Plan, Planner, describe_change
from sgpo.types import SgpoError


def plan_run(
    config: Config, place: Place | None = None, architecture: Architecture | None = None, *, here: bool = False
) -> Plan:
    """The plan of `config`, with the largest micro-batch that fits and, where it does not fit, changes that would;
    `here`: changes of the config alone, none of the machine.

    Raises SgpoError where neither model.path nor plan.architecture tells the sizes of the model, or processes cannot
    share its sequences as engine.sequence_parallel_size asks.
    """
    place = place or find_place(config)
    sizes = architecture or find_architecture(config.plan.architecture or config.model.path)
    heads = {"num_attention_heads": sizes.heads, "num_key_value_heads": sizes.kv_heads}
    check_sequence_parallel(config.engine.sequence_parallel_size, processes=place.processes, model=heads)
    plan = Planner(config, sizes, place).plan()
    tokens = largest_micro_batch(config, sizes, place)
    changes = [] if plan.fits else cheapest_changes(config, sizes, place, machines=not here)
    return replace(plan, changes=changes, largest_micro_batch_tokens=tokens)


def check_run(config: Config) -> None:
    """Raises SgpoError where this machine cannot hold the run (plan.on_misfit: warn prints it instead).

    Models whose sizes cannot be read are not planned; the built-in one is too small to matter.
    """
    if config.plan.on_misfit == "off" or not (Path(config.model.path) / "config.json").is_file():
        return
    place = find_place(config, here=True)
    try:
        plan = plan_run(config, place, find_architecture(config.model.path), here=True)
    except SgpoError as error:
        print(f"sgpo: {error}", flush=True)
        return
    if not plan.fits and config.plan.on_misfit == "refuse":
        raise SgpoError(f"{plan.refusal()}; or set plan.on_misfit: warn")
    if not plan.fits:
        print(f"sgpo: {plan.refusal()}", flush=True)


def find_place(config: Config, *, here: bool = False) -> Place:
    """What the section `plan` names, else this machine. Without a card in either: the CPU.

    `here` (of `sgpo train`): this machine and these processes; of `plan` only host_memory_gib counts, as a limit.
    """
    asked, gpu = config.plan, None
    if not here and (asked.gpu_memory_gib or asked.card):
        gpu = (asked.gpu_memory_gib or CARDS_GIB[asked.card or ""]) * GIB
    else:
        import torch

        if torch.cuda.is_available():
            gpu = float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    processes = (None if here else asked.gpus) or int(os.environ.get("WORLD_SIZE", "1"))
    host = asked.host_memory_gib * GIB if asked.host_memory_gib else available_host_bytes()
    if here:
        host = min(host, available_host_bytes())
    known = None if here else asked.card
    card = known or ("cpu" if gpu is None else min(CARDS_GIB, key=lambda c: abs(CARDS_GIB[c] * GIB - gpu)))
    return Place(gpu, host, processes, min(processes, asked.gpus_per_host), card)


def available_host_bytes() -> float:
    """Memory that new work may still take: MemAvailable, or less where a control group allows less."""
    found = [int(line.split()[1]) * 1024.0 for line in _lines(Path("/proc/meminfo")) if line.startswith("MemAvailable")]
    group = Path("/sys/fs/cgroup")
    limit, used = (_lines(group / name) for name in ("memory.max", "memory.current"))
    if limit and used and limit[0] != "max":
        found.append(float(limit[0]) - float(used[0]))
    if not found:
        raise SgpoError("this machine does not tell its memory; set plan.host_memory_gib")
    return max(min(found), 1.0)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="ascii").split("\n")
    except OSError:
        return []


def as_dict(plan: Plan) -> dict[str, Any]:
    """What `sgpo plan --json` prints; sizes in GiB."""
    return {
        "fits": plan.fits,
        "parameters": plan.parameters,
        "processes": plan.place.processes,
        "gpu_gib": None if plan.place.gpu_bytes is None else round(plan.place.gpu_bytes / GIB, 3),
        "host_gib": round(plan.place.host_bytes / GIB, 3),
        "phases": {
            name: {
                "gpu_gib": round(phase.gpu_bytes / GIB, 4),
                "host_gib": round(phase.host_bytes / GIB, 4),
                "gpu_terms_gib": {term: round(size / GIB, 4) for term, size in phase.gpu.items()},
                "host_terms_gib": {term: round(size / GIB, 4) for term, size in phase.host.items()},
                "largest_term": phase.largest,
                "seconds": round(phase.seconds, 2),
                "time_goes_to": phase.resource,
            }
            for name, phase in plan.phases.items()
        },
        "sequence_tokens": plan.sequence_tokens,
        "kv_cache_tokens": plan.kv_tokens,
        "kv_cache_sequences": plan.kv_sequences,
        "largest_micro_batch_tokens": plan.largest_micro_batch_tokens,
        "step_seconds": round(plan.step_seconds, 1),
        "missing_gib": {f"{phase}, {where}": round(size / GIB, 3) for (phase, where), size in plan.missing.items()},
        "changes": plan.changes,
    }


def table(plan: Plan) -> str:
    """The plan as text: a row per phase with its terms, largest first, then capacity, time, and whether it fits."""
    on_gpu = plan.place.gpu_bytes is not None
    where = f"{(plan.place.gpu_bytes or 0) / GIB:.1f} GiB per GPU, " if on_gpu else ""
    lines = [
        f"{plan.parameters / 1e9:.3g}B weights, {plan.place.processes} process(es), {where}"
        f"{plan.place.host_bytes / GIB:.1f} GiB of host memory",
        f"{'phase':<10}{'GPU GiB' if on_gpu else '':>9}{'host GiB':>9}{'time':>9}  spent on; terms in GiB",
    ]
    for name, phase in plan.phases.items():
        terms = phase.gpu or phase.host
        shown = sorted(terms.items(), key=lambda term: -term[1])
        text = " + ".join(f"{term} {size / GIB:.2f}" for term, size in shown if size >= 0.005 * GIB)
        gpu = f"{phase.gpu_bytes / GIB:.2f}" if on_gpu else ""
        lines.append(
            f"{name:<10}{gpu:>9}{phase.host_bytes / GIB:>9.2f}{phase.seconds:>8.0f}s  {phase.resource}; {text}"
        )
    host = max(plan.phases.values(), key=lambda phase: phase.host_bytes).host
    if on_gpu:
        shown = sorted(host.items(), key=lambda term: -term[1])
        lines.append("host: " + " + ".join(f"{term} {size / GIB:.2f}" for term, size in shown))
    slowest = max(plan.phases, key=lambda name: plan.phases[name].seconds)
    lines += [
        f"KV cache: {plan.kv_tokens} tokens, {plan.kv_sequences} sequences of {plan.sequence_tokens} tokens",
        f"largest engine.micro_batch_tokens that fits: {plan.largest_micro_batch_tokens or 'none'}",
        f"a step with every completion at full length: {plan.step_seconds:.0f} s, most of it in {slowest}",
        f"fits (a GPU is planned up to {HEADROOM:.0%})" if plan.fits else "does not fit:",
    ]
    for (phase, where), size in plan.missing.items():
        lines.append(f"  {phase}: {size / GIB:.2f} GiB too {'few' if where == 'KV cache' else 'much'} ({where})")
    lines += [f"  fits with {describe_change(c)} ({c['step_seconds']:.0f} s a step)" for c in plan.changes]
    return "\n".join(lines)
