"""What samples completions and what judges them: the rollout engine, bound to the trainer or alone, and the rewards."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from sgpo.builders.model_engine import with_adapters
from sgpo.config import Config
from sgpo.data.prompts import eos_token_ids
from sgpo.engine.weight_sync import PolicySampler
from sgpo.engine.zero import ZeroEngine
from sgpo.model.loading import eos_ids_of_folder, load_causal_lm, load_tokenizer, positions_of
from sgpo.rewards.pool import RewardPool
from sgpo.types import RolloutEngine, TaskData
from sgpo.utils import distributed

_PROBE_TOKENS = 64


_SYNC_TOLERANCE = {"float32": 2e-4, "bfloat16": 0.1}


def build_rollouts(config: Config, model_folder: Path, *, from_scratch: bool = False) -> RolloutEngine:
    """The engine named by rollout.engine, in this process or in one of its own.

    `from_scratch`: its weights come from a sync (vLLM does not even load any); adapters too, where it has any.
    """
    build = partial(rollout_engine, config, model_folder, from_scratch)
    if config.rollout.placement == "inprocess":
        return build()
    from sgpo.rollout.process import EngineProcess

    devices = config.rollout.devices
    chosen = str(devices[distributed.local_rank() % len(devices)]) if devices else None
    return EngineProcess(build, stall_s=config.rollout.stall_s, devices=chosen)


def rollout_engine(config: Config, model_folder: Path, from_scratch: bool) -> RolloutEngine:
    """The engine itself; each is imported only when it is asked for."""
    tokenizer = load_tokenizer(model_folder)
    eos_ids = eos_token_ids(tokenizer, eos_ids_of_folder(model_folder))
    if config.rollout.engine == "vllm":
        from sgpo.rollout.vllm_engine import VllmEngine

        return VllmEngine(
            model_folder,
            eos_ids=eos_ids,
            dtype=config.model.dtype,
            options=vllm_options(config, model_folder, from_scratch),
        )
    from sgpo.rollout.hf_engine import HfEngine

    lm = load_causal_lm(model_folder, dtype=config.model.dtype, attn_implementation=config.model.attn_implementation)
    return HfEngine(
        with_adapters(config, lm) if from_scratch and config.syncs_adapters(cuda=torch.cuda.is_available()) else lm,
        eos_ids=eos_ids,
        pad_id=tokenizer.pad_token_id,
        device=torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu"),
        max_batch_tokens=config.rollout.max_batch_tokens,
        stall_s=config.rollout.stall_s,
    )


def vllm_options(config: Config, model_folder: Path, from_scratch: bool) -> Any:
    """The sizes of the vLLM engine: room for the longest rollout of the run, memory shared with the trainer."""
    from sgpo.rollout.vllm_engine import VllmOptions

    rollout, chosen = config.rollout, config.rollout.vllm
    new_tokens = max(
        rollout.max_new_tokens, config.eval.max_new_tokens if config.data.eval or config.eval.benchmarks else 0
    )
    longest = chosen.max_model_len or config.data.max_prompt_tokens + new_tokens
    lora = config.model.lora
    has_adapters = from_scratch and config.syncs_adapters(cuda=torch.cuda.is_available())
    return VllmOptions(
        max_model_len=min(longest, positions_of(model_folder) or longest),
        max_num_seqs=chosen.max_num_seqs,
        max_num_batched_tokens=chosen.max_num_batched_tokens,
        kv_cache_mib=chosen.kv_cache_mib,
        gpu_memory_utilization=chosen.gpu_memory_utilization,
        tensor_parallel_size=chosen.tensor_parallel_size,
        enforce_eager=chosen.enforce_eager,
        sleep_level=config.sleep_level(cuda=torch.cuda.is_available()),
        from_scratch=from_scratch,
        stall_s=rollout.stall_s,
        lora_rank=lora.rank if has_adapters else 0,
        lora_alpha=lora.alpha,
        lora_modules=None if "all-linear" in lora.modules else tuple(t.rsplit(".")[-1] for t in lora.modules),
    )


def build_policy_sampler(
    config: Config, engine: ZeroEngine, model_folder: Path, task: TaskData, tokenizer: Any
) -> PolicySampler:
    """The sampler of the run, without weights before the first sync; the probe on which it must agree with the trainer
    is the first problem's longer prompt."""
    probe = task.prompts[0].guided or task.prompts[0].plain
    return PolicySampler(
        engine,
        build_rollouts(config, model_folder, from_scratch=True),
        probe_ids=probe[:_PROBE_TOKENS],
        tolerance=config.rollout.sync_tolerance or _SYNC_TOLERANCE[config.model.dtype],
        token_budget=config.engine.micro_batch_tokens,
        pad_id=tokenizer.pad_token_id,
        adapters=config.syncs_adapters(cuda=torch.cuda.is_available()),
        checkpoint_names=config.rollout.engine != "hf",  # which is the same transformers model
    )


def build_rewards(config: Config) -> RewardPool:
    """The workers that judge completions; they start here, so a reward that cannot be loaded is refused here."""
    reward = config.reward
    return RewardPool(
        reward.kind,
        workers=reward.workers,
        timeout_s=reward.timeout_s,
        memory_mib=reward.memory_mib,
        max_chars=reward.max_chars,
        require_box=reward.require_box,
    )
