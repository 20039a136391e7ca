r"""One answer against several: the items of a gold answer, and the lists that an answer can mean.

Plain text functions, linear in the text, on answers that `notation.tidy` has been through.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product

_ASSIGNMENT = re.compile(r"([A-Za-z]\w?|[A-Za-z]_\{?\w\}?)\s?=([^=]+)")
_RESIDUE = re.compile(r"(?:[a-z]\s?\\equiv\s?)?([^\\]{1,40})\\pmod\s?(?:\{[^{}]{1,40}\}|\w{1,9})")
_REVERSED = re.compile(r"([^=A-Za-z]{1,200}|[^=]{0,200}\d)=\s?[A-Za-z]")  # 5 = x
_CASES = re.compile(
    r"(?:[^=]{1,40}=)?\s*(?:\\left\s?\\\{)?\s*\\begin\{(cases|array|aligned)\}(?:\{[lcr]+\})?(.*)\\end\{\1\}"
    r"(?:\s*\\right\s?\.)?",
    re.DOTALL,
)
_CONDITION_WORDS = re.compile(r"\\(?:text\w*|mathrm|mbox)\s?\{\s*,?\s*(?:if|for|when|where|is|,)?\s*\}|[,.;]\s*$")
_CONNECTIVE = re.compile(
    r",?\s{0,9}\\(?:text|textrm|mathrm|mbox|rm)\s?\{\s{0,9},?\s{0,9}(?:and|or)\s{0,9}\}|,?\s(?:and|or)\s|[或和及与]"
)
_PREFIX = re.compile(r"[A-Za-z]\w?\s{0,9}(?:=|\\in(?![A-Za-z]))\s{0,9}(?=(?:\\left)?\\\{)")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d)")
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[()\[\]{},;]")
_SIGN = re.compile(r"\\(pm|mp)(?![A-Za-z])")


_MAX_SIGNS = 3  # so many independent signs in one item become 2^3 answers
_MAX_ITEMS = 64


def without_percent(answer: str) -> str:
    """The answer without percent signs."""
    return answer.replace("\\%", "").replace("%", "").strip(" ~")


def gold_items(gold: str) -> list[str]:
    """The answers that a gold answer consists of. A comma before three digits without a space is one of a thousand."""
    return _expanded(_split(_THOUSANDS.sub(_without_commas, gold)), independent=False)


def answer_readings(answer: str) -> Iterator[list[str]]:
    r"""The lists that `answer` can mean: `1,350` is one number or two, `(\pm 1, \pm 2)` two points or four."""
    seen = []
    for text in dict.fromkeys((answer, _THOUSANDS.sub(_without_commas, answer))):
        items = _split(text)
        for independent in (False, True):
            reading = _expanded(items, independent=independent)
            if reading not in seen:
                seen.append(reading)
                yield reading


def spellings(answer: str) -> Iterator[str]:
    r"""Other ways to read a single answer: `\{(1, 2)\}` and `n \equiv 5 \pmod 7`."""
    items = _split(answer)
    if len(items) == 1 and items[0] != answer:
        yield items[0]
    if reversed_equation := _REVERSED.fullmatch(answer):
        yield reversed_equation[1].strip()
    if residue := _RESIDUE.fullmatch(answer):
        yield residue[1]


def as_point(answer: str) -> str:
    """`y=1, x=2` as `(2, 1)`: the values in alphabetical order of their names. Any other answer as it is."""
    named = [_ASSIGNMENT.fullmatch(item) for item in _split(answer)]
    values = {match[1]: match[2].strip() for match in named if match}
    if len(values) < 2 or len(values) != len(named):
        return answer
    return f"({', '.join(values[name] for name in sorted(values))})"


def pieces(answer: str) -> list[tuple[str, str]] | None:
    """(value, condition) of each case of a definition by cases; None for any other answer."""
    match = _CASES.fullmatch(answer)
    found = []
    for row in re.split(r"\\\\(?:\[[^\[\]]{0,9}\])?", match[2]) if match else ():
        parts = row.split("&") if "&" in row else _split(row)
        if row.strip() and len(parts) != 2:
            return None
        if row.strip():
            value, condition = (_CONDITION_WORDS.sub("", part.strip()).strip(" ,") for part in parts)
            found.append((value, condition))
    return found or None


def union_items(answer: str) -> list[str]:
    """The parts of a union of intervals, or of conditions joined by "or"."""
    return [part for piece in answer.split("\\cup") for part in _split(piece)]


def is_grouped(answer: str) -> bool:
    """Whether one pair of brackets holds all of the answer, so that it may be several in the form of a tuple."""
    return answer.startswith(("(", "[", "\\left", "\\{"))


def _split(answer: str) -> list[str]:
    """At commas, semicolons, "and" and "or" outside of all brackets; the braces around a set are taken off first."""
    text = _set_content(_CONNECTIVE.sub(",", _PREFIX.sub("", answer, count=1)))
    items, depth, start = [], 0, 0
    for token in _TOKEN.finditer(text):
        mark = token.group()
        if mark in ("(", "[", "{", "\\{", "\\begin"):
            depth += 1
        elif mark in (")", "]", "}", "\\}", "\\end"):
            depth = max(0, depth - 1)
        elif mark in (",", ";") and depth == 0:
            items.append(text[start : token.start()])
            start = token.end()
    items = [item.strip() for item in (*items, text[start:])]
    return [item for item in items if item] if len(items) <= _MAX_ITEMS else [answer]


def _set_content(text: str) -> str:
    stripped = text.strip()
    for begin, end in (("\\{", "\\}"), ("\\left\\{", "\\right\\}")):
        inner = stripped[len(begin) : -len(end)]
        if stripped.startswith(begin) and stripped.endswith(end) and "\\{" not in inner and inner.strip():
            return inner
    return text


def _expanded(items: list[str], *, independent: bool) -> list[str]:
    r"""Every item with `\pm` becomes one with plus and one with minus; all its signs together, or each for itself."""
    expanded = []
    for item in items:
        signs = _SIGN.findall(item)
        if not signs or len(signs) > _MAX_SIGNS:
            expanded.append(item)
            continue
        width = len(signs) if independent else 1
        for chosen in product((True, False), repeat=width):
            plus = iter(chosen * (1 if independent else len(signs)))
            expanded.append(_SIGN.sub(lambda sign, plus=plus: "+" if next(plus) == (sign[1] == "pm") else "-", item))
    return expanded


def _without_commas(match: re.Match[str]) -> str:
    return match.group().replace(",", "")
