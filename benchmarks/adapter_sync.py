"""Adapters alone against merged weights: bytes and time of a weight sync, gap on the probe, time per sampled token.

python -m benchmarks.adapter_sync MODEL_FOLDER --engine hf|vllm [--dtype bfloat16] [--dora]

Both kinds of engine in one process, in turn, beside the same trainer, whose adapters are random (B of deviation 0.01).
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from sgpo.builders.rollouts import rollout_engine
from sgpo.config import Config
from sgpo.engine.weight_sync import PolicySampler
from sgpo.engine.zero import ZeroEngine, init_distributed
from sgpo.model.loading import load_causal_lm
from sgpo.model.lora import add_adapters
from sgpo.model.policy import PolicyModel
from sgpo.types import RolloutRequest, SamplingParams
from sgpo.utils.config_file import checked

PROBE = tuple(range(100, 164))
REQUESTS = [RolloutRequest(i, "auto", 0, tuple(range(200 + i, 232 + i)), i) for i in range(16)]
SAMPLING = SamplingParams(1.0, 1.0, 32)


def config_of(options: argparse.Namespace, sync: str) -> Config:
    lora = {"rank": options.rank, "sync": sync, "dora": options.dora}
    rollout = {"engine": options.engine, "max_new_tokens": 64, "vllm": {"kv_cache_mib": 256}}
    model = {"path": str(options.folder), "dtype": options.dtype, "lora": lora}
    raw = {"model": model, "data": {"train": "none", "max_prompt_tokens": 256}, "rollout": rollout}
    return checked(Config, raw, "command line")


def trainer_of(config: Config, device: torch.device) -> ZeroEngine:
    lora = config.model.lora
    lm = load_causal_lm(config.model.path, dtype=config.model.dtype)
    add_adapters(lm, rank=lora.rank, alpha=lora.alpha, modules=lora.modules, dora=lora.dora, seed=config.run.seed)
    torch.manual_seed(0)
    for name, parameter in lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    optim = config.optim
    return ZeroEngine(
        PolicyModel(lm), device=device, zero_stage=0, dtype=config.model.dtype, lr=optim.lr, betas=optim.betas,
        eps=optim.eps, weight_decay=optim.weight_decay, max_grad_norm=optim.max_grad_norm,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--engine", choices=("hf", "vllm"), default="hf")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    device = init_distributed(300)
    trainer = trainer_of(config_of(options, "merged"), device)
    bound, sync_s, token_ms = {}, {}, {}
    for kind in ("merged", "adapters"):
        config = config_of(options, kind)
        rollouts = rollout_engine(config, options.folder, from_scratch=True)
        bound[kind] = PolicySampler(
            trainer, rollouts, probe_ids=PROBE, tolerance=1.0, token_budget=4096, pad_id=0, adapters=kind == "adapters"
        )
        print(kind, "first:", bound[kind].sync(0))
        sync_s[kind], token_ms[kind] = [], []
    for version in range(1, options.repeats + 1):
        for kind, synced in bound.items():
            start = time.perf_counter()
            report = synced.sync(version)
            sync_s[kind].append(time.perf_counter() - start)
            start = time.perf_counter()
            tokens = sum(len(rollout.completion_ids) for rollout in synced.generate(REQUESTS, SAMPLING))
            token_ms[kind].append(1e3 * (time.perf_counter() - start) / tokens)
            print(kind, report, f"sync {sync_s[kind][-1]:.3f} s, {token_ms[kind][-1]:.2f} ms per token", flush=True)
    ratio = {name: {kind: statistics.median(found[kind]) for kind in found} for name, found in
             (("sync", sync_s), ("token", token_ms))}  # fmt: skip
    print(f"sync time, merged / adapters: {ratio['sync']['merged'] / ratio['sync']['adapters']:.2f}")
    print(f"time per token, adapters / merged: {ratio['token']['adapters'] / ratio['token']['merged']:.2f}")


if __name__ == "__main__":
    main()
