"""Progress of an extraction: a live line on a terminal, a plain one now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_PLAIN_EVERY_S = 10.0


class ExtractDisplay:
    """Shows the round under way and what `status` says: counts, tokens, cost. A context manager."""

    def __init__(self, status: Callable[[], str], console: Console | None = None) -> None:
        self._status = status
        self._console = console or Console()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID | None = None
        self._name = ""
        self._done = self._total = 0
        self._printed = time.monotonic()

    def start_round(self, name: str, total: int) -> None:
        """A round of `total` questions begins."""
        self._name, self._done, self._total = name, 0, total
        if self._task is not None:
            self._progress.update(self._task, visible=False)
        self._task = self._progress.add_task(name, total=total, status=self._status())

    def advance(self, count: int = 1) -> None:
        """`count` more questions are answered."""
        self._done += count
        if self._task is not None:
            self._progress.update(self._task, completed=self._done, status=self._status())
        now = time.monotonic()
        if not self._console.is_terminal and (self._done == self._total or now - self._printed > _PLAIN_EVERY_S):
            self._printed = now
            self._console.print(
                f"{self._name} {self._done}/{self._total}  {self._status()}", highlight=False, soft_wrap=True
            )

    def __enter__(self) -> ExtractDisplay:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()
