"""What the losses report beside their value: per-row statistics without gradient, read from the planes of the values.

Rows that did not take part (weight 0; policy rows also: advantage 0) hold zeros. Entropies, log-probs and divergences
are in nats.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from sgpo_kernels import backend


class PolicyStats(NamedTuple):
    """Per policy row [N]: `clipped` (bool) marks rows whose gradient a bound of the ratio removed, `live` (bool) those
    that took part.

    `dropped` bounds sum |d loss / d logit| over the columns that backward left out, plus the size of their sum (0 with
    column_tolerance = 0; see chunk_loop.py), so that |error of dH| <= dropped * max |W|. `column_share` is the share of
    the vocabulary's columns that was multiplied for the row's chunk.
    """

    logprobs: Tensor
    entropy: Tensor
    ratio: Tensor
    clipped: Tensor
    live: Tensor
    dropped: Tensor
    column_share: Tensor


class DivergenceStats(NamedTuple):
    """Per distillation row [N]: `divergence` is the value before the limit, `over_limit` (bool) marks rows beyond it,
    `live` (bool) those that took part; `dropped` and `column_share` as in PolicyStats."""

    divergence: Tensor
    over_limit: Tensor
    live: Tensor
    entropy: Tensor
    teacher_entropy: Tensor
    dropped: Tensor
    column_share: Tensor


class SgpoStats(NamedTuple):
    """The statistics of both groups of rows, and the two parts of the loss (0-d, without gradient)."""

    policy: PolicyStats
    divergence: DivergenceStats
    policy_loss: Tensor
    distill_loss: Tensor


def policy_stats(values: Tensor, live: Tensor) -> PolicyStats:
    """The statistics in the values [VALUE_ROWS, N] of policy rows; live bool [N]."""
    return PolicyStats(
        logprobs=values[backend.LOGPROB],
        entropy=values[backend.ROW_ENTROPY],
        ratio=values[backend.RATIO],
        clipped=values[backend.CLIPPED] != 0,
        live=live,
        dropped=values[backend.DROPPED],
        column_share=values[backend.SHARE],
    )


def divergence_stats(values: Tensor, live: Tensor) -> DivergenceStats:
    """The statistics in the values [VALUE_ROWS, N] of distillation rows; live bool [N]."""
    return DivergenceStats(
        divergence=values[backend.DIVERGENCE],
        over_limit=values[backend.OVER] != 0,
        live=live,
        entropy=values[backend.ROW_ENTROPY],
        teacher_entropy=values[backend.TEACHER_ENTROPY],
        dropped=values[backend.DROPPED],
        column_share=values[backend.SHARE],
    )
