"""Compiles the benchmarks' kernels for a GPU that is not there, into a folder that serves as Triton's cache there.

    python -m benchmarks.triton_cache FOLDER [--tests]             beforehand, by the torch and Triton of that machine
    python -m benchmarks.triton_cache FOLDER --place CACHE_DIR     there: into its TRITON_CACHE_DIR
    CACHE=FOLDER bash benchmarks/gpu_acceptance.sh OUT_DIR         does that

What: the launches of one call of the loss (exact, live, nologits; both groups, policy alone, distillation alone) at a
  shape, and with --tests those of the GPU tests' small cases, as `sgpo_kernels.dry_run` sees them, compiled by Triton
  itself: signature, alignment of pointers and integers and options are those of the launch, so the key is too.
Key (read in Triton 3.6.0 and 3.9.0: runtime/cache.py, runtime/jit.py, compiler/compiler.py, backends/nvidia): a hash of
  Triton's own files (compiler, backends, language, runtime/cache.py) and its libtriton.so; of the kernel's source with
  that of what it calls, the line it begins on and its globals; of signature, constants and alignments; of `ptxas
  --version` and the compute capability; of all options with libdevice; of the environment variables that change code
  (TRITON_DISABLE_LINE_INFO, DISABLE_PTXAS_OPT and the like). No path, user or host name. The wheel for another Python
  has another libtriton.so.
Limits: an entry names its files by absolute paths, which --place rewrites. Triton 3.6 also compiles a C launcher per
  signature at a kernel's first launch, for which the driver's library is needed: these are not made here.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from sgpo_kernels.dry_run import Step

MADE_BY = "made_by.json"


def identity() -> dict[str, str]:
    """What has to be the same on both machines."""
    import triton
    from triton.runtime.cache import triton_key

    return {"triton": triton.__version__, "key": hashlib.sha256(triton_key().encode()).hexdigest()}


def fill(folder: Path, arch: int, shape: str, rows: int, tests: bool) -> dict[str, int]:
    """How many kernels were compiled, and how many were in the folder already."""
    os.environ["TRITON_CACHE_DIR"] = str(folder.resolve())
    from sgpo_kernels import dry_run, machine_code
    from triton import knobs

    from benchmarks.ops import SHAPES

    width, vocab = SHAPES[shape].hidden, SHAPES[shape].vocab
    found = {"compiled": 0, "found": 0}

    def count(*, cache_hit: bool, **_: Any) -> None:
        found["found" if cache_hit else "compiled"] += 1

    before, knobs.compilation.listener = knobs.compilation.listener, count
    try:
        with machine_code.Target(arch) as target:
            modes = ((False, "triton"), (True, "triton"), (True, "triton-nologits"))
            mixes: Any = itertools.product(((rows, rows // 8), (rows, 0), (0, rows)), modes)
            calls = (
                dry_run.steps_of(dry_run.Case(policy, distill, width, vocab, live, impl=impl))
                for (policy, distill), (live, impl) in mixes
            )
            for step in itertools.chain.from_iterable(itertools.chain(calls, steps_of_tests() if tests else ())):
                if step.launch is not None:
                    target.compile(step.launch)
    finally:
        knobs.compilation.listener = before
    (folder / MADE_BY).write_text(json.dumps(identity()))
    return found


def steps_of_tests() -> Iterator[Sequence[Step]]:
    """What the small cases of tests/sgpo_kernels/test_cuda.py ask of the device: every op, dtype, shape and option."""
    import torch
    from sgpo_kernels import dry_run

    folder = Path(__file__).resolve().parents[1] / "tests" / "sgpo_kernels"
    modules = []
    for name in ("conftest", "test_cuda"):
        spec = importlib.util.spec_from_file_location(f"cached_{name}", folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        modules.append(importlib.util.module_from_spec(spec))
        sys.modules[modules[-1].__name__] = modules[-1]
        spec.loader.exec_module(modules[-1])
    cases, tests = modules

    def empty(tensor: torch.Tensor) -> torch.Tensor:
        return dry_run.device_empty(*tensor.shape, dtype=tensor.dtype)

    every = itertools.product(
        cases.OPS, tests.CELLS, ({}, {"temperature": "rows", "logit_softcap": 4.0}), (0.0, 2.0**-8)
    )
    for op, (dtype, shape), options, tolerance in every:
        case = cases.build(op, dtype, shape, **options)
        with dry_run.Recorder(shape[2], max(1, shape[2] // 8)) as recorder:
            for store in (case.leaves, case.fixed):
                store.update({key: empty(value) for key, value in store.items() if isinstance(value, torch.Tensor)})
            case.upstream = empty(case.upstream)
            extra = {} if op == "logprob" else {"column_tolerance": tolerance}
            case.results(chunk_rows=32, impl="triton", **extra)
        yield recorder.steps


def place(folder: Path, target: Path) -> int:
    """Copies the entries; returns how many. Says so where this machine's Triton will not find them."""
    made, here = json.loads((folder / MADE_BY).read_text()), identity()
    if made != here:
        print(
            f"triton_cache: made by Triton {made['triton']}, here is {here['triton']}, or another build: no entry fits."
        )
    groups = 0
    for entry in sorted(path for path in folder.iterdir() if path.is_dir()):
        shutil.copytree(entry, target / entry.name, dirs_exist_ok=True)
        for group in (target / entry.name).glob("__grp__*"):
            names = json.loads(group.read_text())["child_paths"]
            paths = {name: str((group.parent / name).resolve()) for name in names}
            group.write_text(json.dumps({"child_paths": paths}))
            groups += 1
    return groups


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A Triton cache made on a machine without a GPU.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--place", type=Path, help="copy FOLDER's entries into this cache instead")
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--shape", default="qwen2.5-7b")
    parser.add_argument("--rows", type=int, default=8192, help="of the larger group")
    parser.add_argument("--tests", action="store_true", help="the kernels of the GPU tests too")
    options = parser.parse_args(arguments)
    if options.place is not None:
        print(f"triton_cache: {place(options.folder, options.place)} kernels placed")
        return 0
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        print("TRITON_INTERPRET=1 is set: unset it, the interpreter compiles nothing.", file=sys.stderr)
        return 2
    options.folder.mkdir(parents=True, exist_ok=True)
    print(
        "triton_cache: {compiled} compiled, {found} found".format(
            **fill(options.folder, options.arch, options.shape, options.rows, options.tests)
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
