"""A Triton cache made without a GPU is found again: from another folder, user and copy of the code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import PATIENCE_S

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


def run(tree: Path, home: Path, *words: object) -> str:
    home.mkdir(exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    environment |= {"PYTHONPATH": f"{tree / 'kernels'}:{tree}", "HOME": str(home), "USER": home.name}
    command = [sys.executable, "-m", "benchmarks.triton_cache", *map(str, words)]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_dir() and list(path.glob("*.cubin"))}


def test_the_keys_do_not_depend_on_the_machine(tmp_path):
    small = ("--shape", "tiny", "--rows", 64)
    first, second, placed = tmp_path / "first", tmp_path / "second", tmp_path / "placed"
    compiled = int(run(ROOT, tmp_path / "ann", first, *small).split()[1])
    assert compiled == len(entries(first)) > 10

    tree = tmp_path / "copy of the code"
    for name in ("benchmarks", "kernels", "sgpo"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    assert run(tree, tmp_path / "bob", second, *small).split()[1] == str(compiled)
    assert entries(first) == entries(second)

    assert run(tree, tmp_path / "bob", first, "--place", placed) == f"triton_cache: {compiled} kernels placed"
    shutil.rmtree(first)
    assert run(tree, tmp_path / "bob", placed, *small).startswith("triton_cache: 0 compiled,")


def test_another_triton_is_named(tmp_path, capsys, monkeypatch):
    from benchmarks import triton_cache

    folder = tmp_path / "made"
    folder.mkdir()
    (folder / triton_cache.MADE_BY).write_text(json.dumps({"triton": "0.1", "key": "x"}))
    monkeypatch.setattr(triton_cache, "identity", lambda: {"triton": "0.2", "key": "y"})
    assert triton_cache.place(folder, tmp_path / "there") == 0
    assert "made by Triton 0.1, here is 0.2" in capsys.readouterr().out
