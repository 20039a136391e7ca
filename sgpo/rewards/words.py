r"""Answers in letters: option letters with or without their text, names, permutations, H/T strings.

To Math-Verify a run of letters is a product of variables, so that `CAB` equals `ABC`. Here it is a word. Plain text
functions, linear in the text, on answers that `notation.tidy` has been through.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_TEXT = re.compile(r"\\(?:text\w{0,6}|mathrm|mbox|operatorname)\s?\{([^{}]*)\}")
_SPACE = re.compile(r"(?:\s|~|\\[,;:! ]|\\q?quad(?![A-Za-z]))+")
_LETTERS = re.compile(r"[^\W\d_]+")
_BETWEEN_LETTERS = re.compile(r"[\s,;.>'-]|\\(?:to|rightarrow|cdots)(?![A-Za-z])")
_SMALL_WORDS = {"a", "an", "the", "and"}

# In these, \x01 and \x02 stand for the braces of a \text{}.
_CHOICE = re.compile(
    r"[\x01\s]*(?:(?:[Oo]ption|[Cc]hoice|选项?|故选|答案)[:\s]?)?[\x01\s]*(?P<open>[(\[])?[\x01\s]*(?P<letter>[A-J])(?P<close>[\x02\s]*)"
    r"(?P<mark>[)\]]|[.:](?![A-Z]))?[\x02\s]*(?:\)(?=[\x02\s]*$))?[.:]?\s*(?P<rest>.*)",
    re.DOTALL,
)
_ANOTHER = re.compile(r"(?<![A-Za-z\\])(?:or|and)(?![A-Za-z])|(?<![A-Za-z\\(])\(?[A-J]\)|^[,;]\s*[A-J](?![A-Za-z])")


@dataclass(frozen=True, slots=True)
class Choice:
    """An option of a multiple-choice problem: its letter, and its text or ""."""

    letter: str
    text: str


def read_choice(answer: str) -> Choice | None:
    r"""`B`, `(B)`, `\text{B. }5`, `\textbf{(B)}\ 12`; None for what is no option, or more than one."""
    marked = _SPACE.sub(" ", _TEXT.sub("\x01\\1\x02", answer))
    match = _CHOICE.fullmatch(marked)
    if match is None:
        return None
    rest = match["rest"].strip().removeprefix("=").strip()
    is_option = bool(match["mark"]) or ("\x01" in match[0][: match.end("letter")] and "\x02" in match["close"])
    if (rest and not is_option) or (match["open"] and not match["mark"] and not match[0].rstrip().endswith(")")):
        return None
    if _ANOTHER.search(rest):
        return None
    if rest.count("\x02") > rest.count("\x01"):
        rest = "\x01" + rest
    return Choice(match["letter"], rest.replace("\x01", "\\text{").replace("\x02", "}").removesuffix("\\text{}"))


def letters_of(answer: str) -> str | None:
    r"""`\text{East}` as "east", `C, A, B` as "cab", `\text{the ellipse}` as "ellipse"; None where it is no word."""
    text = _SPACE.sub(" ", _TEXT.sub(r"\1", answer)).strip()
    if text.startswith("(") and text.endswith(")"):
        text = text[1:-1]
    words = _BETWEEN_LETTERS.sub(" ", text).split()
    if not words or not all(map(_LETTERS.fullmatch, words)):
        return None
    return "".join([word for word in words if word not in _SMALL_WORDS] or words).casefold()


def is_product(gold: str) -> bool:
    """Whether a word of two letters is rather two variables, in any order: `xy`, but not `no`."""
    return bool(re.fullmatch(r"[a-df-hj-np-tv-z]{2}", gold.replace(" ", "")))


def same_letters(gold: str, answer: str) -> bool:
    """Whether two words (of `letters_of`) are one. Letters of a set of options, in alphabetical order in the gold
    answer, may come in any order: `AC`, `ABD`. `ABC` is not taken for such a set: it may be an arrangement.
    """
    if gold == answer:
        return True
    is_set = gold == "".join(sorted(set(gold))) and gold <= "f" * len(gold) and gold[-1] <= "f"
    is_arrangement = len(gold) > 2 and gold == "abcdef"[: len(gold)]
    return is_set and not is_arrangement and sorted(gold) == sorted(answer)
