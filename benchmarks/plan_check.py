"""The planner against measured memory of the training phase, on scaled-down models (random weights, CPU).

`python -m benchmarks.plan_check [--out FILE] [--only NAME]`: each row runs in a process of its own: engine, then a
short micro-batch, a full one and an optimizer step. Measured: peak resident memory above that of the process with all
libraries loaded and warmed up by a tiny model (in bf16 by the case itself: oneDNN keeps compiled kernels for the shapes
of each product, 30 to 60 MiB); malloc returns what is freed (MALLOC_MMAP_THRESHOLD_). Planned: the same three phases,
without the plan's constant for a process.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# hidden, layers, heads, kv heads, intermediate, vocabulary
SMALLEST = (128, 4, 4, 4, 384, 512)
SMALL = (256, 6, 8, 4, 1024, 8192)
WIDE_HEAD = (256, 6, 8, 4, 1024, 32768)
MEDIUM = (512, 8, 8, 4, 2048, 16384)
LARGE = (768, 12, 12, 4, 3072, 32768)
LARGEST = (1024, 14, 16, 4, 3584, 32768)


class Case(NamedTuple):
    """A model's sizes, the tokens of a micro-batch and of each sequence in it, keys of the config."""

    sizes: tuple[int, ...]
    tokens: int
    sequence: int
    keys: dict[str, Any]


def case(
    sizes: tuple[int, ...], tokens: int, sequence: int = 1024, *, bf16: bool = False, stage: int = 0,
    checkpointing: bool = False, model: dict[str, Any] | None = None, engine: dict[str, Any] | None = None,
) -> Case:  # fmt: skip
    dtype = "bfloat16" if bf16 else "float32"
    keys = {
        "model": {"dtype": dtype, "gradient_checkpointing": checkpointing} | (model or {}),
        "engine": {"zero_stage": stage} | (engine or {}),
    }
    return Case(sizes, tokens, sequence, keys)


LORA = {"lora": {"rank": 16}}
CASES = {
    "1M fp32": case(SMALLEST, 4096),
    "1M fp32 ZeRO-2, LoRA, checkpointed, tiled MLP": case(
        SMALLEST, 8192, stage=2, checkpointing=True, model=LORA | {"mlp_tile_tokens": 1024}
    ),
    "1M fp32 ZeRO-3, packed": case(SMALLEST, 2048, 512, stage=3, engine={"packing": "packed"}),
    "8M fp32": case(SMALL, 4096),
    "8M fp32 twice the tokens": case(SMALL, 8192),
    "8M fp32 four times the tokens": case(SMALL, 16384),
    "8M fp32 sequences of 4096": case(SMALL, 8192, 4096),
    "8M fp32 packed": case(SMALL, 8192, engine={"packing": "packed"}),
    "8M fp32 checkpointed": case(SMALL, 16384, checkpointing=True),
    "8M fp32 checkpointed, tiled MLP": case(SMALL, 16384, checkpointing=True, model={"mlp_tile_tokens": 1024}),
    "8M fp32 tiled MLP": case(SMALL, 8192, model={"mlp_tile_tokens": 1024}),
    "8M fp32 DoRA, checkpointed": case(SMALL, 4096, checkpointing=True, model={"lora": {"rank": 16, "dora": True}}),
    "8M fp32 ZeRO-2": case(SMALL, 8192, stage=2),
    "8M fp32, 4 x vocabulary": case(WIDE_HEAD, 8192),
    "40M fp32": case(MEDIUM, 4096),
    "40M fp32 LoRA": case(MEDIUM, 4096, model=LORA),
    "40M fp32 ZeRO-1": case(MEDIUM, 4096, stage=1),
    "40M fp32 ZeRO-2": case(MEDIUM, 4096, stage=2),
    "40M fp32 ZeRO-3": case(MEDIUM, 4096, stage=3),
    "8M bf16": case(SMALL, 4096, bf16=True, checkpointing=True),
    "8M bf16 LoRA": case(SMALL, 4096, bf16=True, checkpointing=True, model=LORA),
    "8M bf16 ZeRO-1": case(SMALL, 4096, bf16=True, stage=1, checkpointing=True),
    "8M bf16 ZeRO-2, Adam on the host": case(
        SMALL, 4096, bf16=True, stage=2, checkpointing=True, engine={"optimizer_state": "cpu_offload"}
    ),
    "8M bf16 ZeRO-2, Adam in 8 bits": case(
        SMALL, 4096, bf16=True, stage=2, checkpointing=True, engine={"optimizer_state": "8bit"}
    ),
    "8M bf16 ZeRO-3": case(SMALL, 4096, bf16=True, stage=3, checkpointing=True),
    "40M bf16 ZeRO-2": case(MEDIUM, 2048, bf16=True, stage=2, checkpointing=True),
    "130M fp32 checkpointed": case(LARGE, 2048, checkpointing=True),
    "200M fp32 checkpointed": case(LARGEST, 2048, checkpointing=True),
}


def config_of(case: Case) -> Any:
    from sgpo.config import Config

    return Config.model_validate(
        {
            "model": {"path": "x"} | case.keys["model"],
            "data": {"train": "builtin", "max_prompt_tokens": 32},
            "rollout": {"engine": "hf", "max_new_tokens": case.sequence - 32},
            "engine": {"micro_batch_tokens": case.tokens} | case.keys["engine"],
        }
    )


def planned(case: Case) -> dict[str, float]:
    """Bytes by phase: the trainer's terms alone, without a rollout engine and the constants of a process."""
    from sgpo.planning.architectures import Architecture
    from sgpo.planning.memory import Place, Planner

    hidden, layers, heads, kv, intermediate, vocab = case.sizes
    sizes = Architecture(hidden, layers, heads, kv, intermediate, vocab, True, hidden // heads, True)
    planner = Planner(config_of(case), sizes, Place(None, 2.0**60))
    on_host = sum(planner.host_states().values())
    return {name: sum(terms.values()) + on_host for name, terms in planner.training().items()}


def measure(name: str) -> dict[str, Any]:
    """In this process: the peak of each phase above the base, in bytes."""
    import torch

    from sgpo.builders.loss import training_loss
    from sgpo.builders.model_engine import build_engine
    from sgpo.engine.batching import collate_training
    from sgpo.engine.zero import init_distributed
    from sgpo.types import TrainSequence

    def build(case: Case) -> Any:
        from transformers import Qwen2Config, Qwen2ForCausalLM

        hidden, layers, heads, kv, intermediate, vocab = case.sizes
        torch.manual_seed(0)
        sizes = Qwen2Config(
            hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv,
            intermediate_size=intermediate, vocab_size=vocab, tie_word_embeddings=True,
            max_position_embeddings=65536,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            config = config_of(case)
            Qwen2ForCausalLM(sizes).to(getattr(torch, config.model.dtype)).save_pretrained(folder)
            return config, build_engine(config, Path(folder), config.optim, torch.device("cpu"))

    def step(config: Any, engine: Any, case: Case) -> dict[str, float]:
        prompt, new = (3,) * 32, (4,) * (case.sequence - 32)
        one = TrainSequence(prompt, new, distill_weight=1e-3, teacher_prompt_ids=prompt)
        packed = config.engine.packing == "packed"
        objective, peaks = training_loss(config), {}
        for count in (1, case.tokens // case.sequence):  # the gradients of the first are there beside the second
            micro = collate_training([one] * count, 0, with_teacher=True, packed=packed)
            _reset()
            loss, _ = engine.loss(objective, micro)
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
    warm = Case((64, 2, 4, 4, 128, 256), 256, 128, CASES[name].keys)
    if warm.keys["model"]["dtype"] == "bfloat16":
        # DeepSpeed's stage 3 does not let go of its tensors when it is closed; the products are those of stage 2.
        engine_keys = warm.keys["engine"]
        warm = CASES[name]._replace(
            keys=warm.keys | {"engine": engine_keys | {"zero_stage": min(2, engine_keys["zero_stage"])}}
        )
    config, engine = build(warm)
    step(config, engine, warm)
    engine.close()
    del engine
    gc.collect()
    left = sum(x.nbytes for x in gc.get_objects() if type(x) is torch.Tensor)
    assert left < 2**22, f"{left} bytes of the warm-up are still there and would be taken off"
    _reset()
    base = _peak()
    config, engine = build(CASES[name])
    # The engine's own start-up test has made a step: Adam's moments are there.
    peaks = {phase: peak - base for phase, peak in step(config, engine, CASES[name]).items()}
    engine.close()
    return {"case": name, "measured_mib": {k: round(v / 2**20, 1) for k, v in peaks.items()}}


def _peak() -> float:
    """Largest resident memory of this process since the last reset, in bytes (Linux). Pages of files are among it:
    frozen weights stay in the mapped checkpoint."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith("VmHWM"))


def _reset() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def measured(names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row of each case, from a process that is a fork of one with the libraries loaded. Raises RuntimeError where
    one fails."""
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.plan_check", "--child", *names]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as child,
    ):
        assert child.stdout is not None
        yield from (compared(json.loads(line)) for line in child.stdout if line.startswith('{"case"'))
        if child.wait():
            errors.seek(0)
            raise RuntimeError(errors.read()[-3000:])


def measure_in_forks(names: Sequence[str]) -> None:
    """Prints a row of each, measured in a fork of this process."""
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    import sgpo.builders.loss
    import sgpo.builders.model_engine
    import sgpo.builders.rollouts
    import sgpo.builders.task  # noqa: F401

    for name in names:
        pid = os.fork()
        if not pid:
            try:
                print(json.dumps(measure(name)), flush=True)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if os.waitpid(pid, 0)[1]:
            raise SystemExit(1)


def compared(row: dict[str, Any]) -> dict[str, Any]:
    """`row` with the plan beside it: planned / measured of every phase, and of the peaks."""
    measured = row["measured_mib"]
    plan = {phase: round(size / 2**20, 1) for phase, size in planned(CASES[row["case"]]).items()}
    ratios = {phase: round(plan[phase] / measured[phase], 3) for phase in measured}
    peak = round(max(plan.values()) / max(measured.values()), 3)
    return row | {"planned_mib": plan, "ratios": ratios, "ratio": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--child", nargs="+", choices=CASES)
    arguments = parser.parse_args()
    if arguments.child:
        measure_in_forks(arguments.child)
        return
    from benchmarks import measure

    common = measure.origin("cpu", "benchmarks.plan_check")
    for row in measured(arguments.only):
        print(json.dumps(row), flush=True)
        if arguments.out:
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row | common) + "\n")


if __name__ == "__main__":
    main()
