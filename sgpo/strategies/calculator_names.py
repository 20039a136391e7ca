"""What a number is called: an earlier result, or the noun beside it in the problem and the solution."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sgpo.strategies.calculator_marks import MARK, NUM, VALUES, has_number, split_words, value_of


@dataclass(frozen=True, slots=True)
class Name:
    """How a step calls a number, alone and together with others of the same name."""

    singular: str
    plural: str
    value: float | None = None


GIVEN = Name("the given amount", "the given amounts")
_AMBIGUOUS = Name("the given amount", "the given amounts")
FACTOR = Name("the fitting factor", "the fitting factors")
PERCENTAGE = Name("the given percentage", "the given percentages")
FRACTION = Name("the given fraction", "the given fractions")
_NOT_A_NOUN = split_words(
    "is was has does as his this its less plus times minus equals us thus makes gives gets costs spends needs "
    "pays takes earns eats buys sells uses works goes runs leaves plays reads always yes besides across perhaps "
    "sometimes"
)
_IRREGULAR = split_words("people children men women feet fish sheep deer mice teeth geese dollars cents pounds")
NP_STOP = split_words(
    "in on at for from to per each every that who which when while if after before left remaining total "
    "altogether of together during with by than a an the as because so since and or but is are was were be will "
    "would can could have has had he she they it we you i his her their this these those away long wide deep more "
    "less fewer apart overall combined into until without today yesterday tomorrow now out off not worth up down "
    "how then also only there"
)
_QUANTITY = re.compile(
    rf"(?P<money>[$€£])?(?P<num>{NUM})(?P<percent>\s?%| percent)?"
    r"(?P<words>(?:[ -]+[A-Za-z'’]+){0,3})(?P<slash>/[a-z]+)?"
    rf"|(?<![A-Za-z-])(?P<word>{'|'.join(VALUES)})(?P<words2>(?: [A-Za-z'’]+){{1,3}})",
    re.IGNORECASE,
)


_PER = re.compile(r"\b(?:per|an?|every|each) (second|minute|hour|day|night|week|weekend|month|year)\b|\b(per [a-z]+)\b")


class Names:
    """Names for the numbers of one solution: an earlier result first, else the noun beside the number in the texts."""

    def __init__(self, problem: str, solution: str) -> None:
        solution = MARK.sub("", solution)
        self._results: list[tuple[float, str]] = []
        self._known: dict[float, Name] = {}
        self._fractions = set(re.findall(r"(\d+)/(\d+)", problem or solution))
        self._learn(problem or solution)
        self._given = set(self._known)
        self._learn(solution)

    def _learn(self, text: str) -> None:
        """Names the numbers of `text` that have no name yet; what counts two things is just "the given amount"."""
        found: dict[float, Name] = {}
        for match in _QUANTITY.finditer(text):
            value = VALUES[match["word"].lower()] if match["word"] else value_of(match["num"])
            if value is None:
                continue
            name = _noun_name(match)
            if name is PERCENTAGE:
                found.setdefault(round(value / 100, 6), PERCENTAGE)
            before = found.setdefault(value, name or GIVEN)
            if name is not None and before != name:
                found[value] = name if before is GIVEN else _AMBIGUOUS
        self._known = {**found, **{value: name for value, name in self._known.items() if name is not GIVEN}}

    def add_result(self, value: float, thing: str) -> None:
        """Makes `value` known as the newest result, called `thing`."""
        self._results.append((value, thing))

    def of(self, value: float) -> Name:
        """What `value` is called: an earlier result, a noun from the texts, or just a factor."""
        for back, (result, thing) in enumerate(reversed(self._results)):
            if result == value:
                how = "just found" if back == 0 else "found earlier"
                return Name(f"{thing} {how}", "the results found so far", value)
        name = self._known.get(value) or self._known.get(round(value, 6)) or FACTOR
        if name is GIVEN and value not in self._given:
            name = FACTOR
        return replace(name, value=value)

    def is_fraction(self, numerator: float, denominator: float) -> bool:
        """Whether the texts write these two numbers as a fraction."""
        return (f"{numerator:g}", f"{denominator:g}") in self._fractions


def _noun_name(match: re.Match[str]) -> Name | None:
    if match["percent"]:
        return PERCENTAGE
    words = (match["words"] or match["words2"] or "").split()
    if (match["words"] or "").startswith("-"):  # "a 6-foot board" counts no boards
        return None
    per = _PER.search(" ".join(words))
    rate = f" per {per[1]}" if per and per[1] else f" {per[2]}" if per else ""
    if not rate and words[:1] in (["each"], ["apiece"]):
        rate = " per item"
    if match["slash"]:
        rate = f" per {match['slash'][1:]}"
    if has_number(rate):
        rate = ""
    if match["money"]:
        return Name(f"the amount of money{rate}", f"the amounts of money{rate}")
    noun = _noun(words)
    if noun is None or has_number(noun):
        return None
    return Name(f"the number of {noun}{rate}", f"the numbers of {noun}{rate}")


def _noun(words: Sequence[str]) -> str | None:
    """The words up to the first plural noun, or None where a function word comes first."""
    for index, word in enumerate(words):
        low = word.lower()
        if low in NP_STOP or low in _NOT_A_NOUN or not low.isalpha() or (low != word and index == 0):
            return None
        if is_plural(word):
            return " ".join(words[: index + 1]).lower()
    return None


def is_plural(word: str) -> bool:
    """Whether a word looks like a plural noun."""
    low = word.lower()
    if low in _NOT_A_NOUN or low in NP_STOP:
        return False
    return low in _IRREGULAR or (low.isalpha() and low.endswith("s") and not low.endswith(("ss", "ous")))
