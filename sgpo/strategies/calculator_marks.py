"""What counts as a number in a text, and the calculator marks of a solution, as <<48/2=24>>, with their words.

Numbers are: digits, cardinals ("twelve"), factors and fractions ("half", "twice", "third", "quarter"), "dozen". The
positions "first" and "second" are not, nor is "second" as a unit of time, so steps may be ordered in words.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass


def split_words(text: str) -> tuple[str, ...]:
    """The words of a text, as a tuple."""
    return tuple(text.split())


_SMALL = split_words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = split_words("twenty thirty forty fifty sixty seventy eighty ninety")
VALUES = {word: float(value) for value, word in enumerate(_SMALL)}
VALUES |= {word: 10.0 * ten for ten, word in enumerate(_TENS, start=2)}
CARDINALS = "|".join((*_SMALL, *_TENS, "hundreds?", "thousands?", "millions?", "billions?", "trillions?", "dozens?"))
FACTORS = (
    r"half|halves|halve[sd]?|halving|twice|thrice|doubl\w+|tripl\w+|quadrupl\w+|quarters?|"
    r"(?:third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|eleventh|twelfth|\w+teenth|\w+tieth|hundredth|thousandth)s?"
)
NUMBER_WORD = re.compile(rf"(?<![A-Za-z])(?:{CARDINALS}|{FACTORS})(?![A-Za-z])", re.IGNORECASE)
DIGITS = re.compile(r"\d[\d.,/]*|[\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u2089\u2150-\u2189]")
NUM = r"(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
MARK = re.compile(r"<<([^<>\n]*)>>")
_RESULT = re.compile(rf"\s*[-$€£]*\s*{NUM}%?|\s*[-$€£]*{NUM}")
_OPERAND = rf"[-($€£]*{NUM}[)%]*(?:[ /-]?[A-Za-z'’/]+\.?){{0,4}}\)*"


# The written computation in front of a mark: "7 stickers/page * 6 pages = $".
_WRITTEN = re.compile(rf"(?:{_OPERAND}\s*(?:[-+*/x×÷–−=]|times|plus|minus)\s*)+(?:{_OPERAND})?\s*=?\s*[$€£]?\s*$")
_SENTENCE_END = re.compile(r"(?<=[A-Za-z)\d])[.!?]\s+(?=[A-Z])|\n")


Expression = ast.expr
_ARITHMETIC = (ast.BinOp, ast.UnaryOp, ast.Constant, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.USub, ast.UAdd)


@dataclass(frozen=True, slots=True)
class Mark:
    """One calculator mark: the text before it and after it (up to the neighbouring marks), its terms and value."""

    before: str
    after: str
    expression: Expression | None
    value: float | None
    is_money: bool


def has_number(text: str) -> bool:
    """Whether the text has digits or number words."""
    return bool(DIGITS.search(text) or NUMBER_WORD.search(text))


def read_marks(solution: str) -> Iterator[Mark]:
    """The calculator marks of a solution, in order."""
    for sentence in _SENTENCE_END.split(solution):
        found = list(MARK.finditer(sentence))
        start = 0
        for index, match in enumerate(found):
            before = sentence[start : match.start()]
            written = _WRITTEN.search(before)
            lead = before[: written.start()] if written else re.sub(r"[\s=$€£]+$", "", before)
            result = _RESULT.match(sentence, match.end())
            start = result.end() if result else match.end()
            stop = found[index + 1].start() if index + 1 < len(found) else len(sentence)
            expression, value = _parsed(match[1], written[0] if written else "")
            money = bool(re.search(r"[$€£]\s*$", before)) or bool(result and re.search(r"[$€£]", result[0]))
            if index:
                lead = re.split(r",|;|\band\b|\bso\b", lead)[-1]
            yield Mark(lead, sentence[start:stop], expression, value, money)


def _parsed(mark: str, written: str) -> tuple[Expression | None, float | None]:
    left, _, right = mark.partition("=")
    value = value_of(right.strip().lstrip("$"))
    expression = _tree(left)
    if expression is None or isinstance(expression, ast.Constant):  # <<24=24>>: the words may still show the terms
        expression = _tree(re.sub(r"[x×]", "*", written.rstrip(" =$").replace("÷", "/"))) or expression
    return expression, value


def _tree(text: str) -> Expression | None:
    text = re.sub(r"[,$\s]", "", text)
    if not re.fullmatch(r"[\d.+\-*/()]{1,200}", text):
        return None
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", text).replace("//", "/")
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError:
        return None
    nodes = list(ast.walk(tree))
    dots = any(isinstance(node, ast.Constant) and node.value is ... for node in nodes)
    return tree if all(isinstance(node, _ARITHMETIC) for node in nodes) and not dots else None


def value_of(text: str) -> float | None:
    """The number that a text is, or None."""
    text = text.replace(",", "").rstrip("%. ")
    return float(text) if re.fullmatch(r"-?(?:\d+\.?\d*|\.\d+)", text) else None
