r"""What sympy reads in a tidied answer, and whether two readings are one value: the part that Math-Verify does.

Math-Verify's own time-outs are off: they need SIGALRM in a main thread and cancel any alarm set outside, and they
cannot stop a big-integer power, which never returns to the interpreter. `RewardPool` kills the process instead.

A boxed answer is parsed as LaTeX only. Math-Verify's second, plain reading would pick the last number out of a box
that is not valid LaTeX: a reward for garbage.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from functools import lru_cache

import mpmath
import sympy
from latex2sympy2_extended.logic import And
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from sympy import Basic, Expr

from sgpo.rewards import grading
from sgpo.rewards.answers import wrap_boxed

# At warning level Math-Verify only says that its time-outs are off, which is on purpose.
logging.getLogger("math_verify").setLevel(logging.ERROR)
grading.install()

# Its units are a, b, c, d, g, h, l, m, s, t and ab, too, and it drops all words: `quantities` reads them instead.
_LATEX = LatexExtractionConfig(
    normalization_config=dataclasses.replace(LatexExtractionConfig().normalization_config, units=False)
)
_PLAIN = ExprExtractionConfig()
_DECIMALS = 6  # Math-Verify's default
_INDICES = {"j", "k", "l", "m", "n"}  # beside them, i is an index too


@lru_cache(maxsize=4096)
def parsed(answer: str) -> tuple:
    """Math-Verify's reading of what stands in a box: expressions of sympy, last the text itself; () for none."""
    return tuple(parse(wrap_boxed(answer), [_LATEX], parsing_timeout=None))  # pyright: ignore


def found_in(text: str) -> tuple:
    """Math-Verify's reading of the last formula or number of a text without a box; () where there is none."""
    return tuple(parse(text, [_LATEX, _PLAIN], parsing_timeout=None))  # pyright: ignore


def number(text: str) -> Expr | None:
    """The value of a text that is a number, to 15 digits; None for anything else."""
    value = next(iter(parsed(text)), None) if text else None
    value = value.doit() if isinstance(value, Expr) else None
    return value.evalf(15) if value is not None and value.is_number and value.is_finite else None


def are_equal(gold: tuple, answer: tuple) -> bool:
    """Math-Verify's result on two readings. The gold goes first: it follows its form (equation, set, interval)."""
    if _has_imaginary_unit(gold):
        gold, answer = (tuple(map(_with_imaginary_unit, reading)) for reading in (gold, answer))
    return verify(
        list(gold),
        list(answer),
        _decimals(gold),
        allow_set_relation_comp=True,
        timeout_seconds=None,
        raise_on_error=True,
    )


def comparison(gold: tuple, answer: tuple) -> str:
    """How `are_equal` compares the two, in words."""
    values = [reading[0] for reading in (gold, answer) if reading]
    if len(values) < 2 or not all(isinstance(value, Expr) and value.is_number for value in values):
        return "Math-Verify"
    return "rounded numbers" if any(value.has(sympy.Float) for value in values) else "exact numbers"


def _has_imaginary_unit(gold: tuple) -> bool:
    """Whether `i` is the imaginary unit: it is, unless the gold answer has letters that are usual for an index."""
    symbols = {symbol for value in gold if isinstance(value, Basic) for symbol in value.free_symbols}
    return not {str(symbol) for symbol in symbols} & _INDICES


def _with_imaginary_unit(value: object) -> object:
    units = {unit: sympy.I for unit in value.free_symbols if str(unit) == "i"} if isinstance(value, Basic) else {}
    if not isinstance(value, Basic) or not units or value.has(sympy.Interval, sympy.Sum, sympy.Product):
        return value
    if isinstance(value, And):
        return And(*map(_with_imaginary_unit, value._unsorted_args))  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(value, sympy.Eq):  # evaluated, z = i would be false
        return sympy.Eq(_with_imaginary_unit(value.lhs), _with_imaginary_unit(value.rhs), evaluate=False)
    return value if isinstance(value, sympy.Rel) else value.xreplace(units)


def _decimals(gold: tuple) -> int:
    """Digits after the point in which two floats must agree: six, and for a small gold six that are not leading zeros.

    Six for all would make 0.0000672 and 0.0000673 equal.
    """
    value = gold[0] if gold else None
    if not isinstance(value, Expr) or not value.is_number:
        return _DECIMALS
    size = abs(value.evalf(5))
    if not size.is_Float or not 0 < size < 1:
        return _DECIMALS
    return _DECIMALS - math.floor(mpmath.log10(size._to_mpmath(53)))
