"""What is not finite in a micro-batch, and where: a NaN in one token must neither be trained on nor pass unseen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from sgpo.algorithm.loss import LossStats
from sgpo.types import TrainSequence


def nan_if_not_finite(loss: torch.Tensor, stats: Any) -> torch.Tensor:
    """`loss`, or NaN times it where it or any of its rows is not finite: its gradient is NaN then, and so is the norm
    of the step on all ranks. Also for rows that a limit has dropped. No host sync."""
    values = [loss.detach(), *(rows for rows, _ in _rows(stats))]
    finite = torch.stack([value.isfinite().all() for value in values]).all()
    return loss * torch.where(finite, 1.0, torch.nan)


def name_not_finite(sequences: Sequence[TrainSequence], stats: Any, name: Callable[[TrainSequence], str]) -> list[str]:
    """One entry per row of the micro-batch whose value is not finite: what, of which sequence, at which token."""
    found = []
    for values, takes in _rows(stats):
        places = [(s, token) for s in sequences if takes(s) for token in range(len(s.completion_ids))]
        for (sequence, token), value in zip(places, values.tolist(), strict=True):
            if not abs(value) < torch.inf:
                place = f"token {token} of {len(sequence.completion_ids)} ({sequence.completion_ids[token]})"
                found.append(f"{name(sequence)}, {place}: {value}")
    return found


def prompt_length(sequence: TrainSequence) -> str:
    """What a sequence is called where nobody knows its problem."""
    return f"the completion of a prompt of {len(sequence.prompt_ids)} tokens"


def _rows(stats: Any) -> Iterator[tuple[torch.Tensor, Callable[[TrainSequence], bool]]]:
    """(values of rows [N], which sequences they belong to), in the order of a micro-batch."""
    if not isinstance(stats, LossStats):  # imitation gives its rows as they are
        yield stats, _is_imitated
        return
    yield stats.policy.logprobs, _has_policy
    if stats.divergence is not None:
        yield stats.divergence.divergence, _is_imitated


def _has_policy(sequence: TrainSequence) -> bool:
    return sequence.policy_weight * sequence.advantage != 0


def _is_imitated(sequence: TrainSequence) -> bool:
    return sequence.distill_weight != 0
