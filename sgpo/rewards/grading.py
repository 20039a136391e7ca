r"""Two rules of Math-Verify replaced by exact ones, for every comparison that it makes: inside tuples, sets, relations.

Juxtaposed numbers are a product; only an integer before a proper `\frac{a}{b}` is a mixed number. (Math-Verify adds in
`3(5)`, `(3)(5)` and `2\left(\frac62\right)`.) Exact numbers are compared exactly. (Math-Verify takes any two closer
than 1e-15 for equal, so `\frac{1}{2^{99}}` is `\frac{1}{2^{98}}`.) What has a decimal point is rounded as before.
"""

from __future__ import annotations

import re
from typing import Any

import math_verify.grader as grader
import sympy
from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy
from sympy import Expr, Float

_FRACTION = re.compile(r"\{?\\frac\{?(\d{1,20})\}?\{?(\d{1,20})\}?\}?")
_NUMERAL = re.compile(r"\{?[\d.,]+\}?")
_DIGITS = 15  # of rounded numbers
_QUICK_DIGITS = 60  # in which exact numbers agree that may be equal (in fewer, sympy says that log(1 + 1e-20) is 0)
_MAX_DIGITS = 1000  # two exact irrational numbers that agree in so many are equal
_UNFINISHED = (sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit, sympy.Derivative)

_convert_postfix_list = _Latex2Sympy.convert_postfix_list
_sympy_numeric_eq = grader.sympy_numeric_eq


def install() -> None:
    """Puts the two rules in the place of Math-Verify's; `math_verify.parse` and `verify` use them from then on."""
    _Latex2Sympy.convert_postfix_list = _factors  # pyright: ignore[reportAttributeAccessIssue]
    grader.sympy_numeric_eq = _numeric_eq


def _factors(self: _Latex2Sympy, factors: list[Any], i: int = 0) -> Any:
    first = self.convert_postfix(factors[i])
    if i + 1 == len(factors) or not isinstance(first, Expr):
        return _convert_postfix_list(self, factors, i)
    left, right = factors[i].getText(), factors[i + 1].getText()
    if _NUMERAL.fullmatch(left) and _NUMERAL.fullmatch(right):
        raise ValueError(f"two numbers without a sign between them: {left} {right}")  # to Math-Verify: no formula
    if _is_mixed(left.strip("{}"), right):
        first, i = first + self.convert_postfix(factors[i + 1]), i + 1
    if i + 1 == len(factors):
        return first
    rest = self.convert_postfix_list(factors, i + 1)
    is_matrix = getattr(rest, "is_Matrix", False) or getattr(first, "is_Matrix", False)
    return self.mat_mul_flat(first, rest) if is_matrix else self.mul_flat(first, rest)


def _is_mixed(whole: str, fraction: str) -> bool:
    match = _FRACTION.fullmatch(fraction) if whole.isdecimal() else None
    return match is not None and int(match[1]) < int(match[2])


def _numeric_eq(gold: Any, answer: Any, float_rounding: int, numeric_precision: int) -> bool:
    sides = (gold, answer)
    if not all(isinstance(side, Expr) for side in sides) or any(side.has(*_UNFINISHED) for side in sides):
        return _sympy_numeric_eq(gold, answer, float_rounding, numeric_precision)
    is_rounded = any(side.has(Float) for side in sides)
    if any(side.free_symbols for side in sides):
        if is_rounded:
            return _sympy_numeric_eq(gold, answer, float_rounding, numeric_precision)
        return (gold - answer).doit() == 0  # if not, Math-Verify simplifies
    if not is_rounded:
        return exactly_equal(gold, answer)
    if not any(isinstance(side, Float) for side in sides):  # 1.5 \cdot 10^3
        gold, answer = (side.doit().evalf(_DIGITS) for side in sides)
    return _sympy_numeric_eq(gold, answer, float_rounding, numeric_precision) or _are_close(gold, answer) is True


def exactly_equal(gold: Expr, answer: Expr) -> bool:
    """Whether two numbers without decimals are one: far ones told apart by size, rationals compared as such."""
    if _are_close(gold, answer, _QUICK_DIGITS) is False:
        return False
    difference = (gold - answer).doit()
    if difference.is_Rational:
        return difference == 0
    remainder = difference.evalf(2, maxn=_MAX_DIGITS)
    return all(part == 0 or getattr(part, "_prec", 0) == 1 for part in remainder.as_real_imag())  # no digit is certain


def _are_close(gold: Expr, answer: Expr, digits: int = _DIGITS) -> bool | None:
    """Whether they agree in all of so many digits but the last two; None where one has no finite value."""
    values = [side.evalf(digits) for side in (gold, answer)]
    sizes = [abs(value) for value in values]
    if not all(size.is_Float or size == 0 for size in sizes):
        return None
    return bool(abs(values[0] - values[1]) <= max(sizes) * sympy.Float(10, digits) ** (2 - digits))
