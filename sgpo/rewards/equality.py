"""Whether two formulas are equal, as a reward for `RewardPool`: "sgpo.rewards.equality:formulas_equal"."""

from __future__ import annotations

from math_verify import LatexExtractionConfig, parse, verify

from sgpo.rewards import grading
from sgpo.rewards.answers import wrap_boxed

grading.install()
_LATEX = LatexExtractionConfig()


def formulas_equal(left: str, right: str, _: str) -> float:
    """1 where Math-Verify finds the two equal, 0 where it does not or cannot read one of them; may hang or run out of
    memory, and the pool then says so.
    """
    parsed = [parse(wrap_boxed(text), [_LATEX], parsing_timeout=None) for text in (left, right)]  # pyright: ignore
    if not all(parsed):
        return 0.0
    try:
        return float(verify(parsed[0], parsed[1], timeout_seconds=None, raise_on_error=True))
    except (TypeError, ValueError, AttributeError, NotImplementedError):  # what sympy says about an odd pair
        return 0.0
