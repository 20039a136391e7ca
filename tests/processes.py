"""Starting processes as a launcher would, for the tests."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from forked import Forked

ROOT = Path(__file__).resolve().parents[1]
_FACTOR = "SGPO_TESTS_FACTOR"  # in the environment: what the first process of a session has measured
_CALIBRATION_S = 0.1  # of CPU time


def scaled(seconds: float) -> float:
    """A time limit: what takes `seconds` on an idle machine may take so much longer as this one is busy. Every limit
    of the tests goes through here (tests/test_time_limits.py)."""
    return seconds * max(_calibrated(), os.getloadavg()[0] / (os.cpu_count() or 1))


def _calibrated() -> float:
    """Wall time over CPU time of a short loop, at least 1: how long this process waits for its turn."""
    if _FACTOR not in os.environ:
        start, cpu = time.monotonic(), time.process_time()
        while (spent := time.process_time() - cpu) < _CALIBRATION_S:
            pass
        os.environ[_FACTOR] = str(max(1.0, (time.monotonic() - start) / spent))
    return float(os.environ[_FACTOR])


# Whoever waits for what must come waits so long, and nothing is said about speed by it:
PATIENCE_S = scaled(1800.0)
# What must not wait for a limit of PATIENCE_S (or of a day) is over by then:
PROMPT_S = scaled(300.0)


def wait_until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {PATIENCE_S:.0f} s"
        time.sleep(0.005)


def start_ranks(
    arguments: list[str],
    *,
    processes: int = 1,
    folder: Path = ROOT,
    anew: bool = False,
    preexec: Callable[[], None] | None = None,
) -> list[subprocess.Popen] | list[Forked]:
    """Starts `python arguments` in `folder` as so many ranks, one thread each; output is kept. Forks of a process that
    has imported, unless `anew`, with a `preexec`, or where there is CUDA, which a fork cannot use."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    if not (anew or preexec or torch.cuda.is_available()):
        return [Forked(arguments, folder, environment) for environment in ranks]
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=preexec,
        )
        for environment in ranks
    ]


def launch(arguments: list[str], *, processes: int = 1) -> list[str]:
    """Runs `python arguments` as so many ranks, all of which must succeed; returns their outputs in rank order."""
    running = start_ranks(arguments, processes=processes)
    try:
        outputs = [process.communicate(timeout=PATIENCE_S)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    for process, output in zip(running, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]
    return outputs
