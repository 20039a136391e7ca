"""Scores completions in worker processes that can be killed.

Every result has a time limit, a memory limit and a length limit; what hits one gets reward 0 with a status that says
so, and is counted. A result that sympy turns into an endless loop therefore costs `timeout_s` on one worker.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, TimeoutError, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from types import TracebackType

from pebble import ProcessExpired, ProcessPool

from sgpo.rewards import worker_process
from sgpo.rewards.answers import condense
from sgpo.rewards.registry import BUILT_IN
from sgpo.rewards.worker_process import Outcome
from sgpo.types import RewardResult, SgpoError

logger = logging.getLogger(__name__)

_START_S = 120.0  # for the first worker to import its reward
_STALL_S = 60.0  # without any result, beyond the time-out of one, before the workers are replaced

_Task = tuple[str, str, str]

_TOO_LONG = Outcome(RewardResult(0.0, "too_long"))
_LOST = Outcome(RewardResult(0.0, "error"), "the reward workers broke down or the pool was closed", broken_reward=True)


@dataclass(frozen=True, slots=True)
class RewardItem:
    """A completion's text, the right answer, and the problem's text for rewards that read it."""

    completion: str
    gold: str
    problem: str = ""


class RewardPool:
    """A warm pool of reward workers; a context manager.

    Args:
        reward: a name for `load_reward`; given by name because the workers load it themselves.
        workers: number of processes.
        timeout_s: for one result; pebble looks every 0.1 s.
        memory_mib: address space a worker may use on top of what it has after loading the reward (Linux only).
        max_chars: a longer completion is "too_long" and never reaches a worker.
        require_box: see `verify_answer`.
        correct_above: what a reward must exceed for its completion to count as correct.

    Attributes:
        counts: results so far by status: "ok", "no_answer", "too_long", "timeout", "error".
        last_cause: what the latest "timeout" or "error" was about.

    Raises:
        SgpoError: the reward cannot be loaded, or its module hangs or kills the worker.
    """

    def __init__(
        self,
        reward: str = "math_verify",
        *,
        workers: int = 2,
        timeout_s: float = 10.0,
        memory_mib: int = 1024,
        max_chars: int = 200_000,
        require_box: bool = True,
        correct_above: float = 0.0,
    ) -> None:
        if workers < 1 or timeout_s <= 0 or memory_mib < 1 or max_chars < 1:
            raise SgpoError(
                f"A reward pool needs workers, timeout_s, memory_mib and max_chars above 0, "
                f"got {workers}, {timeout_s}, {memory_mib} and {max_chars}."
            )
        self.counts: Counter[str] = Counter()
        self.last_cause = ""
        self._reward = reward
        self._workers = workers
        self._timeout_s = timeout_s
        self._max_chars = max_chars
        self._require_box = require_box
        self._correct_above = correct_above
        self._worker_arguments = (reward, require_box, memory_mib)
        self._lock = threading.Lock()  # of the counters; pebble's threads take it
        self._pool_lock = threading.Lock()  # of the pool; never taken by pebble's threads, which closing waits for
        self._pending: set[Future[Outcome]] = set()
        self._begun: dict[_Task, Future[Outcome]] = {}
        self._finished_tasks = 0
        self._closed = False
        self._pool = self._new_pool()
        self._check_start()

    def begin(self, item: RewardItem) -> None:
        """Starts on an item that `score` will be asked for, so that results come while rollouts go on."""
        task = self._task(item)
        if task is not None and task not in self._begun:
            self._begun[task] = self._schedule(task)

    def score(self, items: Sequence[RewardItem]) -> list[RewardResult]:
        """One result per item, in order. Items with the same final answer to the same gold are verified once.

        Raises:
            SgpoError: every item failed with an error of the reward itself, or the workers could not be kept alive.
        """
        tasks = [self._task(item) for item in items]
        outcomes = self._run(list(dict.fromkeys(task for task in tasks if task is not None)))
        item_outcomes = [_TOO_LONG if task is None else outcomes[task] for task in tasks]
        for outcome in item_outcomes:
            self._count(outcome)
        if item_outcomes and all(outcome.broken_reward for outcome in item_outcomes):
            raise SgpoError(
                f"The reward {self._reward!r} failed on all {len(items)} completions; first cause: "
                f"{item_outcomes[0].cause}"
            )
        return [self._result(outcome) for outcome in item_outcomes]

    def submit(self, item: RewardItem) -> Future[RewardResult]:
        """The result of one item, to come. The future always gets one, "error" if the workers die or the pool closes.

        It cannot be cancelled.
        """
        result: Future[RewardResult] = Future()
        result.set_running_or_notify_cancel()

        def resolve(outcome: Outcome) -> None:
            self._count(outcome)
            result.set_result(self._result(outcome))

        task = self._task(item)
        if task is None:
            resolve(_TOO_LONG)
        else:
            self._schedule(task).add_done_callback(lambda future: resolve(self._outcome(future) or _LOST))
        return result

    def explain(self, item: RewardItem) -> Outcome:
        """The outcome of one item with the steps that led to it, within the same limits; it is not counted."""
        task = (self._reward, self._require_box, item.completion, item.gold, item.problem)
        if self._task(item) is None:
            return _TOO_LONG
        future = self._schedule(task, run=worker_process.run_explanation)
        wait([future])
        return self._outcome(future) or _LOST

    def close(self) -> None:
        """Kills the workers, busy or not. Results still to come become "error"."""
        with self._pool_lock:
            if not self._closed:
                self._closed = True
                self._stop_pool()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _result(self, outcome: Outcome) -> RewardResult:
        return replace(outcome.result, correct_above=self._correct_above)

    def _task(self, item: RewardItem) -> _Task | None:
        """What the workers need of the item, the same for items that must get the same result; None if too long."""
        if len(item.completion) > self._max_chars:
            return None
        if self._reward in BUILT_IN:
            return condense(item.completion, self._require_box), item.gold, ""
        return item.completion, item.gold, item.problem

    def _run(self, tasks: list[_Task]) -> dict[_Task, Outcome]:
        """Outcomes of all tasks; those lost together with the pool get a second chance on a new one."""
        outcomes: dict[_Task, Outcome] = {}
        for _ in range(2):
            left = [task for task in tasks if task not in outcomes]
            futures = {task: self._begun.pop(task, None) or self._schedule(task) for task in left}
            self._wait(list(futures.values()))
            for task, future in futures.items():
                if outcome := self._outcome(future):
                    outcomes[task] = outcome
            if len(outcomes) == len(tasks):
                return outcomes
        raise SgpoError(
            f"The reward workers broke down twice while scoring {len(tasks)} answers with {self._reward!r}: check the "
            f"free memory of this machine and that nothing else kills processes (last cause: {self.last_cause!r})."
        )

    def _wait(self, futures: list[Future[Outcome]]) -> None:
        """Until all are done; where nothing moves at all, the workers are replaced, which ends the futures."""
        for future in futures:
            while not future.done():
                finished_before = self._finished_tasks
                wait([future], timeout=self._timeout_s + _STALL_S)
                if future.done() or self._finished_tasks != finished_before:
                    continue
                with self._pool_lock:
                    if not self._closed:
                        self._replace_pool()

    def _schedule(
        self, task: tuple[object, ...], run: Callable[..., Outcome] = worker_process.run_reward
    ) -> Future[Outcome]:
        with self._pool_lock:
            if self._closed:
                raise SgpoError("The reward pool is closed: score before close(), or inside the with block.")
            if not self._pool.active:
                self._replace_pool()
            future = self._pool.schedule(run, args=task, timeout=self._timeout_s)
        with self._lock:
            self._pending.add(future)
        future.add_done_callback(self._finish)
        return future

    def _finish(self, future: Future[Outcome]) -> None:
        with self._lock:
            self._pending.discard(future)
            self._finished_tasks += 1

    def _outcome(self, future: Future[Outcome]) -> Outcome | None:
        """What became of a task; None where it was lost because its pool broke down or was stopped."""
        if future.cancelled():
            return None
        error = future.exception()
        if error is None:
            return future.result()
        if isinstance(error, TimeoutError):
            return Outcome(RewardResult(0.0, "timeout"), f"no result within {self._timeout_s} s")
        if isinstance(error, ProcessExpired):
            return Outcome(RewardResult(0.0, "error"), f"a reward worker died with exit code {error.exitcode}")
        if isinstance(error, (BrokenProcessPool, CancelledError)):
            return None
        return Outcome(RewardResult(0.0, "error"), f"{type(error).__name__}: {error}")

    def _count(self, outcome: Outcome) -> None:
        status = outcome.result.status
        with self._lock:
            self.counts[status] += 1
            first = bool(outcome.cause) and self.counts[status] == 1
            self.last_cause = outcome.cause or self.last_cause
        if first:
            logger.warning("First reward with status %s: %s", status, outcome.cause)

    def _new_pool(self) -> ProcessPool:
        return ProcessPool(
            max_workers=self._workers,
            initializer=worker_process.start_worker,
            initargs=self._worker_arguments,
            context=worker_process.WorkerContext(),
        )

    def _replace_pool(self) -> None:
        self._stop_pool()
        self._pool = self._new_pool()

    def _stop_pool(self) -> None:
        self._pool.stop()
        self._pool.join()
        with self._lock:
            pending = list(self._pending)
        for future in pending:  # pebble leaves them pending for ever
            future.cancel()

    def _check_start(self) -> None:
        """Waits for the first worker, so that a reward that cannot be loaded is an error now and not a reward of 0."""
        future = self._pool.schedule(worker_process.load_error)
        wait([future], timeout=_START_S)
        if not future.done():
            cause = f"it did not load within {_START_S:.0f} s"
        elif isinstance(future.exception(), BrokenProcessPool):
            cause = "the worker process died while loading it"
        else:
            cause = future.result()
        if cause:
            self.close()
            raise SgpoError(cause if self._reward in cause else f"The reward {self._reward!r} cannot be used: {cause}.")
