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
        "€": "", "£": "", "≈": r"\approx ",
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
        (r"\\langle(?![A-Za-z])", "("),
        (r"\\rangle(?![A-Za-z])", ")"),
        (r"\\text\{\s?\}", ""),
        (r"^(?:\\text\{\s?)?[Aa]ll real numbers\.?\s?\}?$", r"(-\\infty, \\infty)"),
        (r"^\\approx(?![A-Za-z])", ""),
        (r"^([-+]?\d{1,20}(?:\.\d{1,20})?)[eE]([-+]?\d{1,3})$", r"\1 \\times 10^{\2}"),
        (r"^\](.{1,200}),(.{1,200})\[$", r"(\1,\2)"),  # ]0, 1[
        (
            r"[,;\s]{0,9}(?:\\text\s?\{[^{}]{0,40}\}\s{0,9})?\(?[A-Za-z]\s?\\in\s?\\mathbb\s?\{?[ZNR]\}?(?:\^?\+)?\)?$",
            "",
        ),
        (r"^(?:\\left)?\\\{\s?[a-z](?:\s?\\in\s?\\mathbb\{R\})?\s?(?:\\mid|\||:)(.{1,400}?)(?:\\right)?\\\}$", r"\1"),
        (r"\\(?:bold|boldsymbol|bm|underline|emph|mathit|mathsf)(?=\s?\{)", ""),
        (r"^\\text(?:bf|it)?\{\s?([-+]?[\d.,]+)\s[A-Za-z ]+\}$", r"\1"),  # \text{17 students}
    )
)
_REPEATING = re.compile(r"(\d{0,20})\.(\d{0,20})\\overline\{(\d{1,20})\}")
_LEADING_TEXT = re.compile(r"\\(?:text|textrm|mathrm|mbox)\{[^{}]*(?:\bis|[:=])\s*\}(?=.)")  # \text{The answer is }
_ASSIGNMENT = re.compile(r"([A-Za-z])\s?=([^=]+)")
_CHOICE = re.compile(r"\\text(?:bf|rm|it)?\s?\{\s?\(?([A-J])[).]\s?\}(?:\\[ ,;]|~|\s)?(?=.)")
_RESIDUE = re.compile(r"(?:[a-z]\s?\\equiv\s?)?([^\\]{1,40})\\pmod\s?(?:\{[^{}]{1,40}\}|\w{1,9})")
_TEXT_COMMAND = re.compile(r"\\(?:text\w{0,6}|mathrm|mbox)(?=\s?\{)")
_WORD = re.compile(r"[^\W_]+|:")
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
    r"""Other ways to read a single answer: `\{(1, 2)\}`, `\text{(A) } 5` (as 5 and as A), `n \equiv 5 \pmod 7`."""
    items = _split(answer)
    if len(items) == 1 and items[0] != answer:
        yield items[0]
    if choice := _CHOICE.match(answer):
        yield from (answer[choice.end() :], choice[1])
    if residue := _RESIDUE.fullmatch(answer):
        yield residue[1]


def as_point(answer: str) -> str:
    """`y=1, x=2` as `(2, 1)`: the values in alphabetical order of their names. Any other answer as it is."""
    named = [_ASSIGNMENT.fullmatch(item) for item in _split(answer)]
    values = {match[1]: match[2].strip() for match in named if match}
    if len(values) < 2 or len(values) != len(named):
        return answer
    return f"({', '.join(values[name] for name in sorted(values))})"


def words_of(answer: str) -> str | None:
    r"""The letters of an answer in words (`\text{June } 20` as "june20"); None where it is a formula."""
    text = _TEXT_COMMAND.sub("", answer)
    if text == answer and not answer.replace(" ", "").isalnum():
        return None
    return None if any(mark in text for mark in "\\^_=") else "".join(_WORD.findall(text.casefold()))


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
