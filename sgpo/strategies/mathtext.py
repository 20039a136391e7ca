r"""Numbers and expressions in a text that mixes prose and LaTeX: what the leak check compares.

Nothing here evaluates anything, and every pattern is linear in the text, since it runs on whatever a model wrote.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

BREAK = "¦"
"""Stands where an expression cannot go on: for math delimiters, text inside formulas, layout commands."""

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")
_SIGNS = str.maketrans({"−": "-", "–": "-", "×": "*", "·": "*", "⋅": "*", "∙": "*", "÷": "/", "⁄": "/", "√": "\\sqrt "})
# Each applied in this order; the first two take a currency sign away, so that it opens no formula.
_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\$\\\$\$", ""),
        (r"\\\$|[€£]", ""),
        (r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}", rf" {BREAK} \1 {BREAK} "),
        (r"\\(?:boxed|fbox)\s*\{", rf" {BREAK} = {{"),
        (r"\$+|\\[()\[\]]|\\\\|&|\\(?:begin|end)\s*\{[^{}]*\}|\\item\b|\\q?quad\b", f" {BREAK} "),
        (r"\\(?:left|right|big|Big|bigg|displaystyle|,|;|:|!| )(?![A-Za-z])", " "),
        (r"\\[dt]frac", r"\\frac"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d)\s*(?=\{)", r"\\frac{\1}"),
        (r"(\d)\{,\}(?=\d)", r"\1,"),
        (r"\\(?:cdot|times|ast)\b", "*"),
        (r"\\div\b", "/"),
        (r"\\(?:le|leq|ge|geq|lt|gt|ne|neq|approx|to|implies|Rightarrow|rightarrow|iff)\b|[≤≥≠≈→⇒∈]", "="),
        (r"\\%", "%"),
        (r"\^\s*\{?\s*\\circ\s*\}?|°", " degrees "),
        (r"\\sqrt\s*(\w)", r"\\sqrt{\1}"),
        (r"(\\[A-Za-z]+)(?=\d)", r"\1 "),
    )
)


def plain(text: str) -> str:
    """The text with one way of writing each thing: operators, fractions, digits; relations of any kind become `=`."""
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda match: "^" + match[0].translate(_SUPERSCRIPTS), text)
    text = unicodedata.normalize("NFKC", text).translate(_SIGNS)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text


@dataclass(frozen=True, slots=True)
class Number:
    """A number in a text. `values` are the ways to read it (25% is 25 and 1/4), without sign; `sign` -1 or 1."""

    text: str
    start: int
    end: int
    values: frozenset[Fraction]
    sign: int = 1
    is_word: bool = False


# ---- numerals ------------------------------------------------------------------------------------------------------

_DIGITS = r"\d{1,60}(?:,\d{3})*(?:\.\d{1,60})?|\.\d{1,60}"
_NUMERAL = re.compile(rf"(?:{_DIGITS})(?P<percent>\s?%|\spercent\b)?")
_RATIO = re.compile(
    r"\\frac\s*\{\s*(?P<top>\d{1,60})\s*\}\s*\{\s*(?P<bottom>\d{1,60})\s*\}"
    r"|(?<![\w.^/])(?P<above>\d{1,60})\s*/\s*(?P<below>\d{1,60})(?![\w/]|\.\d)"
)
_MINUS = re.compile(r"(?:(?:^|[=({\[,:;¦])\s*-|\b(?:minus|negative))\s*$|(?<=\s)-$", re.IGNORECASE)
# x^2, x^{2}, x_2: the number belongs to the name of a term. 2^{10} is arithmetic and does not count.
_EXPONENT = re.compile(r"(?:[A-Za-z)}]\s*\^|[A-Za-z]\s*_)\s*\{?\s*$")


def numerals(text: str) -> Iterator[Number]:
    """Numbers written in digits in a `plain` text; fractions count as a whole and with both of their parts.

    Exponents and indices of letters are left out: x^2 and a_1 name a term.
    """
    for match in _RATIO.finditer(text):
        top, bottom = (int(part) for part in (match["top"] or match["above"], match["bottom"] or match["below"]))
        if bottom:
            yield Number(match[0], *match.span(), frozenset({Fraction(top, bottom)}), _sign(text, match.start()))
    for match in _NUMERAL.finditer(text):
        digits = re.sub(r"[^\d.]", "", match[0])[:120]
        if _EXPONENT.search(text, max(0, match.start() - 8), match.start()):
            continue
        value = Fraction(digits)
        values = {value, value / 100} if match["percent"] else {value}
        yield Number(match[0], *match.span(), frozenset(values), _sign(text, match.start()))


def _sign(text: str, start: int) -> int:
    return -1 if _MINUS.search(text, max(0, start - 12), start) else 1


# ---- number words --------------------------------------------------------------------------------------------------


def _words(text: str) -> list[str]:
    return text.split()


_UNITS = _words("one two three four five six seven eight nine")
_TEENS = _words("ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen")
_TENS = _words("twenty thirty forty fifty sixty seventy eighty ninety")
_WORD_VALUES = {word: value for value, word in enumerate(("zero", *_UNITS, *_TEENS))}
_WORD_VALUES |= {word: 10 * ten for ten, word in enumerate(_TENS, start=2)} | {"dozen": 12, "hundred": 100}
_SCALES = {"thousand": 10**3, "million": 10**6}
_SMALL = rf"(?:(?:{'|'.join(_TENS)})(?:[ -](?:{'|'.join(_UNITS)})(?![a-z]))?|{'|'.join((*_TEENS, *_UNITS))}|zero|dozen)"
_WORD = re.compile(
    rf"(?<![A-Za-z])(?:(?P<hundreds>{'|'.join(_UNITS)})[ -]hundred(?:[ -](?:and[ -])?(?P<rest>{_SMALL}))?"
    rf"|(?P<small>{_SMALL})|hundred)(?![A-Za-z])(?:[ -](?P<scale>thousand|million)(?![a-z]))?",
    re.IGNORECASE,
)
_FRACTION_WORDS = (
    (re.compile(r"\b(?:half|halves)\b", re.IGNORECASE), Fraction(1, 2)),
    (re.compile(r"\b(?:one|an?)[ -]third\b", re.IGNORECASE), Fraction(1, 3)),
    (re.compile(r"\b(?:two)[ -]thirds\b", re.IGNORECASE), Fraction(2, 3)),
    (re.compile(r"\b(?:(?:one|an?)[ -])(?:quarter|fourth)\b", re.IGNORECASE), Fraction(1, 4)),
    (re.compile(r"\bthree[ -](?:quarters|fourths)\b", re.IGNORECASE), Fraction(3, 4)),
)


def number_words(text: str) -> Iterator[Number]:
    """Numbers written as words: cardinals up to the millions. Ordinals order things and are not numbers."""
    for match in _WORD.finditer(text):
        if match["hundreds"]:
            value = 100 * _WORD_VALUES[match["hundreds"].lower()] + _small(match["rest"])
        else:
            value = _small(match["small"]) if match["small"] else 100
        value *= _SCALES[match["scale"].lower()] if match["scale"] else 1
        sign = _sign(text, match.start())
        yield Number(match[0], *match.span(), frozenset({Fraction(value)}), sign, is_word=True)


def fraction_words(text: str) -> Iterator[Number]:
    """Fractions that are written as words, such as "half"."""
    for pattern, value in _FRACTION_WORDS:
        for match in pattern.finditer(text):
            yield Number(match[0], *match.span(), frozenset({value}), is_word=True)


def _small(words: str | None) -> int:
    return sum(_WORD_VALUES[word] for word in re.split("[ -]", (words or "").lower()) if word)


# ---- expressions ---------------------------------------------------------------------------------------------------

_SHORT_WORDS = frozenset(_words("is of to in on by at as if or an be it so do no up we he us my am go me eg ie vs"))
_TOKEN = (
    r"(?:\d+(?:[.,]\d+)*|\\[A-Za-z]+|(?<![A-Za-z])[A-Za-z]{1,2}(?![A-Za-z'’])|(?:sin|cos|tan|log|ln|sqrt)(?![A-Za-z])"
    r"|[-+*/^=<>(){}\[\]_!|])"
)
_EXPRESSION = re.compile(rf"{_TOKEN}(?:[ \t]*{_TOKEN})*")
_SHORT = re.compile(rf"(?<![A-Za-z\\])(?:{'|'.join(_SHORT_WORDS)})(?![A-Za-z])", re.IGNORECASE)
_ARTICLE = re.compile(r"(?<![\w+*/^=<>-])(?<![+*/^=<>-]\s)[aAI]\s+(?![-+*/^=<>])")
_RELATION = re.compile(r"[=<>]+")


@dataclass(frozen=True, slots=True)
class Expression:
    """A formula in a text and its sides: what stands between its relation signs, each in a form to compare."""

    text: str
    start: int
    end: int
    sides: tuple[str, ...]


def expressions(text: str) -> Iterator[Expression]:
    """Formulas of a `plain` text, inside and outside math delimiters, that are more than one number or one name."""
    text = _SHORT.sub(lambda match: BREAK * len(match[0]), text)
    text = _ARTICLE.sub(lambda match: BREAK * len(match[0]), text)
    for match in _EXPRESSION.finditer(text):
        sides = tuple(filter(None, (compact(side) for side in _RELATION.split(match[0]))))
        if len(sides) > 1 or any(not is_atom(side) for side in sides):
            yield Expression(match[0].strip(), *match.span(), sides)


def compact(side: str) -> str:
    """Without white space, dots of multiplication, outer signs and brackets that have no partner."""
    side = re.sub(r"\s+(?![A-Za-z])|(?<![A-Za-z])\s+", "", side)
    side = re.sub(r"\*(?=[A-Za-z(\\])", "", side)
    side = side.rstrip("-+*/^_|([{\\").lstrip("+*/^_|!)]}")
    for opening, closing in ("()", "[]", "{}"):
        while side.count(opening) > side.count(closing) and side.startswith(opening):
            side = side[1:]
        while side.count(closing) > side.count(opening) and side.endswith(closing):
            side = side[:-1]
        if side.count(opening) != side.count(closing):
            return ""
    return side[1:-1] if re.fullmatch(r"\{[^{}]*\}", side) else side


def carries_numbers(side: str) -> bool:
    """Whether the expression holds a number besides exponents and indices: b^2 - ac is a formula, 2m + 4 a result."""
    return not is_atom(side) and any(True for _ in numerals(side))


def letters(side: str) -> frozenset[str]:
    r"""Variables and constants of an expression; commands of pure notation such as \frac do not count."""
    names = re.findall(r"\\[A-Za-z]+|[A-Za-z]", side)
    return frozenset(name for name in names if name not in ("\\frac", "\\sqrt", "\\cdot"))


def is_atom(side: str) -> bool:
    """A bare number, a bare name, or nothing at all."""
    return bool(re.fullmatch(r"\(*-?[\d.,]*\)*|\\?[A-Za-z]+|[^\w]*", side))
