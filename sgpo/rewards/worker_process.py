"""The worker's side of the reward pool: how a worker starts, what limits it, what it runs.

Workers are forked from a small server process of our own (`ForkServer`), never from the trainer, whose threads, CUDA
context and gigabytes a fork would inherit. The server has imported and warmed Math-Verify once, so that a worker
which replaces a killed one is ready at once, and shares that memory. Imports neither torch nor deepspeed.
"""

from __future__ import annotations

import ctypes
import io
import os
import resource
import signal
import sys
from dataclasses import dataclass
from functools import partial
from multiprocessing import forkserver, popen_forkserver, reduction, spawn, util
from multiprocessing.context import ForkServerContext, ForkServerProcess, set_spawning_popen
from multiprocessing.process import BaseProcess
from typing import Any

from pebble.common.process import process_execute
from pebble.common.types import Result, ResultStatus

from sgpo.rewards.explanation import explain
from sgpo.rewards.registry import BUILT_IN, load_reward
from sgpo.types import RewardResult, SgpoError

_PR_SET_PDEATHSIG = 1
_SERVER = forkserver.ForkServer()
_SERVER.set_forkserver_preload(["sgpo.rewards.warm"])


@dataclass(frozen=True, slots=True)
class Outcome:
    """A result, and for "timeout" and "error" the cause; `broken_reward` where the cause is not just an odd answer.

    `steps` say what led to it, where an explanation was asked for.
    """

    result: RewardResult
    cause: str = ""
    broken_reward: bool = False
    steps: tuple[str, ...] = ()


class _WorkerPopen(popen_forkserver.Popen):
    """Asks our own server for a process, and does not make it import the trainer's `__main__`.

    The base class would: the main script of a training run imports torch, and an unguarded one would start a second
    run in every worker. Otherwise this is CPython's `popen_forkserver.Popen._launch` (3.10 to 3.12).
    """

    _fds: list[int]

    def _launch(self, process_obj: BaseProcess) -> None:
        preparation = spawn.get_preparation_data(process_obj.name)
        preparation.pop("init_main_from_name", None)
        preparation.pop("init_main_from_path", None)
        preparation["dir"] = os.getcwd()
        buffer = io.BytesIO()
        set_spawning_popen(self)
        try:
            reduction.dump(preparation, buffer)
            reduction.dump(process_obj, buffer)
        finally:
            set_spawning_popen(None)
        self.sentinel, writer = _SERVER.connect_to_new_process(self._fds)
        kept_open = (os.dup(writer), self.sentinel)
        self.finalizer = util.Finalize(self, util.close_fds, kept_open)  # type: ignore[attr-defined]
        with open(writer, "wb", closefd=True) as pipe:
            pipe.write(buffer.getbuffer())
        self.pid = forkserver.read_signed(self.sentinel)


class _WorkerProcess(ForkServerProcess):
    @staticmethod
    def _Popen(process_obj: BaseProcess) -> _WorkerPopen:
        return _WorkerPopen(process_obj)


class WorkerContext(ForkServerContext):
    """A multiprocessing context for `pebble.ProcessPool` whose processes come from our own server."""

    Process = _WorkerProcess


_reward: Result | None = None  # of load_reward, in a worker
_is_plugin = False


def start_worker(spec: str, require_box: bool, memory_mib: int) -> None:
    """Pebble's initializer: the limits, then the reward. A reward that cannot be loaded is kept for `load_error`."""
    global _reward, _is_plugin
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # pebble's Python handler cannot run inside a big-integer power
    if sys.platform == "linux":
        _die_with_the_trainer()
    _is_plugin = spec not in BUILT_IN
    _reward = process_execute(partial(load_reward, spec, require_box=require_box))
    if sys.platform == "linux":
        _limit_memory(memory_mib)


def load_error() -> str:
    """Why the reward could not be loaded in this worker; "" where it could."""
    assert _reward is not None
    return "" if _reward.status == ResultStatus.SUCCESS else _sentence(_reward.value.exception)


def run_reward(completion: str, gold: str, problem: str) -> Outcome:
    """One result. Exceptions go home as text: pebble breaks the pool over one that cannot be unpickled."""
    assert _reward is not None
    if _reward.status != ResultStatus.SUCCESS:
        return Outcome(RewardResult(0.0, "error"), load_error(), broken_reward=True)
    result = process_execute(_reward.value, completion, gold, problem)
    return Outcome(result.value) if result.status == ResultStatus.SUCCESS else _failure(result)


def run_explanation(spec: str, require_box: bool, completion: str, gold: str, problem: str) -> Outcome:
    """One result with its steps, for a reward that this worker has loaded."""
    assert _reward is not None
    run = partial(explain, spec, _reward.value, completion, gold, problem, require_box=require_box)
    result = process_execute(run)
    if result.status != ResultStatus.SUCCESS:
        return _failure(result)
    return Outcome(result.value.result, steps=result.value.steps)


def _failure(result: Result) -> Outcome:
    error = result.value.exception
    broken = _is_plugin or isinstance(error, SgpoError)
    return Outcome(RewardResult(0.0, "error"), _sentence(error), broken_reward=broken)


def _sentence(error: BaseException) -> str:
    text = f"{error}" if isinstance(error, SgpoError) else f"{type(error).__name__}: {error}"
    return text[:500]


def _die_with_the_trainer() -> None:
    """Even if the trainer is killed with SIGKILL while this worker spins: trainer dies, so server, so worker.

    The server ends when the last write end of its "alive" pipe is closed. Workers hold one by default; without it
    only the trainer does. The kernel then kills the workers, whose parent is the server.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    os.close(server._forkserver_alive_fd)
    server._forkserver_alive_fd = None


def _limit_memory(memory_mib: int) -> None:
    with open("/proc/self/statm") as statm:
        baseline_bytes = int(statm.read().split()[0]) * resource.getpagesize()
    limit_bytes = baseline_bytes + memory_mib * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
