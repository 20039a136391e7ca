"""All samples of one evaluation in one JSONL file: a header that says what they are samples of, then a line for each.

A line is on its way to the disk before the next sample is counted, so that a killed evaluation loses what was under
way and nothing else. The header binds the file: another model, template, sampling or benchmark is refused.
"""

from __future__ import annotations

import fcntl
import json
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sgpo.types import SgpoError

SampleKey = tuple[str, int]
"""Problem id and number of the sample."""


@dataclass(frozen=True, slots=True)
class Samples:
    """A file as read: its header ({} in a file without one) and its rows by key."""

    path: Path
    header: dict[str, Any]
    rows: dict[SampleKey, dict[str, Any]]

    @property
    def setting(self) -> dict[str, Any]:
        """How the samples were drawn, from the header of their file."""
        return self.header.get("setting", {})


def read_samples(path: Path) -> Samples:
    """Reads a file of samples; a last line that was cut off counts as not there.

    Raises:
        SgpoError: no such file, or a line (other than a torn last one) that is no sample.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SgpoError(f"{path} cannot be read: {error.strerror}; give a file that sgpo eval wrote") from error
    return _parsed(path, data)


class SampleLog:
    """The file open for appending, by one process at a time; a context manager. `append` may come from any thread.

    Args:
        setting: what the samples depend on; must equal that of the file where it exists.
        made_with: versions and such, kept in the header of a new file for the record.

    Raises:
        SgpoError: the file belongs to another setting, is damaged, is being written by another process, or cannot be
            written.
    """

    def __init__(self, path: Path, setting: dict[str, Any], made_with: dict[str, Any]) -> None:
        self._lock = threading.Lock()
        self._accepts = True
        self._failure: OSError | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] | None = path.open("a+b", buffering=0)  # what is written is out of this process
        except OSError as error:
            raise SgpoError(f"{path} cannot be written: {error.strerror}; give another folder with --out") from error
        try:
            self.samples = self._open(path, setting, made_with)
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path, setting: dict[str, Any], made_with: dict[str, Any]) -> Samples:
        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SgpoError(f"{path} is being written by another sgpo eval; give another --out") from error
        self._file.seek(0)
        data = self._file.read()
        self._file.truncate(len(data) if data.endswith(b"\n") else data.rfind(b"\n") + 1)
        setting = json.loads(json.dumps(setting))  # as it comes back from the file
        found = _parsed(path, data)
        if not found.header and not found.rows:
            header = {"setting": setting, "made_with": made_with}
            self._write(header)
            return Samples(path, header, {})
        if changed := differences(found.setting, setting):
            raise SgpoError(
                f"{path} holds samples of another setting ({'; '.join(changed)}): give another folder with --out, or "
                "remove the file to start anew"
            )
        return found

    def append(self, row: dict[str, Any]) -> None:
        """Does nothing after `finish`, so that what comes late from another thread changes nothing."""
        with self._lock:
            if self._accepts and self._failure is None:
                try:
                    self._write(row)
                    self.samples.rows[row["id"], row["sample"]] = row
                except OSError as error:
                    self._failure = error

    def check(self) -> None:
        """Raises SgpoError where a line could not be written, a full disk for instance."""
        if self._failure is not None:
            raise SgpoError(
                f"{self.samples.path} cannot be written: {self._failure.strerror}; the command goes on later"
            )

    def finish(self) -> None:
        """Takes no more rows; the file stays this process's own until `close`."""
        with self._lock:
            self._accepts = False

    def close(self) -> None:
        """Closes the file; what is in it stays."""
        self.finish()
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def __enter__(self) -> SampleLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, row: dict[str, Any]) -> None:
        assert self._file is not None
        left = memoryview(json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        while left:
            left = left[self._file.write(left) :]


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One text per key in which the two settings differ."""
    return [
        f"{key}: {_short(old.get(key))}, now {_short(new.get(key))}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:16] + '..."'


def _parsed(path: Path, data: bytes) -> Samples:
    lines = data.split(b"\n")
    lines.pop()  # after the last line end: nothing, or a torn line
    header: dict[str, Any] = {}
    rows: dict[SampleKey, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if number == 1 and "setting" in row:
                header = row
                continue
            key = (row["id"], row["sample"])
            _ = row["reward"], row["tokens"], row["truncated"]
        except (ValueError, TypeError, KeyError) as error:
            raise SgpoError(f"{path}:{number} is no sample of an evaluation; remove the line or the file") from error
        if key in rows:
            raise SgpoError(f"{path}:{number} repeats sample {key[1]} of {key[0]!r}; remove one of the two lines")
        rows[key] = row
    return Samples(path, header, rows)


def missing(samples: Samples, problem_ids: Iterable[str], count: int) -> list[SampleKey]:
    """Keys of the samples that are not there yet, in order."""
    return [(name, k) for name in problem_ids for k in range(count) if (name, k) not in samples.rows]
