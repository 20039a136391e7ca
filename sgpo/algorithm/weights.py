"""Final weight of every completion token (Eq. 1, 4 and 7), so that micro-batches are summed and never rescaled."""

from __future__ import annotations


def policy_token_weight(*, problems: int, group_size: int, length: int) -> float:
    """1 / (P G1 |o_i|): the mean over problems of the mean over a group of the mean over a completion's tokens."""
    return 1.0 / (problems * group_size * length)


def distill_token_weight(*, alpha: float, problems: int, completions: int, length: int) -> float:
    """alpha / (P K |o+|) with K distilled completions of the problem (1, or all correct ones in Eq. 2).

    The denominator is the full length, also where tokens are masked.
    """
    return alpha / (problems * completions * length)
