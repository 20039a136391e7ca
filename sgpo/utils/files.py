"""Files that are whole or not there at all, and places that can be written."""

from __future__ import annotations

import os
from pathlib import Path

from sgpo.types import SgpoError


def check_writable(path: Path) -> None:
    """Makes the folder of `path`; SgpoError where the file could not be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SgpoError(f"the folder of {path} cannot be made: {error.strerror}; give another output") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise SgpoError(f"{path} cannot be written; give another output")


def write_whole(path: Path, text: str) -> None:
    """The old file stands until the new one is on the disk."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
