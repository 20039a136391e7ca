"""Folders that are either whole or not there: temporary folder, fsync, manifest of hashes, rename.

A crash, a kill or a full disk at any moment leaves the earlier checkpoints untouched. A checkpoint whose files do not
match its manifest is passed over for the one before it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sgpo.types import SgpoError
from sgpo.utils import distributed

MANIFEST = "manifest.json"


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Replaces `folder` by what `write(temporary folder)` puts there. Collective; every rank may write its files.

    Raises SgpoError where it cannot be written (a full disk, say); what was there before stays.
    """
    temporary = folder.with_name(f".tmp-{folder.name}")
    if distributed.is_main():
        shutil.rmtree(temporary, ignore_errors=True)
    distributed.barrier()

    def fill() -> None:
        temporary.mkdir(parents=True, exist_ok=True)
        write(temporary)

    problem = None
    try:
        _attempt(folder, fill)
    except SgpoError as error:
        problem = str(error)
    # Every rank must learn of a failure on any of them, or the others would wait for it for ever.
    problem = next((p for p in distributed.gather(problem) if p), None)
    if distributed.is_main():
        if problem is None:
            try:
                _attempt(folder, lambda: _seal(temporary, folder))
            except SgpoError as error:
                problem = str(error)
        if problem is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    problem = distributed.broadcast(problem)
    if problem is not None:
        raise SgpoError(problem)


def is_whole(folder: Path) -> bool:
    """True where every file of the manifest is there with its size and hash."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return all(
            (folder / name).stat().st_size == entry["size"] and _sha256(folder / name) == entry["sha256"]
            for name, entry in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


class Checkpoints:
    """The numbered checkpoints of one stage of a run, under `root`."""

    def __init__(self, root: Path, *, keep_last: int) -> None:
        self.root = root
        self.keep_last = keep_last

    def save(self, step: int, state: dict[str, Any], write: Callable[[Path], None]) -> Path:
        """Writes checkpoint `step`: the JSON `state` and what `write(folder)` adds; drops old ones. Collective."""

        def write_all(folder: Path) -> None:
            write(folder)
            if distributed.is_main():
                (folder / "state.json").write_text(json.dumps({"step": step, **state}), encoding="utf-8")

        folder = self.root / f"step-{step:08d}"
        write_folder(folder, write_all)
        if distributed.is_main():
            for old in self._folders()[: -self.keep_last]:
                shutil.rmtree(old, ignore_errors=True)
        return folder

    def latest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest whole checkpoint and its state, the same on every rank; None where there is none at all.

        Raises SgpoError where there are checkpoints and none is whole. Collective.
        """
        found: Any = None
        if distributed.is_main():
            folders = self._folders()
            whole = next((folder for folder in reversed(folders) if is_whole(folder)), None)
            if whole is not None:
                for broken in folders[folders.index(whole) + 1 :]:
                    print(f"checkpoint {broken} does not match its manifest; going on from {whole.name}")
                found = whole
            elif folders:
                found = SgpoError(
                    f"no checkpoint in {self.root} matches its manifest ({len(folders)} damaged); "
                    "restore one, or start afresh with --run.resume never"
                )
        found = distributed.broadcast(found)
        if isinstance(found, SgpoError):
            raise found
        if found is None:
            return None
        return found, json.loads((found / "state.json").read_text(encoding="utf-8"))

    def _folders(self) -> list[Path]:
        return sorted(self.root.glob("step-*")) if self.root.is_dir() else []


def _seal(temporary: Path, folder: Path) -> None:
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    manifest = {
        str(path.relative_to(temporary)): {"size": path.stat().st_size, "sha256": _sha256(path)} for path in files
    }
    (temporary / MANIFEST).write_text(json.dumps({"files": manifest}, indent=1), encoding="utf-8")
    for path in [*files, temporary / MANIFEST]:
        _fsync(path)
    for path in [p for p in temporary.rglob("*") if p.is_dir()] + [temporary]:
        _fsync(path)
    replaced = folder.with_name(f".old-{folder.name}")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    temporary.rename(folder)
    _fsync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _attempt(folder: Path, action: Callable[[], None]) -> None:
    try:
        action()
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        reason = " ".join(str(error).split())
        raise SgpoError(f"{folder} could not be written ({reason}); earlier checkpoints are intact") from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
