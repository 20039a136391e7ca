"""Before the first step: the longest micro-batch that the run may meet goes through once, optimizer included."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sgpo.config import WITH_DEMONSTRATIONS, Config
from sgpo.engine.batching import collate_training
from sgpo.engine.zero import MicroBatchLoss, ZeroEngine
from sgpo.types import PromptPair, SgpoError, TrainSequence
from sgpo.utils import distributed


def wants_worst_case(config: Config, device: torch.device) -> bool:
    """plan.worst_case_step; by default on a GPU alone, where memory ends without warning."""
    asked = config.plan.worst_case_step
    return device.type == "cuda" if asked is None else asked


def worst_case_step(
    engine: ZeroEngine, loss: MicroBatchLoss, config: Config, prompts: Sequence[PromptPair], pad_id: int
) -> None:
    """A step over full-length sequences in both contexts; weights, optimizer and random states stay as they were.

    For an engine that has made no step yet. Collective. Raises SgpoError where it does not fit.
    """
    sequences = longest_micro_batch(config, prompts, pad_id)
    with_teacher = any(s.teacher_prompt_ids for s in sequences)
    packed, members = config.engine.packing == "packed", config.engine.sequence_parallel_size
    micros = []
    for owner in range(max(2, members)):  # of ranks that share a micro-batch, each has all of its rows once
        own = sequences if distributed.rank() % members == owner % members else []
        micros.append(collate_training(own, pad_id, with_teacher=with_teacher, packed=packed).to(engine.device))
    devices = [engine.device] if engine.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            engine.dry_step(loss, micros)
    except torch.OutOfMemoryError as error:
        tokens = max(micro.tokens for micro in micros)
        raise SgpoError(
            f"the longest micro-batch ({tokens} tokens in both contexts) does not fit into the GPU's memory: "
            "lower engine.micro_batch_tokens or rollout.max_new_tokens, or see sgpo plan"
        ) from error


def longest_micro_batch(config: Config, prompts: Sequence[PromptPair], pad_id: int) -> list[TrainSequence]:
    """As many full-length completions as a micro-batch holds, of which SGPO distils one and imitation learns one."""
    plain = max((pair.plain for pair in prompts), key=len)
    guided = max((pair.guided or pair.plain for pair in prompts), key=len)
    new = (pad_id,) * config.rollout.max_new_tokens
    algorithm = config.algorithm
    distils = algorithm.method == "sgpo" and algorithm.distillation not in (None, "sft")
    imitates = algorithm.method in WITH_DEMONSTRATIONS or algorithm.distillation == "sft"
    longest = len(guided if distils else plain) + len(new)
    count = max(1, config.engine.micro_batch_tokens * config.engine.sequence_parallel_size // longest)
    sequences = [TrainSequence(plain, new, advantage=1.0, policy_weight=1e-6) for _ in range(count)]
    if distils or imitates:
        sequences[-1] = TrainSequence(plain, new, distill_weight=1e-6, teacher_prompt_ids=guided if distils else None)
    return sequences
