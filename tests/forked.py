"""Processes that need not import: forks of a server that has imported what a run of the command line does.

Run as a script it is that server. A line of JSON asks for a process, which is `python arguments` with the environment
given, or for the exit code of one; the answer is a line too. Forks share the seed of Python's string hashes: what must
not depend on it is compared with a process that started by itself.
"""

import contextlib
import functools
import importlib
import json
import math
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO

# Nothing of it starts threads or computes.
PRELOAD = (
    "deepspeed",
    "matplotlib.figure",
    "sgpo.commands.train",
    "sgpo.rollout.hf_engine",
    "sgpo.train.trainer",
    "torch._dynamo",
    "torchao.optim",
    "transformers.models.qwen2.tokenization_qwen2",
    "transformers.models.qwen3.modeling_qwen3",
)
POLL_S = 0.005


class Forked:
    """A process of the server, with what the tests use of `subprocess.Popen`."""

    def __init__(self, arguments: list[str], folder: Path, environment: dict[str, str]):
        self._scratch = TemporaryDirectory(prefix="forked-")
        self._output = Path(self._scratch.name, "output")
        request = {"arguments": arguments, "folder": str(folder), "output": str(self._output)}
        self.returncode: int | None = None
        self.pid: int = _ask({**request, "environment": environment})

    def poll(self) -> int | None:
        """The exit code, negative for a signal, or None while it runs."""
        if self.returncode is None:
            self.returncode = _ask({"pid": self.pid})
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = math.inf) -> tuple[str, None]:
        """Both streams together, once it has ended."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(POLL_S)
        return self._output.read_text(errors="replace"), None


@functools.cache
def _server() -> subprocess.Popen:
    """The server of this test process; it ends when its input does."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, __file__], env=environment, text=True, **pipes)


def _ask(request: dict[str, Any]) -> Any:
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


def _serve(answers: TextIO) -> dict[str, Any] | None:
    """Answers until the input ends; in a fork, what it was asked to be."""
    while line := sys.stdin.readline():
        request, answer = json.loads(line), None
        if "pid" in request:
            pid, status = os.waitpid(request["pid"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if not answer:
                answers.close()
                return request
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return None


def _become(arguments: list[str], folder: str, output: str, environment: dict[str, str]) -> None:
    with open(output, "wb") as file, open(os.devnull, "rb") as nothing:
        for source, target in ((nothing, 0), (file, 1), (file, 2)):
            os.dup2(source.fileno(), target)
    os.chdir(folder)
    own = set(os.environ.get("PYTHONPATH", "").split(os.pathsep))
    os.environ.clear()
    os.environ.update(environment)
    places = [place for place in environment["PYTHONPATH"].split(os.pathsep) if place]
    first = folder if arguments[0] in ("-m", "-c") else str(Path(arguments[0]).parent)
    sys.path[:] = [first, *places, *(place for place in sys.path if place not in own)]
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        exec(arguments[1], {"__name__": "__main__"})
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    sys.path.remove(str(Path(__file__).parent))  # its folders have the names of our packages
    for name in PRELOAD:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    wanted = _serve(replies)
    if wanted is not None:
        _become(**wanted)
