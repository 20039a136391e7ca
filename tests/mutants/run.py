"""`make mutants`: do the tests notice a wrong line? Each of mutants.yaml is put into a copy of the tree, alone, and the
tests that are named with it run against it. A mutant that they let pass survives; none may.

python tests/mutants/run.py [--only WORD] [--jobs N]

Exit code 1 where a mutant survives, 2 where the list does not fit the source or the tests fail without a mutant.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_name("mutants.yaml")
COPIED = ("sgpo", "kernels", "tests", "configs", "pyproject.toml")
LIMIT_S = 1800  # a mutant that makes its tests hang is noticed too
PRELOAD = ("deepspeed", "transformers.models.qwen3.modeling_qwen3", "torch._dynamo", "hypothesis", "pytest")


@dataclass(frozen=True)
class Mutant:
    """`old`, which `file` has exactly once, becomes `new`; `tests` are the arguments of pytest that must fail then."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def name(self) -> str:
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{self.file}: {old[:60]}  ->  {new[:60]}"


def load_mutants() -> list[Mutant]:
    """The list: tests -> file -> pairs of old and new text."""
    found = []
    for tests, files in yaml.safe_load(LIST.read_text(encoding="utf-8")).items():
        for file, pairs in files.items():
            found += [Mutant(file, old.rstrip("\n"), new.rstrip("\n"), tuple(tests.split())) for old, new in pairs]
    return found


def complaints(mutants: list[Mutant], root: Path = ROOT) -> list[str]:
    """What no longer fits the source: text that is not there, or more than once; a change that is none or no Python."""
    found = []
    for mutant in mutants:
        text = (root / mutant.file).read_text(encoding="utf-8")
        if (count := text.count(mutant.old)) != 1:
            found.append(f"{mutant.name}: the old text occurs {count} times")
        elif mutant.old == mutant.new:
            found.append(f"{mutant.name}: changes nothing")
        else:
            try:
                compile(text.replace(mutant.old, mutant.new), mutant.file, "exec")
            except SyntaxError as error:
                found.append(f"{mutant.name}: no Python ({error})")
    return found


def main() -> int:
    """Prints a line per mutant and the survivors; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="mutants whose file or text holds this word")
    parser.add_argument("--jobs", type=int, default=1, help="so many at a time")
    arguments = parser.parse_args()
    mutants = load_mutants()
    if wrong := complaints(mutants):
        print("\n".join([f"{LIST} does not fit the source:", *wrong]))
        return 2
    mutants = [mutant for mutant in mutants if arguments.only in f"{mutant.file} {mutant.old} {mutant.new}"]
    _preload()
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch, ThreadPoolExecutor(arguments.jobs) as pool:
        tree = _copied(ROOT, Path(scratch, "tree"))  # what is edited meanwhile changes nothing
        suites = {mutant.tests for mutant in mutants}
        suites = sorted(
            tests for tests in suites if len(tests) == 1 or tests[:1] not in suites
        )  # others are part of one
        for tests, (code, output) in zip(suites, pool.map(partial(_try, tree, None), suites), strict=True):
            print(f"{'passes' if code == 0 else 'FAILS'} without a mutant: {' '.join(tests)}", flush=True)
            if code != 0:
                print(output[-3000:])
                return 2
        survivors = 0
        tried = pool.map(partial(_try, tree), mutants, [mutant.tests for mutant in mutants])
        for mutant, (code, output) in zip(mutants, tried, strict=True):
            killed = code in (1, 2) or code < 0  # of pytest: a test failed, or could not be imported; stopped
            survivors += not killed
            print(f"{'killed  ' if killed else 'SURVIVED'} {mutant.name}", flush=True)
            if not killed and code != 0:
                print(output[-2000:])
    print(f"{len(mutants)} mutants, {survivors} survived")
    return 1 if survivors else 0


def _preload() -> None:
    """What the tests import anyway, once: forks of this process run them. Nothing of it starts threads or computes."""
    import importlib

    sys.dont_write_bytecode = True
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() not in (ROOT, ROOT / "kernels")]
    os.environ.pop("PYTHONPATH", None)
    os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"})
    os.environ.setdefault("TRITON_INTERPRET", "1")
    for name in PRELOAD:
        importlib.import_module(name)
    assert not any(name.split(".")[0] in ("sgpo", "sgpo_kernels") for name in sys.modules)


def _copied(root: Path, tree: Path) -> Path:
    """The copy of what the tests need."""
    tree.mkdir()
    for name in COPIED:
        if (root / name).is_dir():
            shutil.copytree(root / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(root / name, tree / name)
    return tree


def _try(clean: Path, mutant: Mutant | None, tests: tuple[str, ...]) -> tuple[int, str]:
    """(exit code of pytest, negative where it was stopped; its output), in a copy of the tree with the mutant."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as scratch:
        tree, output = _copied(clean, Path(scratch, "tree")), Path(scratch, "output")
        if mutant is not None:
            path = tree / mutant.file
            path.write_text(path.read_text(encoding="utf-8").replace(mutant.old, mutant.new), encoding="utf-8")
        pid = os.fork()
        if not pid:
            _become_pytest(tree, output, tests)
        code = _wait(pid)
        return code, output.read_text(errors="replace")


def _become_pytest(tree: Path, output: Path, tests: tuple[str, ...]) -> None:
    """In the fork: pytest, and no return."""
    code = 3
    try:
        os.setsid()
        with output.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(tree)
        os.environ["PYTHONPATH"] = f"{tree}{os.pathsep}{tree / 'kernels'}"
        sys.path[:0] = [str(tree), str(tree / "kernels")]
        import pytest

        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--rootdir", str(tree), *tests]))
        sys.stdout.flush()
    finally:
        os._exit(code)


def _wait(pid: int) -> int:
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    sys.exit(main())
