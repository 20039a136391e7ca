"""One SGPO training step of a real shape, by the trainer's own engine: time and peak memory of each phase.

    python -m benchmarks.train_step --out FILE.jsonl [--shape qwen2.5-3b] [--states full,8bit] [--tokens 4096,16384]
    python -m benchmarks.train_step --out FILE.jsonl --tiny      the same code with a small model, on a CPU too

The model has random weights, made on the device from the numbers of Qwen2.5; nothing is downloaded. A step is two
policy completions and one distilled completion with its teacher pass, each of `tokens` tokens and alone in its
micro-batch. A row per optimizer state and length: phase -> seconds, GiB alive before and peak GiB beyond (on a CPU only
the latter); the trainer's peaks by the planner of `sgpo plan`, and on a GPU planned / measured. A state that does not
fit, on the host by that planner, or whose package is not installed is a row that says so.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from sgpo.builders.loss import training_loss
from sgpo.builders.model_engine import engine_on
from sgpo.config import Config
from sgpo.engine.step import micro_batches
from sgpo.engine.zero import ZeroEngine, init_distributed
from sgpo.planning.architectures import find_architecture
from sgpo.planning.memory import PROCESS, Place, Planner
from sgpo.types import SgpoError, TrainSequence

GIB = 1 << 30
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-7b": {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768,
    },
    "qwen2.5-3b": {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 2, "max_position_embeddings": 32768,
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512,
    },
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="One SGPO training step of a real shape.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="qwen2.5-7b")
    parser.add_argument("--tiny", action="store_const", const="tiny", dest="shape", help="a small model: --shape tiny")
    parser.add_argument("--states", default="full,8bit,cpu_offload", help="of engine.optimizer_state, in this order")
    parser.add_argument("--tokens", help="lengths, ascending; default 4096,16384,32768 (tiny: 64,128)")
    parser.add_argument("--seconds", type=float, default=600, help="no new row is begun after so long")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: benchmarks.train_step --device cuda needs a GPU that torch can see.", file=sys.stderr)
        return 2
    if options.device == "cpu" and options.shape != "tiny":
        print("error: benchmarks.train_step on a CPU is for --tiny only; others would take hours.", file=sys.stderr)
        return 2
    if options.device == "cpu":  # the CPU's memory meter sees every operation, which a compiled step hides
        torch.compiler.set_stance("force_eager")
    began = time.monotonic()
    lengths = options.tokens or ("64,128" if options.shape == "tiny" else "4096,16384,32768")
    tokens = [int(n) for n in lengths.split(",")]
    device, common = init_distributed(300), measure.origin(options.device, "benchmarks.train_step")
    with tempfile.TemporaryDirectory() as folder:
        for state in options.states.split(","):
            for row in rows_of(options.shape, state, tokens, device, Path(folder), until=began + options.seconds):
                print(row, flush=True)
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({**row, **common}) + "\n")
    return 0


def rows_of(
    shape: str, state: str, lengths: list[int], device: torch.device, folder: Path, *, until: float
) -> Iterator[dict[str, Any]]:
    """A row per length; those that do not fit or for which no time is left say why in `not_run`."""
    same = {"what": "train_step", "shape": shape, "optimizer_state": state}
    if time.monotonic() > until:
        yield {**same, "not_run": "no time is left"}
        return
    if state == "8bit" and importlib.util.find_spec("torchao") is None:
        yield {**same, "not_run": "torchao is not installed"}
        return
    config = config_of(folder, state, max(lengths))
    numbers = _write_numbers(shape, folder)
    if (lacking := _missing_host_gib(config, folder, device)) > 0:
        yield {**same, "not_run": f"the host lacks {lacking:.0f} GiB"}
        return
    try:
        lm = _model_of(numbers, device)
        engine, start = _measured(partial(engine_on, config, lm, config.optim, device), device)
    except (torch.OutOfMemoryError, SgpoError) as error:
        yield {**same, "not_run": " ".join(str(error).split())[:200]}
        return
    del lm
    tokens = 0
    try:
        for tokens in lengths:
            if time.monotonic() > until:
                yield {**same, "tokens": tokens, "not_run": "no time is left"}
                continue
            config = config_of(folder, state, tokens)
            phases, loss, norm = training_step(engine, config, tokens)
            peaks = planned_peaks(config, folder, device)
            yield {
                **same,
                "tokens": tokens,
                "loss": loss,
                "grad_norm": norm,
                "phases": {"start": start, **phases},
                "planned_gib": peaks,
                "planned_over_measured": _ratios(peaks, phases) if device.type == "cuda" else None,
                "host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            }
    except torch.OutOfMemoryError as error:  # longer ones will not fit either
        yield {**same, "tokens": tokens, "not_run": " ".join(str(error).split())[:200]}
    finally:
        engine.close()
        del engine
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def make_model(shape: str, device: torch.device, folder: Path) -> Any:
    """A model of `shape` with random bf16 weights, made on the device; its config.json is written to `folder`."""
    return _model_of(_write_numbers(shape, folder), device)


def _write_numbers(shape: str, folder: Path) -> Any:
    from transformers import Qwen2Config

    numbers = Qwen2Config(**SHAPES[shape], tie_word_embeddings=False, architectures=["Qwen2ForCausalLM"])
    numbers.save_pretrained(folder)
    return numbers


def _model_of(numbers: Any, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)  # every optimizer state starts from the same weights
    with torch.device(device):
        return AutoModelForCausalLM.from_config(numbers, dtype=torch.bfloat16, attn_implementation="sdpa")


def config_of(folder: Path, state: str, tokens: int, **rollout: Any) -> Config:
    """A run whose longest sequence has `tokens` tokens, a quarter of them the prompt, alone in its micro-batch."""
    return Config.model_validate(
        {
            "model": {"path": str(folder), "dtype": "bfloat16", "gradient_checkpointing": True},
            "data": {"train": "builtin", "max_prompt_tokens": tokens // 4},
            "rollout": {"engine": "hf", "max_new_tokens": tokens - tokens // 4, **rollout},
            "engine": {"zero_stage": 2, "optimizer_state": state, "micro_batch_tokens": tokens},
        }
    )


def make_sequences(tokens: int, vocabulary: int) -> list[TrainSequence]:
    """Two policy completions and a distilled one; a quarter of the tokens is the prompt."""
    generator = torch.Generator().manual_seed(tokens)
    prompt = tokens // 4

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocabulary, (count,), generator=generator).tolist())

    weight = 1.0 / (2 * (tokens - prompt))
    policy = [TrainSequence(ids(prompt), ids(tokens - prompt), advantage=a, policy_weight=weight) for a in (1.0, -1.0)]
    # The guided prompt fills `tokens`; the plain one lacks the strategy.
    distilled = TrainSequence(
        ids(prompt // 2), ids(tokens - prompt), distill_weight=weight, teacher_prompt_ids=ids(prompt)
    )
    return [*policy, distilled]


def training_step(engine: ZeroEngine, config: Config, tokens: int) -> tuple[dict[str, Any], float, float]:
    """(phases, loss, gradient norm) of `optimizer_step`, with a clock and a memory meter between its parts."""
    objective, device = training_loss(config), engine.device
    sequences = make_sequences(tokens, engine.model.lm.config.vocab_size)
    phases: dict[str, Any] = {}
    total = 0.0
    for _, micro in micro_batches(sequences, token_budget=tokens, pad_id=0):
        micro = micro.to(device)
        part = "teacher_and_forward" if micro.teacher is not None else "forward"

        (loss, _stats), cost = _measured(lambda micro=micro: engine.loss(objective, micro), device)
        _add(phases, part, cost)
        _, cost = _measured(lambda loss=loss: engine.backward(loss), device)
        _add(phases, "backward", cost)
        total += float(loss.detach())
    norm, cost = _measured(lambda: engine.step(config.optim.lr), device)
    _add(phases, "optimizer", cost)
    return phases, total, norm


def planned_peaks(config: Config, folder: Path, device: torch.device) -> dict[str, float]:
    """GiB on the device by phase: the terms of the trainer alone, as torch's allocator sees them."""
    training = _planner(config, folder, device).training()
    return {name: sum(terms.values()) / GIB for name, terms in training.items()}


def _planner(config: Config, folder: Path, device: torch.device) -> Planner:
    place = Place(float(torch.cuda.mem_get_info()[1]) if device.type == "cuda" else None, 0.0)
    return Planner(config, find_architecture(str(folder)), place)


def _ratios(planned: dict[str, float], phases: dict[str, Any]) -> dict[str, float]:
    peak = {name: cost["alive_gib"] + cost["peak_beyond_gib"] for name, cost in phases.items()}
    peak["forward"] = max(peak["forward"], peak["teacher_and_forward"])
    return {name: gib / peak[name] for name, gib in planned.items()}


def _measured(run: Callable[[], Any], device: torch.device) -> tuple[Any, dict[str, float | None]]:
    on_gpu = device.type == "cuda"
    alive = torch.cuda.memory_allocated() / GIB if on_gpu else None
    seconds = [0.0]

    def timed() -> Any:
        began = time.perf_counter()
        result = run()
        if on_gpu:
            torch.cuda.synchronize()
        seconds[0] = time.perf_counter() - began
        return result

    result, peak_mib = measure.with_peak(timed, device.type)
    return result, {"seconds": seconds[0], "alive_gib": alive, "peak_beyond_gib": peak_mib / 1024}


def _add(phases: dict[str, Any], name: str, cost: dict[str, float | None]) -> None:
    """Seconds add up over micro-batches; of memory the one with the highest peak counts."""
    before = phases.get(name)
    if before is None:
        phases[name] = cost
        return
    highest = max(before, cost, key=lambda c: (c["alive_gib"] or 0.0) + (c["peak_beyond_gib"] or 0.0))
    phases[name] = {**highest, "seconds": (before["seconds"] or 0.0) + (cost["seconds"] or 0.0)}


def _missing_host_gib(config: Config, folder: Path, device: torch.device) -> float:
    """What the plan has on the host beyond what is free; a host without memory kills without a word."""
    planned = sum(_planner(config, folder, device).host_states().values())
    free = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        if line.startswith("MemAvailable")
    )
    return (planned + PROCESS - free) / GIB if planned else 0.0


if __name__ == "__main__":
    sys.exit(main())
