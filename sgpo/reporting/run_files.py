"""The files of a run that grow line by line: their names, how they are written and read.

Every file is JSON Lines: one object per line, flushed line by line, so that a crash costs at most the line being
written.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from sgpo.types import SgpoError

Phase = Literal["warmup", "train", "eval"]

METRICS_FILE = "metrics.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"
TRAJECTORIES_FILE = "trajectories.jsonl"
PROFILE_FILE = "profile/steps.jsonl"


def iter_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yields the objects of a JSON Lines file in order; a last line torn by a crash is left out.

    Torn means: without its newline and not valid JSON. Any other bad line raises SgpoError with file and line.
    """
    path = Path(path)
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise SgpoError(f"{path}: file not found; expected a JSON Lines file written by a run") from None
    with file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError:  # JSONDecodeError and UnicodeDecodeError
                if not line.endswith(b"\n"):
                    return
                raise SgpoError(f"{path}:{number}: not valid JSON; repair or delete this line") from None
            if not isinstance(row, dict):
                raise SgpoError(f"{path}:{number}: expected a JSON object, got {type(row).__name__}; fix this line")
            yield row


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """All rows of a JSON Lines file; tolerance and errors as in `iter_jsonl`."""
    return list(iter_jsonl(path))


def _finite(value: Any) -> Any:
    """The value with every non-finite float, also inside lists and dicts, replaced by None (JSON has no NaN)."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _encode(row: Mapping[str, Any]) -> bytes:
    return json.dumps(_finite(row), allow_nan=False).encode() + b"\n"


def _rewrite_jsonl(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Keeps the rows that `keep` accepts, drops a torn last line; the old file stands until the new one is whole."""
    if not path.exists():
        return
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        for row in iter_jsonl(path):
            if keep(row):
                file.write(_encode(row))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class JsonlWriter:
    """Appends rows to one file; opening it repairs what a crash or a rolled-back step left at its end."""

    def __init__(self, path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _rewrite_jsonl(path, keep)
        self._file = path.open("ab")

    def write(self, row: Mapping[str, Any]) -> None:
        """One row, flushed."""
        self._file.write(_encode(row))
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
