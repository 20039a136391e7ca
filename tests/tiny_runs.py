"""Whole runs of the command line on the built-in task, small enough for tests.

The model is untrained, so a plug-in reward with variance stands in for correctness: the loop, not learning, is tested.
"""

import hashlib
import json
import subprocess
from pathlib import Path

import yaml
from forked import Forked
from processes import PATIENCE_S, start_ranks

REWARD = """
def even(completion, answer, problem):
    return float(len(completion.split()) % 2 == 0)

def right(completion, answer, problem):
    return 1.0

def graded(completion, answer, problem):
    return len(completion.split()) % 3 / 2
"""

BASE = {
    "run": {"name": "tiny", "seed": 3},
    "model": {"path": "builtin", "dtype": "float32"},
    "data": {"train": "builtin", "eval": "builtin", "train_limit": 64, "eval_limit": 8, "max_prompt_tokens": 64},
    "rollout": {"engine": "hf", "problems_per_step": 4, "n_auto": 4, "n_guided": 3, "top_p": 1.0, "max_new_tokens": 8},
    "reward": {"kind": "plugin:even", "workers": 1, "timeout_s": PATIENCE_S},
    "optim": {"lr": 1e-3},
    "engine": {"micro_batch_tokens": 256},
    "train": {"max_steps": 4},
    "eval": {"samples": 1, "max_new_tokens": 8, "temperature": 1.0},
    "checkpoint": {"every_steps": 1},
}
WARMUP = {"enabled": True, "data": "builtin", "limit": 64, "epochs": 2, "batch_size": 16, "validate_every": 2,
          "max_tokens": 128, "optim": {"lr": 1e-3}}  # fmt: skip


def start(folder: Path, *overrides: str, config: dict = BASE, **options) -> list[subprocess.Popen] | list[Forked]:
    """`sgpo train` in `folder` with the plug-in reward beside it."""
    (folder / "plugin.py").write_text(REWARD)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return start_ranks(["-m", "sgpo.cli", "train", "config.yaml", *overrides], folder=folder, **options)


def finish(folder: Path, *overrides: str, expect: int = 0, **options) -> str:
    running = start(folder, *overrides, **options)
    outputs = [process.communicate(timeout=PATIENCE_S)[0] for process in running]
    assert {process.returncode for process in running} == {expect}, outputs[0][-3000:]
    return outputs[0]


def finish_all(folder: Path, runs: dict[str, list[str]], config: dict = BASE) -> str:
    """Runs one after the other, by name and overrides, in one process; all must succeed. Nobody looks at their reports,
    whose plots take as long as all the rest."""
    (folder / "plugin.py").write_text(REWARD)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    commands = [["train", "config.yaml", "--run.name", name, *overrides] for name, overrides in runs.items()]
    program = (
        "import sys; from sgpo.cli import main; from sgpo.train import trainer; trainer.write_report = str; "
        f"sys.exit(any([main(words) for words in {commands!r}]))"
    )
    (running,) = start_ranks(["-c", program], folder=folder)
    output = running.communicate(timeout=PATIENCE_S)[0]
    assert running.returncode == 0, output[-3000:]
    return output


def digest(run: Path) -> str:
    return hashlib.sha256((run / "final" / "model.safetensors").read_bytes()).hexdigest()


def rows(run: Path, phase: str = "train") -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["phase"] == phase]
