"""A rollout engine in a process of its own: on other GPUs, or where its death must not be the trainer's.

The parent side is a RolloutEngine; the child runs the real one. They talk over a pair of sockets without a name, so
there is no port. Weights go bucket by bucket through anonymous shared memory. Whatever happens to the child shows: its
end closes the socket, its silence is timed.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

import torch

from sgpo.rollout.guards import Watchdog
from sgpo.rollout.transport import Named, buckets, receive, share
from sgpo.types import EngineFailure, Rollout, RolloutEngine, RolloutRequest, SamplingParams, SgpoError, SyncReceipt

_BUCKET_BYTES = 256 * 2**20
_HEARTBEAT_S = 1.0
_START_S = 600.0
_BROKEN_OFF = "broken off"
# A launcher's variables would make the child join the trainer's process group.
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class EngineProcess:
    """A RolloutEngine whose work is done by `build()` in a child process.

    Args:
        build: makes the engine in the child; sent there by pickle, so a function of a module or a partial of one.
        stall_s: a child that has not moved for so long is killed.
        devices: what the child sees as CUDA_VISIBLE_DEVICES; None: what this process sees.

    Every method raises EngineFailure where the child has died or hangs; the next load_weights starts another child.
    """

    def __init__(self, build: Callable[[], RolloutEngine], *, stall_s: float, devices: str | None = None) -> None:
        if not hasattr(os, "memfd_create"):
            raise SgpoError("rollout.placement: process needs Linux (anonymous shared memory); use inprocess")
        self._build = build
        self._stall_s = stall_s
        self._devices = devices
        self._process: Any = None
        self._connection: Connection | None = None
        self._start()

    @property
    def pid(self) -> int | None:
        """Of the process that samples."""
        return None if self._process is None else self._process.pid

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        sampling: SamplingParams,
        on_progress: Callable[[int, int], None] | None = None,
        on_rollout: Callable[[Rollout], None] | None = None,
    ) -> list[Rollout]:
        """As Sampler.generate."""

        def event(kind: str, value: Any) -> None:
            if kind == "progress" and on_progress is not None:
                on_progress(*value)
            elif kind == "rollout" and on_rollout is not None:
                on_rollout(value)

        return self._call("generate", (list(requests), sampling, on_rollout is not None), "rollout", event)

    def load_weights(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], policy_version: int, probe_ids: Sequence[int] = ()
    ) -> SyncReceipt:
        """As RolloutEngine.load_weights."""
        if self._connection is None:
            self._start()
        self._send(("load_weights", (policy_version, tuple(probe_ids))), "weight sync")
        source = buckets(named_tensors, _BUCKET_BYTES)
        while True:
            self._answer("weight sync")  # the child asks for each bucket, so that few of them exist at a time
            try:
                bucket = next(source, None)
            except BaseException:
                self._send(_BROKEN_OFF, "weight sync")
                with suppress(SgpoError):
                    self._answer("weight sync")
                raise
            if bucket is None:
                self._send(None, "weight sync")
                return self._answer("weight sync")
            self._hand_over(bucket)

    def holds_base(self) -> bool:
        """As RolloutEngine.holds_base."""
        try:
            return self._call("holds_base", (), "weight sync")
        except EngineFailure:
            return False

    def sleep(self) -> None:
        """As RolloutEngine.sleep."""
        self._call("sleep", (), "sleep")

    def wake(self) -> None:
        """As RolloutEngine.wake."""
        self._call("wake", (), "wake")

    def close(self) -> None:
        """As RolloutEngine.close."""
        if self._connection is not None:
            with suppress(OSError):
                self._connection.send(("close", ()))
            self._process.join(timeout=10)
        self._stop()

    def _start(self) -> None:
        context = mp.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, self._build, os.getpid(), self._stall_s), name="sgpo rollouts", daemon=True
        )
        with _environment(self._devices):
            self._process.start()
        theirs.close()
        self._answer("start of the rollout engine", limit_s=_START_S)

    def _call(
        self, method: str, arguments: tuple[Any, ...], stage: str, event: Callable[[str, Any], None] | None = None
    ) -> Any:
        if self._connection is None:
            raise EngineFailure(f"{stage}: the rollout process is gone")
        self._send((method, arguments), stage)
        return self._answer(stage, event)

    def _hand_over(self, bucket: list[Named]) -> None:
        assert self._connection is not None
        descriptor, layout = share(bucket)
        try:
            self._send(layout, "weight sync")
            send_handle(self._connection, descriptor, self.pid)
        except OSError as error:
            raise self._failure("weight sync", "it died") from error
        finally:
            os.close(descriptor)

    def _send(self, message: Any, stage: str) -> None:
        assert self._connection is not None
        try:
            self._connection.send(message)
        except OSError as error:
            raise self._failure(stage, "it died") from error

    def _answer(
        self, stage: str, event: Callable[[str, Any], None] | None = None, *, limit_s: float | None = None
    ) -> Any:
        """Waits for the result of what was asked last; the child says every second that it still moves."""
        limit_s = limit_s or self._stall_s
        assert self._connection is not None
        while True:
            try:
                if not self._connection.poll(limit_s + 5 * _HEARTBEAT_S):
                    raise self._failure(stage, f"it gave no sign of life for {limit_s:.0f} s and was killed")
                kind, value = self._connection.recv()
            except (EOFError, OSError) as error:
                raise self._failure(stage, "it died") from error
            if kind == "result":
                return value
            if kind == "refused":
                raise SgpoError(value)
            if kind == "error":
                raise self._failure(stage, f"it failed:\n{value}")
            if event is not None:
                event(kind, value)

    def _failure(self, stage: str, what: str) -> EngineFailure:
        process = self._process
        self._stop()
        code = process.exitcode
        ending = f" by signal {signal.Signals(-code).name}" if code is not None and code < 0 else f", exit code {code}"
        return EngineFailure(f"{stage}: the rollout process is gone, {what} (ended{ending})")

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None


def _serve(connection: Connection, build: Callable[[], RolloutEngine], parent: int, stall_s: float) -> None:
    """The child: one request after the other, until the parent closes the connection or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    line = _Line(connection, parent)
    try:
        with line.busy():
            engine = build()
            line.say("result", None)
        while True:
            method, arguments = connection.recv()
            if method == "close":
                engine.close()
                return
            with line.busy():
                try:
                    line.say("result", _run(engine, line, method, arguments, stall_s))
                except SgpoError as error:
                    line.say("refused", str(error))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except SgpoError as error:
        line.say("refused", str(error))
    except BaseException:
        line.say("error", traceback.format_exc(limit=-4))
        raise


class _Line:
    """The child's end of the connection: messages, and a sign of life each second while there is work."""

    def __init__(self, connection: Connection, parent: int) -> None:
        self.connection = connection
        self._parent = parent
        self._lock = threading.Lock()
        self._is_busy = False
        threading.Thread(target=self._beat, daemon=True, name="heartbeat").start()

    def say(self, kind: str, value: Any) -> None:
        with self._lock:
            self.connection.send((kind, value))

    @contextmanager
    def busy(self) -> Iterator[None]:
        self._is_busy = True
        yield
        self._is_busy = False

    def _beat(self) -> None:
        pause = threading.Event()
        while not pause.wait(_HEARTBEAT_S):
            if os.getppid() != self._parent:  # the trainer was killed: nobody else would end this process
                os._exit(0)
            if self._is_busy:
                with suppress(OSError):
                    self.say("alive", None)


def _run(engine: RolloutEngine, line: _Line, method: str, arguments: tuple[Any, ...], stall_s: float) -> Any:
    if method == "load_weights":
        version, probe_ids = arguments
        with Watchdog("weight sync: the rollout process", stall_s) as watchdog:
            return engine.load_weights(_received(line, watchdog), version, probe_ids)
    if method == "generate":
        requests, sampling, streamed = arguments
        return engine.generate(
            requests,
            sampling,
            lambda *counts: line.say("progress", counts),
            (lambda rollout: line.say("rollout", rollout)) if streamed else None,
        )
    return getattr(engine, method)()


def _received(line: _Line, watchdog: Watchdog) -> Iterator[Named]:
    while True:
        line.say("result", None)  # asks for the next bucket
        if (layout := line.connection.recv()) is None:
            return
        if layout == _BROKEN_OFF:
            raise SgpoError("the trainer's weights broke off")
        watchdog.beat()
        yield from receive(recv_handle(line.connection), layout)


@contextmanager
def _environment(devices: str | None) -> Iterator[None]:
    """What the child is to inherit, for as long as it takes to start it."""
    before = dict(os.environ)
    for name in _LAUNCHER:
        os.environ.pop(name, None)
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
