"""SFT: token-mean negative log-likelihood of demonstrations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from sgpo.algorithm.method import ProblemStep, Scorer
from sgpo.types import ScoredGroup, TrainSequence


def sft_sequences(demonstrations: Sequence[TrainSequence], *, total_tokens: float) -> list[TrainSequence]:
    """Gives every completion token the weight 1 / total_tokens, the completion tokens of the batch on all ranks."""
    return [replace(sequence, distill_weight=1.0 / total_tokens) for sequence in demonstrations]


def sft_step(
    groups: Sequence[ScoredGroup], *, problems: int, score: Scorer, total: Callable[[float], float]
) -> list[ProblemStep]:
    """The demonstrations of the step's problems as a method of the trainer: no rollout is used."""
    demos = [TrainSequence(group.prompts.plain, group.demo_ids) for group in groups]
    tokens = total(float(sum(len(demo.completion_ids) for demo in demos)))
    weighted = sft_sequences(demos, total_tokens=tokens)
    return [ProblemStep(group, [demo]) for group, demo in zip(groups, weighted, strict=True)]
