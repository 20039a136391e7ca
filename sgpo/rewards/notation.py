r"""Notation that Math-Verify does not read, rewritten into notation that it does; and one answer against several.

Plain text functions, linear in the text: nothing is evaluated here. They work on what stands inside a box.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product

_CHARACTERS = str.maketrans(
    {
        "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt ",
        "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ",
        "±": r"\pm ", "°": r"^{\circ}", "（": "(", "）": ")", "，": ", ", "、": ", ", "：": ":", "\u00a0": " ",
    }
)  # fmt: skip

_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\degrees?(?![A-Za-z])", r"^{\\circ}"),
        (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
        (r"\\log_(?:\{e\}|e(?![A-Za-z]))", r"\\ln"),
        (r"(?<=\d)(?:\{,\}|\\[,!; ]|,\\!\s?|~)(?=\d{3}(?!\d))", ""),  # 1{,}000 and 1\,000
        (r"\\(?:bar|dot)(?=\{\d+\})", r"\\overline"),
        (r"_\{\\(max|min)\s?\}", r"_{\1}"),
        (r"\\(?:bold|boldsymbol|bm|underline|emph|mathit|mathsf)(?=\s?\{)", ""),
        (r"^\\text(?:bf|it)?\{\s?([-+]?[\d.,]+)\s[A-Za-z ]+\}$", r"\1"),  # \text{17 students}
    )
)
_REPEATING = re.compile(r"(\d{0,20})\.(\d{0,20})\\overline\{(\d{1,20})\}")
_LEADING_TEXT = re.compile(r"\\(?:text|textrm|mathrm|mbox)\{[^{}]*(?:\bis|[:=])\s*\}(?=.)")  # \text{The answer is }
_EMPTY_SET = re.compile(r"(?:\\left)?\\\{\s*(?:\\right)?\\\}")

_CONNECTIVE = re.compile(
    r",?\s*\\(?:text|textrm|mathrm|mbox|rm)\s?\{\s{0,9},?\s{0,9}(?:and|or)\s{0,9}\}|,?\s(?:and|or)\s"
)
_PREFIX = re.compile(r"\s*[A-Za-z]\w?\s*(?:=|\\in(?![A-Za-z]))\s*(?=(?:\\left)?\\\{)")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d)")
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[()\[\]{},;]")
_SIGN = re.compile(r"\\(pm|mp)(?![A-Za-z])")

_UNIT = (
    "mm|cm|dm|km|m|in|ft|yd|mi|mg|kg|g|lb|lbs|oz|ml|mL|L|s|sec|min|h|hr|hrs|kph|mph|km/h|m/s|USD|EUR|dollars?|cents?|inch|"
    "inches|feet|foot|meters?|centimeters?|miles?|minutes?|hours?|seconds?|days?|degrees?|units?|percent"
)
_UNIT_SUFFIX = re.compile(
    rf"(?<=[\d)}}])(?:\s|~|\\[,; ])*(?:(?:sq|square|cubic)\s)?(?:{_UNIT})(?:\s?\^\s?\{{?[23]\}}?)?$"
)
_LETTER = re.compile(r"\\(?:text\w*|mathrm|mbox)\s?\{[^{}]*\}|\\[A-Za-z]+|([A-Za-z])")  # outside words and commands
_NUMBER_WITH_UNIT = re.compile(rf"[-+]?[\d.,]+\s(?:{_UNIT})(?:\s?\^\{{?[23]\}}?)?")

_MAX_SIGNS = 3  # so many independent signs in one item become 2^3 answers
_MAX_ITEMS = 64


def tidy(answer: str) -> str:
    r"""The answer in characters and commands that Math-Verify knows: `90°`, `1{,}000` or `0.\overline{3}`."""
    answer = _without_braces(answer.translate(_CHARACTERS))
    for pattern, replacement in _REWRITES:
        answer = pattern.sub(replacement, answer)
    answer = _without_braces(answer[match.end() :] if (match := _LEADING_TEXT.match(answer)) else answer)
    if _EMPTY_SET.fullmatch(answer):
        return r"\emptyset"
    return _REPEATING.sub(_as_fraction, answer)


def has_variables(gold: str) -> bool:
    """Whether the gold answer has letters that are no unit and no word, so that `m` at its end is a variable."""
    return any(match[1] for match in _LETTER.finditer(gold)) and not _NUMBER_WITH_UNIT.fullmatch(gold)


def without_unit(answer: str) -> str:
    """The answer without a plainly written unit at its end: `166 cm^2`."""
    return _UNIT_SUFFIX.sub("", answer)


def without_percent(answer: str) -> str:
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


def only_item(answer: str) -> str:
    r"""The item of a set of one: `\{(1, 2)\}`; any other answer as it is."""
    items = _split(answer)
    return items[0] if len(items) == 1 else answer


def is_grouped(answer: str) -> bool:
    """Whether one pair of brackets holds all of the answer, so that it may be several in the form of a tuple."""
    return answer.startswith(("(", "[", "\\left", "\\{"))


def _split(answer: str) -> list[str]:
    """At commas, semicolons, "and" and "or" outside of all brackets; the braces around a set are taken off first."""
    text = _set_content(_CONNECTIVE.sub(",", _PREFIX.sub("", answer, count=1)))
    items, depth, start = [], 0, 0
    for token in _TOKEN.finditer(text):
        mark = token.group()
        if mark in ("(", "[", "{", "\\{"):
            depth += 1
        elif mark in (")", "]", "}", "\\}"):
            depth = max(0, depth - 1)
        elif mark in (",", ";") and depth == 0:
            items.append(text[start : token.start()])
            start = token.end()
    items = [item.strip() for item in (*items, text[start:])]
    return [item for item in items if item] if len(items) <= _MAX_ITEMS else [answer]


def _without_braces(answer: str) -> str:
    """Without a pair of braces that only groups the whole."""
    answer = answer.strip()
    depth = 0
    for token in _TOKEN.finditer(answer) if answer.startswith("{") else ():
        depth += {"{": 1, "}": -1}.get(token.group(), 0)
        if depth == 0:
            is_group = token.end() == len(answer) and "\\choose" not in answer
            return answer[1:-1].strip() if is_group else answer
    return answer


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


def _as_fraction(match: re.Match[str]) -> str:
    whole, fixed, repeating = match.groups()
    scale = 10 ** len(fixed)
    numerator = int(whole + fixed + repeating) - int((whole + fixed) or 0)
    return rf"\frac{{{numerator}}}{{{scale * (10 ** len(repeating) - 1)}}}"
