"""Starting processes as a launcher would, for the tests."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The time limits of the tests, for a machine however busy. Whoever waits for what must come waits so long, and nothing
# is said about speed by it:
PATIENCE_S = 1800.0
# What must not wait for a limit of PATIENCE_S (or of a day) is over by then:
PROMPT_S = 300.0


def wait_until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {PATIENCE_S:.0f} s"
        time.sleep(0.005)


def start_ranks(
    arguments: list[str], *, processes: int = 1, folder: Path = ROOT, preexec: Callable[[], None] | None = None
) -> list[subprocess.Popen]:
    """Starts `python arguments` in `folder` as so many ranks, one thread each; output is piped."""
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
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            cwd=folder,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=preexec,
        )
        for rank in range(processes)
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
