r"""Numbers with words: units, money, clock times, `2 \text{ hours } 30 \text{ minutes}`, `3 \text{ red}`.

Math-Verify drops what follows a number in `\text{}`. Here the words are read: they may be missing on one side, but
where both sides have some they must not contradict each other. Plain text functions on answers that `notation.tidy` has
been through; the numbers themselves are compared by a function that is given.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from sgpo.rewards.items import gold_items
from sgpo.rewards.units import NAMES, Unit, multiplier, read_unit, same_word

Same = Callable[[str, str], bool]

_NAME = "|".join(sorted(NAMES, key=len, reverse=True))
_BARE = rf"(?:(?:sq|square|cubic)\.?\s)?(?:{_NAME})(?:e?s)?(?:\s?(?:/|\bper)\s?(?:{_NAME}))?"
_TOKEN = re.compile(
    r"(?<![_^])(?<![_^]\{)\\(?:text\w{0,6}|mathrm|mbox|operatorname)\s?\{(?P<text>[^{}]*)\}"
    r"(?:\s?\^\s?\{?\s?(?P<text_power>-?\d)\s?\}?)?"
    r"|(?P<degree>\^\{\\circ\}\s?[CF]?(?![A-Za-z]))"
    r"|(?P<currency>\\?\$|[€£¥₹¢₩₽฿₫₱₺₴])"
    r"|(?<![A-Za-z\\])(?P<code>USD|EUR|GBP|CNY|RMB|JPY|INR|Rs\.?)(?=\s?\d)"
    r"|(?<=\d)(?P<prime>['\"])"
    rf"|(?:(?<=[\d)}}\s~])|(?<=\\[,;:!]))(?P<bare>{_BARE}|[ap]\.?\s?m\b|[AP]\.?\s?M\b)(?![A-Za-z(])"
    r"(?:\s?\^\s?\{?\s?(?P<bare_power>-?\d)\s?\}?)?"
    r"|(?P<cjk>[\u4e00-\u9fff]+)"
)
_IN_TEXT = re.compile(r"\d+(?:[.,:]\d+)*|[ap]\.\s?m(?![^\W\d_])|[^\W\d_]+(?:\^\d)?|[/$€£¥₹¢]", re.IGNORECASE)
_MERIDIEM = re.compile(r"([ap])\.?\s?m", re.IGNORECASE)
_CJK_POWER = re.compile("(平方|立方)")
_EMPTY = ("and", "a", "an", "the")
_EDGE = re.compile(r"(?:\s|~|\\[,;:! ]|\\q?quad(?![A-Za-z])|[,;]){1,20}")
_EDGE_AT_END = re.compile(rf"{_EDGE.pattern}$")
_LETTER = re.compile(r"\\(?:text\w*|mathrm|mbox)\s?\{[^{}]*\}|\\[A-Za-z]+|([A-Za-z])")  # outside words and commands
_SENTENCE = re.compile(r"(?=.*[A-Za-z]{3})(?=.*\d)[\w.]+(?: [\w.]+){1,20}")  # 17 students, June 20
_CLOCK = re.compile(r"(\d{1,2})(?::([0-5]\d)(?::([0-5]\d))?)?")
_CHANGES_VALUE = frozenset({
    "or", "not", "than", "least", "most", "if", "unless", "plus", "minus", "times", "except", "nor", "neither",
    "between", "maybe", "under", "over", "below", "above", "half", "halves", "third", "thirds", "quarter", "quarters",
    "tenth", "tenths", "hundredth", "hundredths", "squared", "cubed", "negative", "factorial",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number (or formula) with the words before and after it."""

    number: str
    before: tuple[str, ...]
    after: tuple[str, ...]

    @property
    def words(self) -> tuple[str, ...]:
        """All of them."""
        return self.before + self.after

    @property
    def unit(self) -> Unit | None:
        """What the words name; None where one of them is no unit."""
        return read_unit(self.words)

    @property
    def is_number(self) -> bool:
        """Whether the formula has no variables."""
        return not any(match[1] for match in _LETTER.finditer(self.number))


def has_variables(gold: str) -> bool:
    """Whether the gold answer has letters that are no unit and no word, so that `m` at its end is a variable."""
    spaced = (token for token in _TOKEN.finditer(gold) if token["bare"] and gold[token.start() - 1].isspace())
    gold = gold[: token.start()] + gold[token.end() :] if (token := next(spaced, None)) else gold
    return any(match[1] for match in _LETTER.finditer(gold))


def read(answer: str, *, bare: bool) -> list[Quantity] | None:
    """The quantities of an answer, in order; None where it is no sequence of formulas and words.

    bare: whether unit names count that stand outside of a text command, as in `166 cm^2`.
    """
    quantities: list[Quantity] = []
    before: list[str] = []
    if _SENTENCE.fullmatch(answer):
        answer = rf"\text{{{answer}}}"
    for is_word, part in _parts(answer, bare=bare):
        if not is_word:
            if part.startswith("=") and before and not quantities:  # \text{Area} = 5
                part, before = part[1:].strip(), []
            if part.count("{") != part.count("}") or len(re.findall(r"[(\[]", part)) != len(re.findall(r"[)\]]", part)):
                return None
            if before and part[0] in "_^(":
                return None  # an operator with its argument
            quantities.append(Quantity(part, tuple(before), ()))
            before = []
        elif quantities and part not in "$€£₹":
            last = quantities[-1]
            quantities[-1] = Quantity(last.number, last.before, (*last.after, part))
        elif quantities and not quantities[-1].after and not quantities[-1].before:
            quantities[-1] = Quantity(quantities[-1].number, (), (part,))
        else:
            before.append(part)
    return quantities if quantities and not before else None


def compare(gold: str, answer: str, same: Same, *, bare: bool) -> bool | None:
    """Whether the quantities agree; None where words do not decide, and the formulas are to be compared as they are."""
    if ":" not in gold and not any(_TOKEN.search(text) or _SENTENCE.fullmatch(text) for text in (gold, answer)):
        return None
    golds, answers = read(gold, bare=bare), read(answer, bare=bare)
    if golds is None or answers is None:
        return None
    times = _clock(golds), _clock(answers)
    if times[0] and times[1]:
        return _same_time(times[0], times[1])
    if not any(quantity.words for quantity in (*golds, *answers)):
        return None
    if len(golds) == len(answers) == 1:
        return _same_quantity(golds[0], answers[0], same)
    separated = any(len(gold_items(text)) > 1 for text in (gold, answer))
    return _same_sums(golds, answers, same, separated=separated)


def _parts(answer: str, *, bare: bool) -> list[tuple[bool, str]]:
    """(is it a word, the word or formula), in order."""
    parts: list[tuple[bool, str]] = []
    start = 0
    for token in _TOKEN.finditer(answer):
        if token["bare"] and not bare:
            continue
        parts.append((False, answer[start : token.start()]))
        parts += [(not word[0].isdigit(), word) for word in _words(token)]
        start = token.end()
    parts.append((False, answer[start:]))
    stripped = ((is_word, part if is_word else _without_edges(part)) for is_word, part in parts)
    return [(is_word, part) for is_word, part in stripped if part]


def _words(token: re.Match[str]) -> list[str]:
    """The words of one token, the last one with its power: "square", "m" or "cm^2"."""
    if token["degree"]:
        words = ["degree", *token["degree"][len(r"^{\circ}") :].split()]
    elif token["cjk"]:
        words = _CJK_POWER.sub(r"\1 ", token["cjk"]).split()
    elif token["currency"] or token["code"] or token["prime"]:
        words = [token.group().strip("\\.")]
    else:
        text = re.sub(r"\([^()]*\)|\\", " ", token["text"] if token["bare"] is None else token["bare"])
        words = [_MERIDIEM.sub(r"\1m", word) for word in _IN_TEXT.findall(text)]
    words = [word.lower() if word in ("Am", "AM", "Pm", "PM") else word for word in words if word.lower() not in _EMPTY]
    if words and (power := token["text_power"] or token["bare_power"]):
        words[-1] += f"^{power}"
    return words


def _without_edges(formula: str) -> str:
    while match := _EDGE.match(formula):
        formula = formula[match.end() :]
    while match := _EDGE_AT_END.search(formula[-8:]):
        formula = formula[: -len(match.group())]
    return formula


def _same_quantity(gold: Quantity, answer: Quantity, same: Same) -> bool | None:
    left, right = gold.unit, answer.unit
    given = [{word.lower() for word in side.words} & _CHANGES_VALUE for side in (gold, answer)]
    if given[0] != given[1] and (left is None or right is None):
        return False
    factor = multiplier(gold.words) / multiplier(answer.words)
    if not answer.words and left is None and (gold.before or not gold.is_number):
        return False  # June 20, n is odd: more than a unit is missing
    if not gold.words and right is None and answer.before:
        return None
    if left and right and left.dimensions and right.dimensions:
        return left.dimensions == right.dimensions and same(
            _scaled(gold.number, factor * left.size / right.size), answer.number
        )
    less, more = sorted((gold.words, answer.words), key=len)
    if not (left and right) and not all(any(same_word(word, other) for other in more) for word in less):
        return False
    return same(_scaled(gold.number, factor), answer.number)


def _same_sums(golds: list[Quantity], answers: list[Quantity], same: Same, *, separated: bool) -> bool | None:
    r"""`2 \text{ hours } 30 \text{ minutes}` as a sum, where all units are of one kind; else quantity by quantity."""
    gold_sum, answer_sum = _sum(golds), _sum(answers)
    if separated and not (gold_sum and answer_sum) and not all(quantity.words for quantity in (*golds, *answers)):
        return None
    units = golds[0].unit, answers[0].unit
    if gold_sum and answer_sum and units[0] and units[1] and units[0].dimensions == units[1].dimensions:
        return same(gold_sum, answer_sum)
    if answer_sum and len(golds) == 1 and not golds[0].words:  # in one of the units
        sizes = {quantity.unit.size for quantity in answers if quantity.unit}
        return any(same(golds[0].number, _scaled(answer_sum, 1 / size)) for size in sizes)
    left = list(answers)
    for gold in golds if len(golds) == len(answers) else ():
        alike = (other for other in left if bool(gold.words) == bool(other.words))
        found = next((other for other in alike if _same_quantity(gold, other, same)), None)
        if found is None:
            return False
        left.remove(found)
    return not left


def _sum(quantities: Sequence[Quantity]) -> str | None:
    """In the base unit; None where the units are not all of one kind, or no smaller one follows a larger one."""
    units = [quantity.unit for quantity in quantities]
    known = [unit for unit in units if unit and unit.dimensions == (units[0] and units[0].dimensions)]
    sizes = [unit.number * unit.size for unit in known]
    if len(known) < len(units) or not known[0].dimensions or sizes != sorted(set(sizes), reverse=True):
        return None
    return "+".join(_scaled(quantity.number, size) for quantity, size in zip(quantities, sizes, strict=True))


def _scaled(number: str, factor: Fraction) -> str:
    return number if factor == 1 else rf"\frac{{{factor.numerator}}}{{{factor.denominator}}} \cdot ({number})"


def _clock(quantities: Sequence[Quantity]) -> tuple[tuple[int, ...], str] | None:
    """(hours, minutes, seconds), and "am" or "pm" or ""; None for what is no time of day."""
    match = _CLOCK.fullmatch(re.sub(r"[\s{}]|\\!", "", quantities[0].number)) if len(quantities) == 1 else None
    words = quantities[0].words
    if match is None or len(words) > 1 or not set(words) <= {"am", "pm"} or not (words or match[2]):
        return None
    return tuple(int(part or 0) for part in match.groups()), words[0] if words else ""


def _same_time(gold: tuple[tuple[int, ...], str], answer: tuple[tuple[int, ...], str]) -> bool:
    def of_day(time: tuple[tuple[int, ...], str]) -> tuple[int, ...]:
        hour = time[0][0]
        return ({"am": hour % 12, "pm": hour % 12 + 12}.get(time[1], hour), *time[0][1:])

    return of_day(gold) == of_day(answer) or (not (gold[1] and answer[1]) and gold[0] == answer[0])
