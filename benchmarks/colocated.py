"""Trainer and vLLM in one process at a 7B shape: sync, rollouts, sleep, a training step, and the same again.

    python -m benchmarks.colocated --out FILE.jsonl [--state 8bit] [--tokens 4096]
    python -m benchmarks.colocated --out FILE.jsonl --tiny       the same code with a small model, on a CPU too

The model is that of benchmarks.train_step, with random weights; vLLM starts with dummy weights and gets the trainer's
by the sync that training uses, checksums and log-prob probe included. One row: per stage the seconds of both rounds,
the highest peak in MiB and planned / measured; bytes and log-prob gap of the syncs, sampled tokens/s. An error,
such as a gap beyond the tolerance or stale rollouts, ends it with exit code 1 and without a row.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.train_step import config_of, make_model, training_step
from sgpo.builders.model_engine import engine_on
from sgpo.builders.rollouts import vllm_options
from sgpo.engine.weight_sync import PolicySampler
from sgpo.engine.zero import init_distributed
from sgpo.rollout.vllm_engine import VllmEngine
from sgpo.train.memory_vs_plan import MemoryTracker, planned_peak
from sgpo.train.rollout_batch import check_version
from sgpo.train.step_metrics import Clock
from sgpo.types import RolloutRequest, SamplingParams, SgpoError
from sgpo.utils.distributed import Meter

_EOS = 2


def main() -> int:
    parser = argparse.ArgumentParser(description="A step of a 7B shape beside vLLM, in one process.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="a small model")
    parser.add_argument("--state", default="8bit", help="engine.optimizer_state")
    parser.add_argument("--tokens", type=int, help="of a sequence; default 4096 (tiny: 128)")
    parser.add_argument("--rollouts", type=int, default=32)
    parser.add_argument("--share", type=float, default=0.5, help="rollout.vllm.gpu_memory_utilization")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not options.tiny:
        print("error: benchmarks.colocated without a GPU is for --tiny only; 7B would take hours.", file=sys.stderr)
        return 2
    common = measure.origin("cuda" if on_gpu else "cpu", "benchmarks.colocated")
    try:
        with tempfile.TemporaryDirectory() as folder:
            row = run(options, Path(folder))
    except (SgpoError, torch.OutOfMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(row, flush=True)
    with options.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**row, **common}) + "\n")
    return 0


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both rounds; the second one samples from weights that the step of the first one changed."""
    device = init_distributed(300)
    shape, tokens = ("tiny", options.tokens or 128) if options.tiny else ("qwen2.5-7b", options.tokens or 4096)
    vllm = {
        "gpu_memory_utilization": options.share,
        "enforce_eager": True,
        "kv_cache_mib": 64 if options.tiny else None,
    }
    config = config_of(folder, options.state, tokens, engine="vllm", vllm=vllm)
    lm = make_model(shape, device, folder)
    planned = planned_peak(config, folder)
    engine = engine_on(config, lm, config.optim, device)
    sampler = VllmEngine(
        folder, eos_ids=[_EOS], dtype="bfloat16", options=vllm_options(config, folder, from_scratch=True)
    )
    probe = tuple(range(3, 67))
    synced = PolicySampler(engine, sampler, probe_ids=probe, tolerance=0.1, token_budget=tokens, pad_id=0)
    requests = [RolloutRequest(i, "auto", 0, (3, 4 + i, 5), seed=i) for i in range(options.rollouts)]
    sampling = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=tokens // 4)
    tracker, peaks = MemoryTracker(planned, synced.asleep_bytes), Meter()
    clocks, reports, sampled, norms = [], [], 0, []

    def stage(name: str) -> None:
        peaks.max(name, tracker.read() or 0.0)
        clocks[-1].stage(name)

    try:
        for step in range(2):
            clocks.append(Clock(Meter()))
            reports.append(synced.sync(step))
            stage("sync")
            rollouts = synced.generate(requests, sampling)
            stage("rollout")
            check_version(rollouts, step, behind=0)
            sampled += sum(len(rollout.completion_ids) for rollout in rollouts)
            synced.sleep()
            stage("sleep")
            norms.append(training_step(engine, config, tokens)[2])
            stage("train")
        memory = tracker.summary()
    finally:
        synced.close()
        engine.close()
    seconds = [{name: end - start for name, start, end in clock.spans} for clock in clocks]
    return {
        "what": "colocated",
        "shape": shape,
        "optimizer_state": options.state,
        "tokens": tokens,
        "gpu_memory_utilization": options.share,
        "seconds": seconds,
        "peak_mib": peaks.reduce(),
        "memory": memory,
        "syncs": [asdict(report) for report in reports],
        "rollout_tokens_per_s": sampled / sum(found["rollout"] for found in seconds),
        "grad_norms": norms,
    }


if __name__ == "__main__":
    sys.exit(main())
