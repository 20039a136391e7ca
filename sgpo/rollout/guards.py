"""What every rollout engine watches for: a generation that hangs, and memory that runs out."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time

import torch

STALLED = 3  # exit code


class Watchdog:
    """Ends this process if `beat` is not called for `limit_s`: a kernel that hangs cannot be interrupted otherwise.

    A context manager around one generation. What was saved stays whole; the same command goes on from there.
    """

    def __init__(self, what: str, limit_s: float) -> None:
        self._what = what
        self._limit_s = limit_s
        self._last = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="rollout watchdog")

    def beat(self) -> None:
        """Says that the work still moves."""
        self._last = time.monotonic()

    def __enter__(self) -> Watchdog:
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self._limit_s / 4)):
            if time.monotonic() - self._last > self._limit_s:
                print(
                    f"sgpo: {self._what} has not moved for {self._limit_s:.0f} s (rollout.stall_s) and is cut; the "
                    "last checkpoint is whole: start the same command again. Where it hangs:",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback()
                os._exit(STALLED)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the device or on the host; it may succeed with less at once."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
