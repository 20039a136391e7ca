"""The SFT warm-up: demonstrations, a validation split, and the weights of the lowest validation loss."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from sgpo.algorithm.loss import ImitationLoss
from sgpo.algorithm.sft import sft_sequences
from sgpo.builders.model_engine import build_engine
from sgpo.builders.task import load_demonstrations
from sgpo.config import Config
from sgpo.data.epochs import epoch_order
from sgpo.data.prompts import eos_token_ids
from sgpo.engine.checkpoint import Checkpoints, is_whole
from sgpo.engine.export import export_model
from sgpo.engine.step import optimizer_step, score_contexts
from sgpo.engine.zero import ZeroEngine, lr_factor
from sgpo.model.loading import check_length, check_token_ids
from sgpo.reporting.live_display import LiveDisplay
from sgpo.reporting.run_logs import MetricsLogger
from sgpo.types import SgpoError, TrainSequence
from sgpo.utils import distributed


def run_warmup(config: Config, model_folder: Path, tokenizer: Any, device: torch.device) -> Path:
    """Trains `model_folder` on demonstrations; returns the folder of the best model. Goes on where it was stopped."""
    settings, folder = config.warmup, config.run.dir / "warmup"
    best_folder, finished = folder / "best", folder / "finished"
    if finished.exists() and is_whole(best_folder):
        return best_folder
    demos = _demonstrations(config, model_folder, tokenizer)
    train, validation = _split(demos, settings.validation_share, config.run.seed)
    per_epoch = max(1, len(train) // settings.batch_size)
    total_steps = math.ceil(settings.epochs * per_epoch)

    engine = build_engine(config, model_folder, settings.optim, device)
    checkpoints = Checkpoints(folder / "checkpoints", keep_last=config.checkpoint.keep_last)
    first, best = 0, float("inf")
    if (found := checkpoints.latest()) is not None:
        engine.load(found[0])
        first, best = found[1]["step"], found[1]["best"]
    logger = MetricsLogger(config.run.dir, is_main=distributed.is_main(), resume_step={"warmup": first})
    with (
        LiveDisplay(total_steps, title=f"{config.run.name}: warm-up", is_main=distributed.is_main()) as display,
        logger,
    ):
        display.stage("warmup", total_steps)
        for step in range(first, total_steps):
            lr = settings.optim.lr * lr_factor(
                step, total_steps, warmup_ratio=settings.optim.warmup_ratio, schedule=settings.optim.schedule
            )
            result = optimizer_step(
                engine,
                _sequences_of_step(train, step, per_epoch, config),
                ImitationLoss(),
                token_budget=config.engine.micro_batch_tokens,
                pad_id=tokenizer.pad_token_id,
                lr=lr,
                non_finite=settings.optim.non_finite,
            )
            done = step + 1
            values: dict[str, float | None] = {
                "loss": sum(distributed.gather(result.loss)),
                "grad_norm": result.grad_norm,
                "lr": lr,
                "epoch": done / per_epoch,
                "non_finite_steps": float(result.skipped is not None),
            }
            if done % settings.validate_every == 0 or done == total_steps:
                values["val_loss"] = validation_loss(engine, validation, config, tokenizer.pad_token_id)
                if values["val_loss"] < best:
                    best = values["val_loss"]
                    export_model(engine, tokenizer, best_folder)
            logger.log("warmup", done, values)
            display.advance(done)
            if "val_loss" in values or done % 10 == 0:
                display.step(done, values, phase="warmup")
            if done % config.checkpoint.every_steps == 0 and done < total_steps:
                checkpoints.save(done, {"best": best}, engine.save)
    engine.close()
    if distributed.is_main():
        finished.touch()
    distributed.barrier()
    return best_folder


def _demonstrations(config: Config, model_folder: Path, tokenizer: Any) -> list[TrainSequence]:
    """All of them, each of which the model can take."""
    demos = load_demonstrations(config, tokenizer, eos_token_ids(tokenizer, None)[0])
    longest = max(len(demo.prompt_ids) + len(demo.completion_ids) for demo in demos)
    sequence = f"{config.warmup.data}: the longest demonstration has {longest} tokens"
    check_length(model_folder, longest, sequence, "lower warmup.max_tokens to have them named, and shorten them")
    check_token_ids(model_folder, tokenizer, [(*demo.prompt_ids, *demo.completion_ids) for demo in demos])
    return demos


def _sequences_of_step(train: list[TrainSequence], step: int, per_epoch: int, config: Config) -> list[TrainSequence]:
    """This rank's demonstrations of a step, weighted by the tokens of all ranks; a new order each epoch."""
    epoch, position = divmod(step, per_epoch)
    order, size = epoch_order(len(train), seed=config.run.seed, epoch=epoch), config.warmup.batch_size
    batch = [train[i] for i in order[position * size : (position + 1) * size]]
    tokens = sum(len(sequence.completion_ids) for sequence in batch)
    return sft_sequences(batch[distributed.rank() :: distributed.world_size()], total_tokens=tokens)


def validation_loss(engine: ZeroEngine, sequences: list[TrainSequence], config: Config, pad_id: int) -> float:
    """Token-mean negative log-likelihood of the held-back demonstrations, over all ranks."""
    mine = sequences[distributed.rank() :: distributed.world_size()]
    contexts = [(s.prompt_ids, s.completion_ids) for s in mine]
    logprobs = score_contexts(engine, contexts, token_budget=config.engine.micro_batch_tokens, pad_id=pad_id)
    total, count = sum(sum(row) for row in logprobs), sum(len(row) for row in logprobs)
    parts = distributed.gather((total, count))
    return -sum(part[0] for part in parts) / sum(part[1] for part in parts)


def _split(demos: list[TrainSequence], share: float, seed: int) -> tuple[list[TrainSequence], list[TrainSequence]]:
    held_back = max(1, round(len(demos) * share))
    if held_back >= len(demos):
        raise SgpoError(f"warmup.data has {len(demos)} demonstrations; at least 2 are needed for a validation split")
    order = epoch_order(len(demos), seed=seed, epoch=-1)
    return [demos[i] for i in order[held_back:]], [demos[i] for i in order[:held_back]]
