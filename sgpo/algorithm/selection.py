"""Selection of o+, the teacher completion: of the correct guided ones, which the policy reaches most easily (Eq. 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal


def most_reachable(logprobs: Sequence[Sequence[float]], *, score: Literal["sum", "mean"] = "sum") -> int:
    """Index of the correct guided completion that the policy would most readily give without the strategy.

    Args:
        logprobs: per correct completion, log pi(token | plain prompt, tokens before), each of its tokens.
        score: "sum" as in Eq. 4 (prefers short answers) or "mean" per token. Ties go to the first.
    """
    return max(range(len(logprobs)), key=lambda i: selection_score(logprobs[i], score=score))


def selection_score(logprobs: Sequence[float], *, score: Literal["sum", "mean"] = "sum") -> float:
    """How reachable a completion is: the sum or the mean of its log-probs."""
    return sum(logprobs) / (len(logprobs) if score == "mean" else 1)
