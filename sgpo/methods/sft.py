"""SFT: token-mean negative log-likelihood of demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sgpo.schema import TrainSequence


def sft_sequences(demonstrations: Sequence[TrainSequence], *, total_tokens: int) -> list[TrainSequence]:
    """Gives every completion token the weight 1 / total_tokens, the completion tokens of the batch on all ranks."""
    return [replace(sequence, target_weight=1.0 / total_tokens) for sequence in demonstrations]
