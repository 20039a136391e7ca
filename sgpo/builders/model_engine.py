"""The starting model, and the trainer's engine on it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from sgpo.config import Config, OptimConfig
from sgpo.data import builtin
from sgpo.engine.checkpoint_names import check_round_trip
from sgpo.engine.gradient_check import check_gradients
from sgpo.engine.zero import ZeroEngine
from sgpo.model.loading import load_causal_lm
from sgpo.model.lora import add_adapters
from sgpo.model.policy import PolicyModel
from sgpo.model.sequence_parallel import SequenceParallel
from sgpo.utils.distributed import on_rank_zero_first


def resolve_model(config: Config) -> Path:
    """The folder of the starting model. The built-in one is made on the spot, by rank 0: collective."""
    if config.model.path != builtin.BUILTIN:
        return Path(config.model.path)
    return on_rank_zero_first(partial(_builtin_model, config))


def _builtin_model(config: Config) -> Path:
    folder = config.run.dir / "builtin-model"
    if not (folder / "config.json").exists():
        builtin.save_builtin(folder, seed=config.run.seed)
    return folder


def build_engine(config: Config, model_folder: Path, optim: OptimConfig, device: torch.device) -> ZeroEngine:
    """The engine on the model in `model_folder`, with the optimizer that `optim` describes."""
    lm = load_causal_lm(model_folder, dtype=config.model.dtype, attn_implementation=config.model.attn_implementation)
    check_round_trip(lm)
    return engine_on(config, lm, optim, device)


def engine_on(config: Config, lm: Any, optim: OptimConfig, device: torch.device) -> ZeroEngine:
    """The engine on a model that is loaded, after a proof that it loses no gradient."""
    if config.model.lora.rank:
        with_adapters(config, lm)
    lm.to(device)
    size, timeout_s = config.engine.sequence_parallel_size, config.run.timeout_s
    engine = ZeroEngine(
        PolicyModel(
            lm,
            parallel=partial(SequenceParallel, size=size, timeout_s=timeout_s) if size > 1 else None,
            packed=config.engine.packing == "packed",
            gradient_checkpointing=config.model.gradient_checkpointing,
            activation_offload=config.model.activation_offload,
            mlp_tile_tokens=config.model.mlp_tile_tokens,
            liger=config.model.liger,
        ),
        device=device,
        zero_stage=config.engine.zero_stage,
        dtype=config.model.dtype,
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm,
        optimizer_state=config.engine.optimizer_state,
        offload_during_rollout=config.engine.offload_states_during_rollout,
    )
    check_gradients(engine, dtype=config.model.dtype)
    return engine


def with_adapters(config: Config, lm: Any) -> Any:
    """`lm` with the adapters that model.lora describes."""
    lora = config.model.lora
    add_adapters(lm, rank=lora.rank, alpha=lora.alpha, modules=lora.modules, dora=lora.dora, seed=config.run.seed)
    return lm
