"""A JSON Lines file that only grows, one run at a time: what is in it was paid for and is never asked or sampled again.

A line is forced to the disk before it counts, so a run killed at any moment loses what was under way and nothing else.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from sgpo.types import SgpoError

Value = TypeVar("Value")
Lines = TypeVar("Lines", bound="KeyedLines[Any]")


class KeyedLines(Generic[Value]):
    """Values by key in an append-only file; of two lines with one key the later counts. A context manager.

    Args:
        what: what the file is to the user, as in "cache".
        setting: the knob that names it.
        read: a row without its key to a value; a ValueError, TypeError or KeyError means a damaged line.
        write: a value to the fields of its row.

    A last line torn by a crash is dropped. Raises SgpoError where another run holds the file or a line is damaged.
    """

    def __init__(
        self,
        path: Path,
        *,
        what: str,
        setting: str,
        read: Callable[[dict[str, Any]], Value],
        write: Callable[[Value], Mapping[str, Any]],
    ) -> None:
        self._path, self._what, self._setting = path, what, setting
        self._read_row, self._write_row = read, write
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise SgpoError(
                f"the {what} {path} cannot be written: {error.strerror}; set {setting} to another place"
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise SgpoError(
                f"the {what} {path} is in use by another run; wait for it or set {setting} to another place"
            ) from None
        self._values = self._read()

    def get(self, key: str) -> Value | None:
        """The value of a key, or None."""
        return self._values.get(key)

    def put(self, key: str, value: Value) -> None:
        """On disk when this returns."""
        row = {"key": key, **self._write_row(value)}
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._values[key] = value

    def __len__(self) -> int:
        return len(self._values)

    def __enter__(self: Lines) -> Lines:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def _read(self) -> dict[str, Value]:
        values: dict[str, Value] = {}
        self._file.seek(0)
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                # Torn, whole or not: cut it off, or the next line would be glued to it.
                self._file.truncate(self._file.seek(0, os.SEEK_END) - len(line))
                break
            try:
                row = json.loads(line)
                key = row.pop("key")
                values[key] = self._read_row(row)
            except (ValueError, TypeError, KeyError, AttributeError):
                raise SgpoError(f"{self._path}:{number}: not a line of this {self._what}; delete this line") from None
        return values
