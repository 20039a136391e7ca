"""Units by name: what they measure and how large they are; `mi / h` and `square centimeters` are put together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

# Only units of one dimension are converted into each other; words that stand in no line are compared as words.
_UNITS = (
    ("length", "1/1000", "mm millimeter millimetre 毫米"),
    ("length", "1/100", "cm centimeter centimetre 厘米"),
    ("length", "1/10", "dm decimeter decimetre 分米"),
    ("length", "1", "m meter metre 米"),
    ("length", "1000", "km kilometer kilometre 千米 公里"),
    ("length", "0.0254", 'in inch "'),
    ("length", "0.3048", "ft foot feet '"),
    ("length", "0.9144", "yd yard"),
    ("length", "1609.344", "mi mile"),
    ("mass", "1/1000000", "mg milligram 毫克"),
    ("mass", "1/1000", "g gm gram 克"),
    ("mass", "1", "kg kilogram 千克 公斤"),
    ("mass", "1000", "t tonne 吨"),
    ("mass", "0.45359237", "lb pound"),
    ("mass", "0.028349523125", "oz ounce"),
    ("time", "1/1000", "ms millisecond"),
    ("time", "1", "s sec second 秒"),
    ("time", "60", "min minute 分钟"),
    ("time", "3600", "h hr hour 小时"),
    ("time", "86400", "day 天"),
    ("time", "604800", "week 周"),
    ("months", "1", "month 月"),
    ("months", "12", "yr year 年"),
    ("volume", "1/1000", "ml mL milliliter millilitre 毫升"),
    ("volume", "1", "l L liter litre 升"),
    ("volume", "3.785411784", "gal gallon"),
    ("dollars", "1", "$ USD dollar"),
    ("dollars", "1/100", "¢ cent"),
    ("euros", "1", "€ EUR euro"),
    ("sterling", "1", "£ GBP"),
    ("yuan", "1", "元 CNY RMB yuan"),
    ("yen", "1", "円 JPY yen"),
    ("rupees", "1", "₹ INR Rs rupee"),
    ("angle", "1", "deg degree 度"),
    ("angle in radians", "1", "rad radian"),
    ("", "1", "unit approx approximately about exactly total"),  # says nothing
    ("", "12", "dozen"),
    ("", "100", "hundred"),
    ("", "1000", "thousand 千"),
    ("", "10000", "万"),
    ("", "1000000", "million"),
    ("", "100000000", "亿"),
    ("", "1000000000", "billion"),
    ("", "1000000000000", "trillion"),
)
_BY_NAME = {name: (what, Fraction(size)) for what, size, names in _UNITS for name in names.split()}
_BY_NAME["¥"] = ("yuan or yen", Fraction(1))
_SPELLINGS = {"kph": "km / h", "kmph": "km / h", "kmh": "km / h", "mph": "mi / h", "sq": "square", "cu": "cubic"}
_POWERS = {"square": 2, "cubic": 3, "平方": 2, "立方": 3}

NAMES = tuple(name for name in (*_BY_NAME, *_SPELLINGS) if name.isascii() and name.isalpha())


@dataclass(frozen=True, slots=True)
class Unit:
    """`number` times (million: 10^6) a unit of `size` in the dimensions that are named."""

    number: Fraction
    size: Fraction
    dimensions: tuple[tuple[str, int], ...]


def known(word: str) -> tuple[str, Fraction] | None:
    """What a unit measures and its size, by its name in the singular or plural; None for any other word."""
    for name in (word, word.lower() if len(word) > 2 else word):
        for singular in (name, name.removesuffix("s"), name.removesuffix("es")):
            if singular in _BY_NAME:
                return _BY_NAME[singular]
    return None


def read_unit(words: Sequence[str]) -> Unit | None:
    """The unit that the words name together; None where one of them is no unit. No words: a plain number."""
    number, size, dimensions = Fraction(1), Fraction(1), dict[str, int]()
    sign, power = 1, 1
    spelled = " ".join(_SPELLINGS.get(word.rstrip(".").lower(), word) for word in words).split()
    for i, word in enumerate(spelled):
        name, _, exponent = word.partition("^")
        if name in ("/", "per"):
            sign = -1
        elif name.lower() in _POWERS:
            power = _POWERS[name.lower()]
        elif name in ("squared", "cubed") and i:
            continue  # read with the unit before it
        elif (found := known(name)) is None:
            return None
        else:
            what, scale = found
            after = spelled[i + 1] if i + 1 < len(spelled) else ""
            power = int(exponent) if exponent else {"squared": 2, "cubed": 3}.get(after, power)
            if what:
                dimensions[what] = dimensions.get(what, 0) + sign * power
                size *= scale ** (sign * power)
            else:
                number *= scale
            sign, power = 1, 1
    if dimensions.get("length") == 3 and len(dimensions) == 1:  # a litre is a cubic decimetre
        return Unit(number, size * 1000, (("volume", 1),))
    return Unit(number, size, tuple(sorted(dimensions.items())))


def same_word(word: str, other: str) -> bool:
    """Whether two words are one unit, or one word up to its case and ending (`box`, `boxes`)."""
    if (unit := known(word)) and unit == known(other):
        return True
    short, long = sorted((word.casefold(), other.casefold()), key=len)
    return short == long or bool(len(short) > 2 and re.fullmatch(re.escape(short) + "e?s", long))


def multiplier(words: Sequence[str]) -> Fraction:
    """What the words multiply a number by, whatever they count: 10^6 for `million people`."""
    found = Fraction(1)
    for what, size in filter(None, map(known, words)):
        found *= size if not what else 1
    return found
