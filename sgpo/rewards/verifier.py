r"""The reward of the paper: Math-Verify, and before it what it does not know. Meant for a worker that can be killed.

Options, words, units, lists: each rule is a function of the tidied gold answer and answer that returns a `Finding`, or
None where it has nothing to say; the first finding is the result. What is left is compared by value (`values`). So a
result and the explanation of `sgpo verify` are one thing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import sympy

from sgpo.rewards import items, quantities, values, words
from sgpo.rewards.answers import bare_answer, condense, normalised
from sgpo.rewards.notation import tidy
from sgpo.types import RewardResult, SgpoError

_MAX_ANSWER_CHARS = 20_000  # no right answer is nearly as long, and Math-Verify's patterns are not linear
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_SPLIT_NUMBER = re.compile(r"\d\s+\d")
_BASE = re.compile(r"([0-9A-Za-z]+)\s*_\s*\{?([0-9]{1,2})\}?")
_EQUALS = re.compile(r"(?<![\\<>!:=])=(?!=)|(\\approx)(?![A-Za-z])")
_DECIMAL = re.compile(r"-?\d*\.(\d+)")
_INDEXED = re.compile(r"([A-Za-z])_\{?\d\}?(?=\s?=)")


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
    r"""1 where the last `\boxed{}` after the thinking equals `gold` mathematically, else 0; may hang, see `values`.

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
    """The result of `verify_answer` with its reason; the same arguments and errors."""
    answer = condense(completion, require_box)
    if not answer:
        return Finding(False, "there is no box with an answer", status="no_answer")
    answer_text, gold_text = normalised(answer), normalised(gold)
    is_one_word = not _SPLIT_NUMBER.search(answer)  # without spaces, `2 5` would be 25
    if is_one_word and _INTEGER.fullmatch(answer_text) and _INTEGER.fullmatch(gold_text):
        return Finding(int(answer_text) == int(gold_text), "integers", gold_text, answer_text)  # needs no sympy
    parsed_gold = _parse_gold(gold)
    if is_one_word and answer_text == gold_text:
        return Finding(True, "the same text", gold_text, answer_text)
    if len(answer) > _MAX_ANSWER_CHARS:
        return Finding(False, f"the answer has more than {_MAX_ANSWER_CHARS} characters", status="too_long")
    if answer.startswith("\\boxed{"):
        return _judge_boxed(tidy(bare_answer(gold)), tidy(bare_answer(answer)))
    found = values.found_in(answer)
    if not found:
        return Finding(False, "Math-Verify finds no formula and no number", status="no_answer")
    rule = "Math-Verify, on the last formula or number of the text"
    return Finding(values.are_equal(parsed_gold, found), rule, gold, answer, by_value=True)


def gold_is_verifiable(gold: str) -> bool:
    """Whether Math-Verify can parse `gold` and finds it equal to itself; a row that fails can never be rewarded."""
    parsed = values.parsed(bare_answer(gold))
    return bool(parsed) and values.are_equal(parsed, parsed)


def _parse_gold(gold: str) -> tuple:
    parsed = values.parsed(bare_answer(gold))
    if not parsed:
        raise SgpoError(
            f"Math-Verify cannot read the gold answer {gold!r}: expected LaTeX or a number, correct that row."
        )
    return parsed


def _judge_boxed(gold: str, answer: str) -> Finding:
    if not values.parsed(answer):
        return Finding(False, "Math-Verify cannot read the answer", gold, answer, "no_answer")
    for rule in (_same_choices, _same_letters, _same_point, _same_pieces, _same_quantities, _same_lists):
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
    return _judge_boxed(gold, second.text) if second and second.text else None


def _same_letters(gold: str, answer: str) -> Finding | None:
    """Words, and letters that stand for options or an order."""
    first, second = words.letters_of(gold), words.letters_of(answer)
    if first is None or second is None or ((first + second).isascii() and max(len(first), len(second)) < 2):
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


def _same_pieces(gold: str, answer: str) -> Finding | None:
    """Two definitions by cases, value and condition of each case, in any order."""
    first, second = items.pieces(gold), items.pieces(answer)
    if not (first and second):
        return None
    left = list(second)
    for piece in first:
        if found := next((other for other in left if all(map(_judge_item, piece, other))), None):
            left.remove(found)
    equal = len(first) == len(second) and not left
    return Finding(equal, "definition by cases, case by case", gold, answer)


def _same_quantities(gold: str, answer: str) -> Finding | None:
    def same(first: str, second: str) -> bool:
        return _judge_boxed(first, second).equal

    equal = quantities.compare(gold, answer, same, bare=not quantities.has_variables(gold))
    return None if equal is None else Finding(equal, "numbers with their units or words", gold, answer)


def _same_lists(gold: str, answer: str) -> Finding | None:
    """Item by item in any order, where the gold answer consists of several that Math-Verify can read."""
    golds = items.gold_items(gold)
    if len(golds) == 1 or not all(map(values.parsed, golds)):
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
    how = values.comparison(values.parsed(gold), values.parsed(answer))
    return Finding(False, how, gold, answer, by_value=True)


def _contradiction(answer: str) -> str:
    r"""`5 = 6`, `x = 5 = 6`, `5 \approx 6` or `(C) = (D)`: what is said to be equal and is not; "" if all is well."""
    pieces = _EQUALS.split(answer)
    members, is_rounded = [piece.strip() for piece in pieces[::2]], any(pieces[1::2])
    if len(members) < 2 or any(member.count("(") != member.count(")") for member in members):
        return ""
    last, option = _closed_number(members[-1]), words.read_choice(members[-1])
    for member in members[:-1]:
        other, number = words.read_choice(member), _closed_number(member)
        if option and other and option.letter != other.letter:
            return f"{member} = {members[-1]}"
        if last is None or number is None:
            continue
        tolerance = abs(last) * (sympy.Rational(1, 20) if is_rounded else sympy.Rational(1, 10**9))
        if decimals := _DECIMAL.fullmatch(members[-1]):
            tolerance = sympy.Rational(1, 10 ** min(len(decimals[1]), 100))
        if sympy.Gt(abs(number - last), tolerance) == True:  # noqa: E712 -- a relation of sympy
            return f"{member} = {members[-1]}"
    return ""


def _closed_number(text: str) -> sympy.Expr | None:
    return None if quantities.has_variables(text) else values.number(text)


def _same(gold: str, answer: str) -> str:
    """The rule by which the two are one value, "" where they are not."""
    if gold == answer:
        return "the same text after tidying"
    first, second = _BASE.fullmatch(gold), _BASE.fullmatch(answer)
    if second and (first or gold.isdecimal()):  # Math-Verify drops the base
        written = first.groups() if first else (gold, "10")
        return "numbers with their base" if second.groups() == written else ""
    parsed = values.parsed(gold), values.parsed(answer)
    if values.are_equal(*parsed):
        return values.comparison(*parsed)
    if "%" not in gold + answer:
        return ""
    plain = [values.parsed(items.without_percent(text)) for text in (gold, answer)]
    return f"{values.comparison(*plain)}, without the percent sign" if values.are_equal(*plain) else ""
