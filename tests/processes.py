"""Starting processes as a launcher would, for the tests."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def python_path() -> str:
    return os.pathsep.join([str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")])


def launch(arguments: list[str], *, processes: int = 1, timeout_s: float = 600, check: bool = True) -> list[str]:
    """Runs `python arguments` as so many ranks; returns their combined output, rank by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = [
        subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": python_path(),
                "OMP_NUM_THREADS": "1",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank in range(processes)
    ]
    try:
        outputs = [process.communicate(timeout=timeout_s)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    if check:
        for process, output in zip(running, outputs, strict=True):
            assert process.returncode == 0, output[-4000:]
    return outputs
