r"""The reward of the paper: Math-Verify. Plain functions, meant for a worker process that can be killed.

Math-Verify's own time-outs are off: they need SIGALRM in a main thread and cancel any alarm set outside, and they
cannot stop a big-integer power, which never returns to the interpreter. `RewardPool` kills the process instead.

A boxed answer is parsed as LaTeX only. Math-Verify's second, plain reading would pick the last number out of a box
that is not valid LaTeX: a reward for garbage. What Math-Verify does not know is decided before it: words, units, lists
(it reads `8,221` as a number, takes `-2, -2` for `-2`, and does not know `\pm` inside a list). Each of these rules is a
function of the tidied gold answer and answer that returns a `Finding`, or None where it has nothing to say.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from dataclasses import dataclass
from functools import lru_cache

import mpmath
import sympy
from latex2sympy2_extended.logic import And
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from sympy import Basic, Expr

from sgpo.rewards import grading, items, quantities, words
from sgpo.rewards.answers import bare_answer, condense, normalised, wrap_boxed
from sgpo.rewards.notation import tidy
from sgpo.types import RewardResult, SgpoError

# At warning level Math-Verify only says that its time-outs are off, which is on purpose.
logging.getLogger("math_verify").setLevel(logging.ERROR)
grading.install()

# Its units are a, b, c, d, g, h, l, m, s, t and ab, too, and it drops all words: `quantities` reads them instead.
_LATEX = LatexExtractionConfig(
    normalization_config=dataclasses.replace(LatexExtractionConfig().normalization_config, units=False)
)
_PLAIN = ExprExtractionConfig()
_DECIMALS = 6  # Math-Verify's default
_MAX_ANSWER_CHARS = 20_000  # no right answer is nearly as long, and Math-Verify's patterns are not linear
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_BASE = re.compile(r"([0-9A-Za-z]+)\s*_\s*\{?([0-9]{1,2})\}?")
_EQUALS = re.compile(r"(?<![\\<>!:=])=(?!=)")
_POINT = re.compile(r"\d*\.(\d+)")
_INDEXED = re.compile(r"([A-Za-z])_\{?\d\}?(?=\s?=)")
_INDICES = {"j", "k", "l", "m", "n"}  # beside them, i is an index too


@dataclass(frozen=True, slots=True)
class Finding:
    """Whether the answer is right, and what decided it: the rule, in words, and the two texts that it looked at.

    `by_value`: what sympy reads in the texts was compared.
    """

    equal: bool
    rule: str
    gold: str = ""
    answer: str = ""
    status: str = "ok"
    by_value: bool = False


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
    finding = judge(completion, gold, require_box=require_box)
    return RewardResult(float(finding.equal), finding.status)


def judge(completion: str, gold: str, *, require_box: bool = True) -> Finding:
    """The verdict of `verify_answer` with its reason; the same arguments and errors."""
    answer = condense(completion, require_box)
    if not answer:
        return Finding(False, "there is no box with an answer", status="no_answer")
    answer_text, gold_text = normalised(answer), normalised(gold)
    if _INTEGER.fullmatch(answer_text) and _INTEGER.fullmatch(gold_text):  # the common case needs no sympy
        return Finding(int(answer_text) == int(gold_text), "integers", gold_text, answer_text)
    parsed_gold = _parse_gold(gold)
    if answer_text == gold_text:
        return Finding(True, "the same text", gold_text, answer_text)
    if len(answer) > _MAX_ANSWER_CHARS:
        return Finding(False, f"the answer has more than {_MAX_ANSWER_CHARS} characters", status="too_long")
    if answer.startswith("\\boxed{"):
        return _judge_boxed(tidy(bare_answer(gold)), tidy(bare_answer(answer)))
    parsed_answer = parse(answer, [_LATEX, _PLAIN], parsing_timeout=None)  # pyright: ignore
    if not parsed_answer:
        return Finding(False, "Math-Verify finds no formula and no number", status="no_answer")
    equal = _verified(parsed_gold, tuple(parsed_answer))
    return Finding(equal, "Math-Verify, on the last formula or number of the text", gold, answer, by_value=True)


def _judge_boxed(gold: str, answer: str) -> Finding:
    if not _parsed(answer):
        return Finding(False, "Math-Verify cannot read the answer", gold, answer, "no_answer")
    for rule in (_same_choices, _same_letters, _same_point, _same_quantities, _same_lists):
        if finding := rule(gold, answer):
            return finding
    return _judge_single(gold, answer)


def _same_choices(gold: str, answer: str) -> Finding | None:
    """An option's letter, its text, or both. Where both are given, both must be right."""
    first, second = words.read_choice(gold), words.read_choice(answer)
    if first and second:
        texts_agree = not (first.text and second.text) or _judge_boxed(first.text, second.text).equal
        return Finding(first.letter == second.letter and texts_agree, "options by letter and text", gold, answer)
    if first and first.text:
        return _judge_boxed(first.text, answer)
    if second and second.text:
        return _judge_boxed(gold, second.text)
    return None


def _same_letters(gold: str, answer: str) -> Finding | None:
    """Words, and letters that stand for options or an order."""
    first, second = words.letters_of(gold), words.letters_of(answer)
    if first is None or second is None or (first + second).isascii() and max(len(first), len(second)) < 2:
        return None
    gold_options, options = items.gold_items(gold), items.gold_items(answer)
    if len(gold_options) > 1:
        if len(options) > 1 or not all(len(option) == 1 for option in gold_options):
            return None
        return Finding(sorted(first) == sorted(second), "options in any order", gold, answer)
    equal = words.same_letters(first, second)
    return None if not equal and words.is_product(gold) else Finding(equal, "words, letter by letter", gold, answer)


def _same_point(gold: str, answer: str) -> Finding | None:
    """`x=1, y=2` against `(1, 2)` or, in order, against `1, 2`."""
    point, other = items.as_point(gold), items.as_point(answer)
    if (point == gold) == (other == answer) or (other == answer and "=" in answer):
        return None
    if point == gold:
        return _judge_boxed(gold, other) if items.is_grouped(gold) else None
    if not items.is_grouped(answer):
        other = f"({answer})"
    return Finding(_judge_single(point, other).equal, "named values as a point", point, other)


def _same_quantities(gold: str, answer: str) -> Finding | None:
    def same(first: str, second: str) -> bool:
        return _judge_boxed(first, second).equal

    equal = quantities.compare(gold, answer, same, bare=not quantities.has_variables(gold))
    return None if equal is None else Finding(equal, "numbers with their units or words", gold, answer)


def _same_lists(gold: str, answer: str) -> Finding | None:
    """Item by item in any order, where the gold answer consists of several that Math-Verify can read."""
    golds = items.gold_items(gold)
    if len(golds) == 1 or not all(map(_parsed, golds)):
        return None
    readings = [reading for reading in items.answer_readings(answer) if len(reading) > 1]
    found = next((reading for reading in readings if not _difference(golds, reading)), None)
    is_union = any("\\cup" in text for text in (gold, answer))
    if found is None and (is_union or (not readings and items.is_grouped(answer))):
        return None
    shown = found or (readings[0] if readings else [answer])
    rule = "list, item by item in any order" + ("" if found else f": {_difference(golds, shown)}")
    return Finding(found is not None, rule, " | ".join(golds), " | ".join(shown))


def _difference(golds: list[str], answers: list[str]) -> str:
    """In which way the two lists do not agree in any order, equal ones counted; "" where they do."""
    if len(golds) != len(answers):
        return f"{len(golds)} items in the gold answer, {len(answers)} in the answer"
    left = list(answers)
    for gold in golds:
        found = next((answer for answer in left if _judge_item(gold, answer)), None)
        if found is None:
            return f"nothing left in the answer is {gold}"
        left.remove(found)
    return ""


def _judge_item(gold: str, answer: str) -> bool:
    for rule in (_same_letters, _same_quantities):
        if finding := rule(gold, answer):
            return finding.equal
    if (named := _INDEXED.match(answer)) and gold.startswith(named[1]) and gold[1:].lstrip().startswith("="):
        answer = named[1] + answer[named.end() :]  # x_1=3 where the gold has x=3
    return bool(_same(gold, answer))


def _judge_single(gold: str, answer: str) -> Finding:
    """Whether the two are one value, in one of the answer's spellings."""
    if contradiction := _contradiction(answer):
        return Finding(False, f"the answer contradicts itself: {contradiction}", gold, answer)
    for spelling in (answer, *items.spellings(answer)):
        if rule := _same(gold, spelling):
            return Finding(True, rule, gold, spelling, by_value=True)
    parts = items.union_items(gold), items.union_items(answer)
    if min(map(len, parts)) > 1 and "\\cup" in gold + answer and not _difference(*parts):
        return Finding(True, "union, part by part", gold, answer)
    return Finding(False, _kind(_parsed(gold), _parsed(answer)), gold, answer, by_value=True)


def _contradiction(answer: str) -> str:
    """`5 = 6`, `x = 5 = 6` or `(C) = (D)`: what is said to be equal and is not; "" where all is well."""
    members = [member.strip() for member in _EQUALS.split(answer)]
    if len(members) < 2 or any(member.count("(") != member.count(")") for member in members):
        return ""
    last, option = _number(members[-1]), words.read_choice(members[-1])
    for member in members[:-1]:
        other = words.read_choice(member)
        if option and other and option.letter != other.letter:
            return f"{member} = {members[-1]}"
        if last is None or (number := _number(member)) is None:
            continue
        decimals = _POINT.search(members[-1])
        rounding = sympy.Rational(1, 10 ** len(decimals[1])) if decimals else sympy.Rational(1, 10**9)
        if (abs(number - last) > rounding * (1 if decimals else 1 + abs(last))) == True:  # noqa: E712
            return f"{member} = {members[-1]}"
    return ""


def _number(text: str) -> Expr | None:
    if not text or quantities.has_variables(text):
        return None
    parsed = _parsed(text)
    value = parsed[0].doit() if parsed and isinstance(parsed[0], Expr) else None
    return value.evalf(15) if value is not None and value.is_number and value.is_finite else None


def _same(gold: str, answer: str) -> str:
    """The rule by which the two are one value, "" where they are not."""
    if gold == answer:
        return "the same text after tidying"
    first, second = _BASE.fullmatch(gold), _BASE.fullmatch(answer)
    if second and (first or gold.isdecimal()):  # Math-Verify drops the base
        written = first.groups() if first else (gold, "10")
        return "numbers with their base" if second.groups() == written else ""
    parsed = _parsed(gold), _parsed(answer)
    if _verified(*parsed):
        return _kind(*parsed)
    if "%" not in gold + answer:
        return ""
    texts = items.without_percent(gold), items.without_percent(answer)
    return "Math-Verify, without the percent sign" if _verified(*map(_parsed, texts)) else ""


def _kind(gold: tuple, answer: tuple) -> str:
    """How `_verified` compares the two, in words."""
    values = [parsed[0] for parsed in (gold, answer) if parsed]
    if len(values) < 2 or not all(isinstance(value, Expr) and value.is_number for value in values):
        return "Math-Verify"
    return "rounded numbers" if any(value.has(sympy.Float) for value in values) else "exact numbers"


def _verified(gold: tuple, answer: tuple) -> bool:
    """Math-Verify's verdict. The gold goes first: it follows its form (equation, set, interval)."""
    if _has_imaginary_unit(gold):
        gold, answer = _with_imaginary_unit(gold), _with_imaginary_unit(answer)
    return verify(
        list(gold),
        list(answer),
        _decimals(gold),
        allow_set_relation_comp=True,
        timeout_seconds=None,
        raise_on_error=True,
    )


def _has_imaginary_unit(gold: tuple) -> bool:
    """Whether `i` is the imaginary unit: it is, unless the gold answer has letters that are usual for an index."""
    names = {symbol.name for value in gold if isinstance(value, Basic) for symbol in value.free_symbols}
    return not names & _INDICES


def _with_imaginary_unit(parsed: tuple) -> tuple:
    return tuple(_replaced(value) if isinstance(value, Basic) else value for value in parsed)


def _replaced(value: Basic) -> Basic:
    units = {symbol: sympy.I for symbol in value.free_symbols if getattr(symbol, "name", "") == "i"}
    if not units or value.has(sympy.Interval, sympy.Sum, sympy.Product):
        return value
    if isinstance(value, And):
        return And(*map(_replaced, value._unsorted_args))
    if isinstance(value, sympy.Eq):  # evaluated, z = i would be false
        return sympy.Eq(_replaced(value.lhs), _replaced(value.rhs), evaluate=False)
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


def reading(text: str) -> object:
    """What sympy makes of a tidied text: an expression, or the text itself where it is no formula."""
    return next(iter(_parsed(text)), text)


def gold_is_verifiable(gold: str) -> bool:
    """Whether Math-Verify can parse `gold` and finds it equal to itself; a row that fails can never be rewarded."""
    parsed = parse(wrap_boxed(bare_answer(gold)), [_LATEX], parsing_timeout=None)  # pyright: ignore
    return bool(parsed) and verify(parsed, parsed, timeout_seconds=None)


@lru_cache(maxsize=4096)
def _parsed(answer: str) -> tuple:
    """Math-Verify's reading of what stands in a box; () where it has none."""
    return tuple(parse(wrap_boxed(answer), [_LATEX], parsing_timeout=None))  # pyright: ignore


def _parse_gold(gold: str) -> tuple:
    parsed = _parsed(bare_answer(gold))
    if not parsed:
        raise SgpoError(
            f"Math-Verify cannot read the gold answer {gold!r}: expected LaTeX or a number, correct that row."
        )
    return parsed
