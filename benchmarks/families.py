"""Every causal language model of transformers, tiny and random, through the trainer: right, refused or wrong?

python -m benchmarks.families                       all of them; rows into results/families.jsonl
python -m benchmarks.families --only llama,gemma2   these; their rows are replaced
python -m benchmarks.run_tables                     then rewrites docs/families.md

Each family has a process of its own with a limit of time and memory, so that one that hangs or dies is one row. What is
measured stands in benchmarks/family_checks.py, how a model is made tiny in benchmarks/tiny_models.py.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.family_checks import Outcome, attempt, checks, make_sequences, plain_errors, plain_model, truth_of
from benchmarks.measure import origin, require_own_kernels
from benchmarks.tiny_models import save_tiny
from sgpo.utils.provenance import installed_version

RESULTS = Path(__file__).resolve().parent / "results" / "families.jsonl"


def all_families() -> list[str]:
    """Every model type that AutoModelForCausalLM knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def scan(family: str, scratch: Path) -> Iterator[dict[str, Any]]:
    """Parts of a family's row, each as soon as it is known. A part that only names a mode says that it begins."""
    folder, sequences = scratch / "model", make_sequences()
    yield {"stage": "building"}
    save_tiny(family, folder)
    yield {"stage": "the plain model"}
    try:
        truth = truth_of(plain_model(folder), sequences)
    except RuntimeError:  # code with constants of float32's range or dtype
        sequences = replace(sequences, dtype=torch.float32)
        truth = truth_of(plain_model(folder, sequences.dtype), sequences)
    yield {"truth": str(sequences.dtype), "plain_error": plain_errors(folder, sequences, truth, torch.float32)[0]}
    attention = "sdpa"
    modes = checks(folder, sequences, truth, scratch)
    yield {"stage": "padded"}
    first = _row(modes["padded"])
    if first["status"] == "refused" and "attn_implementation" in first["message"]:  # the family has only the plain one
        attention = "eager"
        modes = checks(folder, sequences, truth, scratch, attn_implementation=attention)
        first = _row(modes["padded"])
    yield {"attention": attention, "padded": first}
    found = {"padded": first}
    for mode, check in list(modes.items())[1:]:
        yield {"stage": mode}
        if first["status"] == "refused" and mode != "packed":
            continue  # nothing can be done with it
        barred = mode == "packed, checkpointed" and found["packed"]["status"] == "refused"
        found[mode] = found["packed"] if barred else _row(check)
        yield {mode: found[mode]}


def _row(check: Callable[[], Outcome]) -> dict[str, Any]:
    found = asdict(attempt(check))
    return {**found, "message": re.sub(r"\S+/family-\w+/\w+", "MODEL", found["message"])}


# ---- one process per family ----------------------------------------------------------------------------------------


def _work(family: str, answers: Connection, memory_gib: float) -> None:
    """The child: sends the parts of its row."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    limit = int(memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.set_num_threads(1)
    for name in ("MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK"):  # each family is a world of its own
        os.environ.pop(name, None)
    with TemporaryDirectory(prefix="family-") as scratch:
        stage = "building"
        try:
            for part in scan(family, Path(scratch)):
                stage = part.get("stage", stage)
                answers.send(part)
        except Exception as error:  # no tiny model, or transformers itself cannot run it
            text = str(error).strip().splitlines() or [""]
            answers.send({"not_run": f"{stage}: {type(error).__name__}: {text[0][:300]}"})


class _Child:
    """A family's process and what it has said."""

    def __init__(self, family: str, *, seconds: float, memory_gib: float) -> None:
        context = multiprocessing.get_context("fork")  # the imports of half a minute are made once
        self.answers, theirs = context.Pipe(duplex=False)
        self.family, self.row, self.stage = family, dict[str, Any](), "start"
        self.end = time.monotonic() + seconds
        self._seconds = seconds
        self._process = context.Process(target=_work, args=(family, theirs, memory_gib))
        self._process.start()
        theirs.close()

    def listen(self) -> bool:
        """Takes in what has been said; whether there is more to come."""
        try:
            while self.answers.poll():
                part = self.answers.recv()
                self.stage = part.pop("stage", self.stage)
                self.row.update(part)
        except EOFError:
            self._process.join()
            if self._process.exitcode:
                self._ended(f"the process died ({self._process.exitcode})")
            return False
        if time.monotonic() > self.end:
            self._process.kill()
            self._process.join()
            self._ended(f"not done within {self._seconds:.0f} s")
            return False
        return True

    def _ended(self, how: str) -> None:
        if "padded" in self.row or self.stage == "padded":
            self.row[self.stage] = asdict(Outcome("traceback", how))
        else:
            self.row["not_run"] = f"{self.stage}: {how}"


def run_all(
    families: list[str], *, jobs: int, seconds: float, memory_gib: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(family, its row without origin) as each is done."""
    waiting, running = list(reversed(families)), list[_Child]()
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(_Child(waiting.pop(), seconds=seconds, memory_gib=memory_gib))
        wait([child.answers for child in running], timeout=1.0)
        for child in list(running):
            if not child.listen():
                running.remove(child)
                yield child.family, child.row


# ---- rows ----------------------------------------------------------------------------------------------------------


def store(path: Path, row: dict[str, Any]) -> None:
    """Adds the row, in place of an older one of its family; sorted by name."""
    old = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    kept = {row["family"]: row for row in [*old, row]}
    text = "".join(json.dumps(kept[name]) + "\n" for name in sorted(kept))
    path.write_text(text, encoding="utf-8")


def _summary(row: dict[str, Any]) -> str:
    if "not_run" in row:
        return row["not_run"]
    modes = {mode: found for mode, found in row.items() if isinstance(found, dict) and "status" in found}
    return ", ".join(f"{mode} {found['status']}" for mode, found in modes.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="TYPE,TYPE", help="these model types")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--seconds", type=float, default=240.0, help="limit of a family")
    parser.add_argument("--memory-gib", type=float, default=8.0, help="limit of a family")
    arguments = parser.parse_args()
    require_own_kernels()
    families = arguments.only.split(",") if arguments.only else all_families()
    where = {**origin("cpu", "benchmarks.families"), "peft": installed_version("peft")}
    bad = set()
    limits = {"jobs": arguments.jobs, "seconds": arguments.seconds, "memory_gib": arguments.memory_gib}
    for family, row in run_all(families, **limits):
        print(f"{family}: {_summary(row)}", flush=True)
        store(arguments.out, {"benchmark": "families", "family": family, **row, **where})
        bad |= {family for found in row.values() if _is_bad(found)}
    print(f"{len(families)} families, {len(bad)} with a wrong value or a traceback: {sorted(bad)}")
    return 1 if bad else 0


def _is_bad(found: Any) -> bool:
    return isinstance(found, dict) and found.get("status") in ("wrong", "traceback")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
