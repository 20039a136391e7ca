r"""The reward of the paper: Math-Verify. Plain functions, meant for a worker process that can be killed.

Math-Verify's own time-outs are off: they need SIGALRM in a main thread and cancel any alarm set outside, and they
cannot stop a big-integer power, which never returns to the interpreter. `RewardPool` kills the process instead.

A boxed answer is parsed as LaTeX only. Math-Verify's second, plain reading would pick the last number out of a box
that is not valid LaTeX: a reward for garbage. A gold answer that consists of several is compared item by item, in any
order: Math-Verify alone reads `8,221` as a number, takes `-2, -2` for `-2`, and does not know `\pm` inside a list.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from functools import lru_cache

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from sympy import Expr

from sgpo.rewards.answers import bare_answer, condense, normalised, wrap_boxed
from sgpo.rewards.notation import (
    answer_readings,
    as_point,
    gold_items,
    has_variables,
    is_grouped,
    spellings,
    tidy,
    union_items,
    without_percent,
    without_unit,
    words_of,
)
from sgpo.types import RewardResult, SgpoError

# At warning level Math-Verify only says that its time-outs are off, which is on purpose.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_LATEX = LatexExtractionConfig()
_LATEX_WITH_VARIABLES = LatexExtractionConfig(
    normalization_config=dataclasses.replace(_LATEX.normalization_config, units=False)
)
_PLAIN = ExprExtractionConfig()
_DECIMALS = 6  # Math-Verify's default
_MAX_ANSWER_CHARS = 20_000  # no right answer is nearly as long, and Math-Verify's patterns are not linear
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_BASE = re.compile(r"([0-9A-Za-z]+)\s*_\s*\{?([0-9]{1,2})\}?")


def verify_answer(completion: str, gold: str, *, require_box: bool = True) -> RewardResult:
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
        return RewardResult(0.0, "no_answer")
    answer_text, gold_text = normalised(answer), normalised(gold)
    if _INTEGER.fullmatch(answer_text) and _INTEGER.fullmatch(gold_text):
        return RewardResult(float(int(answer_text) == int(gold_text)))  # the common case needs no sympy
    parsed_gold = _parse_gold(gold)
    if answer_text == gold_text:
        return RewardResult(1.0)
    if len(answer) > _MAX_ANSWER_CHARS:
        return RewardResult(0.0, "too_long")
    if answer.startswith("\\boxed{"):
        return _verify_boxed(bare_answer(answer), gold)
    parsed_answer = parse(answer, [_LATEX, _PLAIN], parsing_timeout=None)  # pyright: ignore
    if not parsed_answer:
        return RewardResult(0.0, "no_answer")
    return RewardResult(float(_verified(parsed_gold, tuple(parsed_answer))))


def _verify_boxed(answer: str, gold: str) -> RewardResult:
    gold, answer = tidy(bare_answer(gold)), tidy(answer)
    if not _parsed(answer):
        return RewardResult(0.0, "no_answer")
    items = gold_items(gold)
    if len(items) == 1 or not all(map(_parsed, items)):
        return RewardResult(float(_same_single(gold, answer)))
    readings = [reading for reading in answer_readings(answer) if len(reading) > 1]
    if any(_same_items(items, reading) for reading in readings):
        return RewardResult(1.0)
    is_union = any("\\cup" in text for text in (gold, answer))
    as_one = (not readings and is_grouped(answer)) or is_union
    return RewardResult(float(as_one and _same_single(gold, answer)))


def _same_single(gold: str, answer: str) -> bool:
    """Whether the two are one value, in one of the answer's spellings."""
    if gold.startswith(("(", "\\left(")):
        answer = as_point(answer)
    if (words := words_of(gold)) and words == words_of(answer):
        return True
    if _same(gold, answer) or any(_same(gold, other) for other in spellings(answer)):
        return True
    parts = union_items(gold), union_items(answer)
    return min(map(len, parts)) > 1 and "\\cup" in gold + answer and _same_items(*parts)


def _same_items(items: list[str], answers: list[str]) -> bool:
    """Whether the two lists agree in any order, equal ones counted."""
    left = list(answers)
    for item in items if len(items) == len(answers) else ():
        found = next((answer for answer in left if _same(item, answer)), None)
        if found is None:
            return False
        left.remove(found)
    return len(items) == len(answers)


def _same(gold: str, answer: str) -> bool:
    """Whether the two are one value. The gold goes first: Math-Verify follows its form (equation, set, interval)."""
    units = not has_variables(gold)
    if units:
        answer = without_unit(answer)
    if (first := _BASE.fullmatch(gold)) and (second := _BASE.fullmatch(answer)):
        return first.groups() == second.groups()  # Math-Verify drops the base
    if _verified(_parsed(gold, units), _parsed(answer, units)):
        return True
    if "%" not in gold + answer:
        return False
    return _verified(_parsed(without_percent(gold), units), _parsed(without_percent(answer), units))


def _verified(gold: tuple, answer: tuple) -> bool:
    return verify(
        list(gold),
        list(answer),
        _decimals(gold),
        allow_set_relation_comp=True,
        timeout_seconds=None,
        raise_on_error=True,
    )


def _decimals(gold: tuple) -> int:
    """Digits after the point in which two floats must agree: six, and for a small gold six that are not leading zeros.

    Six for all would make 0.0000672 and 0.0000673 equal.
    """
    value = gold[0] if gold else None
    if not isinstance(value, Expr) or not value.is_number:
        return _DECIMALS
    size = abs(value.evalf(5))
    return _DECIMALS - math.floor(math.log10(size)) if size.is_Float and 0 < size < 1 else _DECIMALS


def gold_is_verifiable(gold: str) -> bool:
    """Whether Math-Verify can parse `gold` and finds it equal to itself; a row that fails can never be rewarded."""
    parsed = parse(wrap_boxed(bare_answer(gold)), [_LATEX], parsing_timeout=None)  # pyright: ignore
    return bool(parsed) and verify(parsed, parsed, timeout_seconds=None)


@lru_cache(maxsize=4096)
def _parsed(answer: str, units: bool = True) -> tuple:
    """Math-Verify's reading of what stands in a box; () where it has none.

    units: whether a unit at the end is dropped; to Math-Verify, units are a, b, c, d, g, h, l, m, s, t and ab, too.
    """
    config = _LATEX if units else _LATEX_WITH_VARIABLES
    return tuple(parse(wrap_boxed(answer), [config], parsing_timeout=None))  # pyright: ignore


def _parse_gold(gold: str) -> tuple:
    parsed = _parsed(bare_answer(gold))
    if not parsed:
        raise SgpoError(
            f"Math-Verify cannot read the gold answer {gold!r}: expected LaTeX or a number, correct that row."
        )
    return parsed
