"""Shared by all tests: offline, the built-in model, processes as a launcher would start them."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import processes
import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
os.environ["HF_HUB_OFFLINE"] = "1"
if not torch.cuda.is_available():
    # Triton's interpreter; it must be on before anything imports triton, which `import torch` does not.
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    # What torch.compile made of an earlier version of our operators must not be found again: its key holds a forward
    # graph, but not the operators of the backward. Workers and child processes inherit the folder.
    _compiled = TemporaryDirectory(prefix="inductor-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _compiled.name


# By CPU time, longest first: a long file that begins last would leave the other processor idle.
LONGEST = (
    "train/test_trainer.py",
    "sgpo_kernels/test_backend_triton.py",
    "train/test_trainer_rollouts.py",
    "benchmarks/test_bench_acceptance.py",
    "rollout/test_process.py",
    "engine/test_weight_sync.py",
    "engine/test_vllm_families.py",
    "sgpo_kernels/test_aot.py",
    "sgpo_kernels/test_shard_bounds.py",
    "commands/test_extract.py",
    "engine/test_optimizer_states.py",
    "engine/test_zero.py",
    "rollout/test_engines.py",
    "commands/test_study.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files of LONGEST first, in that order, all others as they were collected."""
    here = Path(__file__).parent
    places = {here / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(LONGEST)))


@pytest.fixture(scope="session")
def launcher():
    return processes.launch


@pytest.fixture(scope="session")
def builtin_folder(tmp_path_factory) -> Path:
    """The quickstart model, untrained, as a Hugging Face folder."""
    from sgpo.data import builtin

    folder = tmp_path_factory.mktemp("builtin") / "model"
    builtin.save_builtin(folder, seed=0)
    return folder
