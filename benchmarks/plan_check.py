"""The planner against measured memory of the training phase, on scaled-down models (random weights, CPU).

`python -m benchmarks.plan_check [--out FILE] [--only NAME]`: each row runs in a process of its own: engine, then two
accumulated micro-batches and an optimizer step. Measured: peak resident memory above that of the process with all
libraries loaded and warmed up; malloc returns what is freed (MALLOC_MMAP_THRESHOLD_). Planned: the largest of forward,
backward and optimizer, without the plan's constant for a process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# name, hidden, layers, heads, kv heads, intermediate, vocabulary, dtype, stage, checkpointing, tokens, sequence
CASES: dict[str, tuple[Any, ...]] = {
    "1M fp32": (128, 4, 4, 4, 384, 512, "float32", 0, False, 4096, 1024),
    "8M fp32": (256, 6, 8, 4, 1024, 8192, "float32", 0, False, 4096, 1024),
    "8M fp32 twice the tokens": (256, 6, 8, 4, 1024, 8192, "float32", 0, False, 8192, 1024),
    "8M fp32 four times the tokens": (256, 6, 8, 4, 1024, 8192, "float32", 0, False, 16384, 1024),
    "8M fp32 checkpointed": (256, 6, 8, 4, 1024, 8192, "float32", 0, True, 16384, 1024),
    "8M fp32 ZeRO-2": (256, 6, 8, 4, 1024, 8192, "float32", 2, False, 8192, 1024),
    "8M fp32, 4 x vocabulary": (256, 6, 8, 4, 1024, 32768, "float32", 0, False, 8192, 1024),
    "40M fp32": (512, 8, 8, 4, 2048, 16384, "float32", 0, False, 4096, 1024),
    "40M fp32 ZeRO-2": (512, 8, 8, 4, 2048, 16384, "float32", 2, False, 4096, 1024),
    "40M bf16": (512, 8, 8, 4, 2048, 16384, "bfloat16", 0, True, 4096, 1024),
    "40M bf16 ZeRO-2": (512, 8, 8, 4, 2048, 16384, "bfloat16", 2, True, 4096, 1024),
    "130M fp32 checkpointed": (768, 12, 12, 4, 3072, 32768, "float32", 0, True, 2048, 1024),
    "200M fp32 checkpointed": (1024, 14, 16, 4, 3584, 32768, "float32", 0, True, 2048, 1024),
}


def config_of(case: tuple[Any, ...]) -> Any:
    from sgpo.config import Config

    *_, dtype, stage, checkpointing, tokens, sequence = case
    return Config.model_validate(
        {
            "model": {"path": "x", "dtype": dtype, "gradient_checkpointing": checkpointing},
            "data": {"train": "builtin", "max_prompt_tokens": 32},
            "rollout": {"engine": "hf", "max_new_tokens": sequence - 32},
            "engine": {"zero_stage": stage, "micro_batch_tokens": tokens},
        }
    )


def planned(case: tuple[Any, ...]) -> dict[str, float]:
    """Bytes by phase: the trainer's terms alone, without a rollout engine."""
    from sgpo.planning.architectures import Architecture
    from sgpo.planning.memory import Place, Planner

    hidden, layers, heads, kv, intermediate, vocab = case[:6]
    sizes = Architecture(hidden, layers, heads, kv, intermediate, vocab, True, hidden // heads, True)
    planner = Planner(config_of(case), sizes, Place(None, 2.0**60))
    kept = planner.states() | planner.gradients()
    parts = {"forward": planner.forward(), "backward": planner.backward(), "optimizer": planner.update()}
    return {name: sum((kept | terms).values()) for name, terms in parts.items()}


def measure(name: str) -> dict[str, Any]:
    """In this process: the peak of each phase above the base, in bytes."""
    import torch

    from sgpo import assembly
    from sgpo.data.packing import collate_training
    from sgpo.engine.zero import init_distributed
    from sgpo.schema import TrainSequence
    from sgpo.steps import bound_objective

    def build(case: tuple[Any, ...]) -> Any:
        from transformers import Qwen2Config, Qwen2ForCausalLM

        hidden, layers, heads, kv, intermediate, vocab, dtype, *_ = case
        torch.manual_seed(0)
        sizes = Qwen2Config(
            hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv,
            intermediate_size=intermediate, vocab_size=vocab, tie_word_embeddings=True,
            max_position_embeddings=65536,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            Qwen2ForCausalLM(sizes).to(getattr(torch, dtype)).save_pretrained(folder)
            config = config_of(case)
            return config, assembly.build_engine(config, Path(folder), config.optim, torch.device("cpu"))

    def step(config: Any, engine: Any, case: tuple[Any, ...]) -> dict[str, float]:
        tokens, sequence = case[-2:]
        prompt, new = (3,) * 32, (4,) * (sequence - 32)
        one = TrainSequence(prompt, new, target_weight=1e-3, teacher_prompt_ids=prompt)
        micro = collate_training([one] * (tokens // sequence), 0, with_teacher=True)
        objective, peaks = assembly.policy_objective(config), {}
        for _ in range(2):
            _reset()
            loss, _ = engine.loss(bound_objective(objective, micro), micro.student, micro.teacher)
            peaks["forward"] = _peak()
            _reset()
            engine.backward(loss)
            del loss
            peaks["backward"] = _peak()
        _reset()
        engine.step(1e-6)
        peaks["optimizer"] = _peak()
        return peaks

    init_distributed(600)
    warm = (64, 2, 4, 4, 128, 256, *CASES[name][6:9], 256, 128)
    config, engine = build(warm)
    step(config, engine, warm)
    engine.close()
    del engine
    _reset()
    base = _peak()
    config, engine = build(CASES[name])
    step(config, engine, CASES[name])  # moments are made by the first step
    peaks = {phase: peak - base for phase, peak in step(config, engine, CASES[name]).items()}
    engine.close()
    return {"case": name, "measured_mib": {k: round(v / 2**20, 1) for k, v in peaks.items()}}


def _peak() -> float:
    """Largest resident memory of this process since the last reset, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith("VmHWM"))


def _reset() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def run(name: str) -> dict[str, Any]:
    """One row, measured in a child process."""
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1",
    }  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.plan_check", "--child", name],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if result.returncode:
        raise SystemExit(result.stderr[-3000:])
    row = json.loads(result.stdout.strip().splitlines()[-1])
    plan = {phase: round(size / 2**20, 1) for phase, size in planned(CASES[name]).items()}
    peak, expected = max(row["measured_mib"].values()), max(plan.values())
    return row | {"planned_mib": plan, "ratio": round(expected / peak, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--child", choices=CASES)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child)))
        return
    for name in arguments.only:
        row = json.dumps(run(name))
        print(row, flush=True)
        if arguments.out:
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(row + "\n")


if __name__ == "__main__":
    main()
