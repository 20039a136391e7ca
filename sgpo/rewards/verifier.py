r"""The reward of the paper: Math-Verify. Plain functions, meant for a worker process that can be killed.

Math-Verify's own time-outs are off: they need SIGALRM in a main thread and cancel any alarm set outside, and they
cannot stop a big-integer power, which never returns to the interpreter. `RewardPool` kills the process instead.

A boxed answer is parsed as LaTeX only. Math-Verify's second, plain reading would pick the last number out of a box
that is not valid LaTeX: a reward for garbage.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from sgpo.rewards.answers import bare_answer, condense, normalised, wrap_boxed
from sgpo.schema import SgpoError, Verdict

# At warning level Math-Verify only says that its time-outs are off, which is on purpose.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_LATEX = LatexExtractionConfig()
_PLAIN = ExprExtractionConfig()
_INTEGER = re.compile(r"-?[0-9]{1,18}")


def verify_answer(completion: str, gold: str, *, require_box: bool = True) -> Verdict:
    r"""1 where the last `\boxed{}` after the thinking equals `gold` mathematically, else 0; may hang, see the module.

    Args:
        completion: the sampled text. Without a box it is "no_answer".
        gold: the right answer as LaTeX, with or without `$...$` or `\boxed{}`.
        require_box: False lets Math-Verify search a completion without a box for its last formula or number.

    Raises:
        SgpoError: `gold` holds nothing that Math-Verify can parse.
        Exception: whatever sympy raises on an odd pair of expressions; the pool counts it as "error".
    """
    answer = condense(completion, require_box)
    if not answer:
        return Verdict(0.0, "no_answer")
    answer_text, gold_text = normalised(answer), normalised(gold)
    if _INTEGER.fullmatch(answer_text) and _INTEGER.fullmatch(gold_text):
        return Verdict(float(int(answer_text) == int(gold_text)))  # the common case needs no sympy
    parsed_gold = list(_parse_gold(gold))
    if answer_text == gold_text:
        return Verdict(1.0)
    boxed = answer.startswith("\\boxed{")
    parsed_answer = parse(answer, [_LATEX] if boxed else [_LATEX, _PLAIN], parsing_timeout=None)  # pyright: ignore
    if not parsed_answer:
        return Verdict(0.0, "no_answer")
    # The gold goes first: verify() follows the gold's form where one side is an equation or a set.
    equal = verify(parsed_gold, parsed_answer, timeout_seconds=None, raise_on_error=True)
    return Verdict(float(equal))


def gold_is_verifiable(gold: str) -> bool:
    """Whether Math-Verify can parse `gold` and finds it equal to itself; a row that fails can never be rewarded."""
    parsed = parse(wrap_boxed(bare_answer(gold)), [_LATEX], parsing_timeout=None)  # pyright: ignore
    return bool(parsed) and verify(parsed, parsed, timeout_seconds=None)


@lru_cache(maxsize=4096)
def _parse_gold(gold: str) -> tuple:
    parsed = parse(wrap_boxed(bare_answer(gold)), [_LATEX], parsing_timeout=None)  # pyright: ignore
    if not parsed:
        raise SgpoError(
            f"Math-Verify cannot read the gold answer {gold!r}: expected LaTeX or a number, correct that row."
        )
    return tuple(parsed)
