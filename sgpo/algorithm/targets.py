"""The reachable target o+ (Eq. 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal


def reachable_target(logprobs: Sequence[Sequence[float]], *, score: Literal["sum", "mean"] = "sum") -> int:
    """Index of the correct guided completion that the policy would most readily give without the strategy.

    Args:
        logprobs: per correct completion, log pi(token | plain prompt, tokens before), each of its tokens.
        score: "sum" as in Eq. 4 (prefers short answers) or "mean" per token. Ties go to the first.
    """
    return max(range(len(logprobs)), key=lambda i: target_score(logprobs[i], score=score))


def target_score(logprobs: Sequence[float], *, score: Literal["sum", "mean"] = "sum") -> float:
    """How reachable a completion is: the sum or the mean of its log-probs."""
    return sum(logprobs) / (len(logprobs) if score == "mean" else 1)
