"""Starting processes as a launcher would, for the tests."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


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


def launch(arguments: list[str], *, processes: int = 1, timeout_s: float = 600) -> list[str]:
    """Runs `python arguments` as so many ranks, all of which must succeed; returns their outputs in rank order."""
    running = start_ranks(arguments, processes=processes)
    try:
        outputs = [process.communicate(timeout=timeout_s)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    for process, output in zip(running, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]
    return outputs
