"""Before the first step: does this engine, on this machine, keep every gradient that it is given?

Accumulation and offload have lost gradients in released engines (DeepSpeed issues 7967 and 7981), and a run that
trains on half of its gradient looks like a run. So a few sequences go through as one micro-batch and as several; both
must give the same gradient, whatever lies between: reduction, fp32 accumulation, the way to the host.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch.utils.checkpoint import CheckpointError

from sgpo.algorithm.loss import ImitationLoss
from sgpo.engine.optimizer import is_8bit
from sgpo.engine.zero import ZeroEngine
from sgpo.types import SgpoError
from sgpo.utils import distributed

_SEQUENCES, _TOKENS = 4, 32


def check_gradients(engine: ZeroEngine, *, dtype: str) -> float:
    """Relative difference of the two gradients. Weights, optimizer and random states are afterwards what they were.

    Collective; for an engine that has made no step yet. Raises SgpoError on every rank where a gradient was lost.
    """
    vocabulary = engine.model.ordinary_ids
    generator = torch.Generator().manual_seed(distributed.rank())
    ids = vocabulary[torch.randint(len(vocabulary), (_SEQUENCES, _TOKENS), generator=generator)].to(engine.device)
    devices = [engine.device] if engine.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        packed = engine.model.packed
        try:
            norm, whole = engine.dry_step(ImitationLoss(), [_micro_batch(ids, packed)])
            split_norm, split = engine.dry_step(ImitationLoss(), [_micro_batch(row, packed) for row in ids.split(1)])
        except CheckpointError as error:
            raise SgpoError(
                "model.gradient_checkpointing: the layers do not compute the same a second time; set it to false"
            ) from error
    # Rounding of bf16 products and of 8-bit codes; losing one micro-batch of four is ten times as much.
    limit = 0.1 if is_8bit(engine.adam) else 0.05 if dtype == "bfloat16" else 1e-3
    total = distributed.gather((float((whole - split).square().sum()), float(whole.square().sum()), whole.numel()))
    error, size, _ = (sum(part) for part in zip(*total, strict=True))
    relative = (error / size) ** 0.5 if size > 0 else float("inf")
    vanished = 0 if is_8bit(engine.adam) else sum(distributed.gather(int(((whole == 0) != (split == 0)).sum())))
    if not (relative <= limit and abs(norm - split_norm) <= limit * norm) or vanished > limit * whole.numel():
        raise SgpoError(
            f"the start-up test lost gradient: {_SEQUENCES} sequences give a norm of {norm:.4g} in one micro-batch and "
            f"of {split_norm:.4g} in {_SEQUENCES} (relative difference {relative:.2g}, limit {limit:g}, {vanished} "
            "places without any); use another engine.zero_stage or engine.optimizer_state, or another DeepSpeed"
        )
    return relative


def _micro_batch(ids: torch.Tensor, packed: bool) -> SimpleNamespace:
    """All next tokens of `ids` [B, T], each with its share of the mean over the whole test."""
    positions = torch.arange(ids.numel(), device=ids.device).view_as(ids)
    student = SimpleNamespace(
        input_ids=ids.view(1, -1) if packed else ids,
        rows=positions[:, :-1].flatten(),
        lengths=[_TOKENS] * len(ids) if packed else None,
    )
    weight = 1.0 / (_SEQUENCES * (_TOKENS - 1) * distributed.world_size())
    return SimpleNamespace(student=student, teacher=None, labels=ids[:, 1:].flatten(), distill_weight=weight)
