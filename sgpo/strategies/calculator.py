"""Strategies from solutions with calculator marks (GSM8K's <<48/2=24>>), without a model: the same text every time.

A strategy has three parts, as in the paper: problem type, strategy, procedural steps. Each mark becomes a step: its
operation, what it works on, and what it is for. The last two come from the words around the mark; where these give no
readable phrase, the step says less. Nothing that looks like a number survives (see `leaks`).

Numbers are: digits, cardinals ("twelve"), factors and fractions ("half", "twice", "third", "quarter"), "dozen". The
positions "first" and "second" are not, nor is "second" as a unit of time, so steps may be ordered in words.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from sgpo.types import Problem


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_SMALL = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = _words("twenty thirty forty fifty sixty seventy eighty ninety")
_VALUES = {word: float(value) for value, word in enumerate(_SMALL)}
_VALUES |= {word: 10.0 * ten for ten, word in enumerate(_TENS, start=2)}
_CARDINALS = "|".join((*_SMALL, *_TENS, "hundreds?", "thousands?", "millions?", "billions?", "trillions?", "dozens?"))
_FACTORS = (
    r"half|halves|halve[sd]?|halving|twice|thrice|doubl\w+|tripl\w+|quadrupl\w+|quarters?|"
    r"(?:third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|eleventh|twelfth|\w+teenth|\w+tieth|hundredth|thousandth)s?"
)
_NUMBER_WORD = re.compile(rf"(?<![A-Za-z])(?:{_CARDINALS}|{_FACTORS})(?![A-Za-z])", re.IGNORECASE)
_DIGITS = re.compile(r"\d[\d.,/]*|[\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u2089\u2150-\u2189]")

_NUM = r"(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_MARK = re.compile(r"<<([^<>\n]*)>>")
_RESULT = re.compile(rf"\s*[-$€£]*\s*{_NUM}%?|\s*[-$€£]*{_NUM}")
_OPERAND = rf"[-($€£]*{_NUM}[)%]*(?:[ /-]?[A-Za-z'’/]+\.?){{0,4}}\)*"
# The written computation in front of a mark: "7 stickers/page * 6 pages = $".
_WRITTEN = re.compile(rf"(?:{_OPERAND}\s*(?:[-+*/x×÷–−=]|times|plus|minus)\s*)+(?:{_OPERAND})?\s*=?\s*[$€£]?\s*$")
_SENTENCE_END = re.compile(r"(?<=[A-Za-z)\d])[.!?]\s+(?=[A-Z])|\n")

Expression = ast.expr
_ARITHMETIC = (ast.BinOp, ast.UnaryOp, ast.Constant, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.USub, ast.UAdd)


@dataclass(frozen=True, slots=True)
class StrategyReport:
    """What `attach_strategies` did; `leaked` holds (problem id, leaks) of strategies that were therefore dropped."""

    total: int
    already_present: int
    extracted: int
    without_mark: int
    leaked: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True, slots=True)
class _Mark:
    """One calculator mark: the text before it and after it (up to the neighbouring marks), its terms and value."""

    before: str
    after: str
    expression: Expression | None
    value: float | None
    is_money: bool


@dataclass(frozen=True, slots=True)
class _Name:
    """How a step calls a number, alone and together with others of the same name."""

    singular: str
    plural: str
    value: float | None = None


_GIVEN = _Name("the given amount", "the given amounts")
_AMBIGUOUS = _Name("the given amount", "the given amounts")
_FACTOR = _Name("the fitting factor", "the fitting factors")
_PERCENTAGE = _Name("the given percentage", "the given percentages")
_FRACTION = _Name("the given fraction", "the given fractions")


def strategy_from_calculator_trace(solution: str, problem_text: str = "") -> str | None:
    """The strategy behind a solution with calculator marks, or None where it has no mark.

    Args:
        solution: worked text with marks such as <<48/2=24>>.
        problem_text: the question, where known: only used to name the numbers that the solution works on.
    """
    marks = list(_marks(solution))
    if not marks:
        return None
    names = _Names(problem_text, solution)
    steps: list[str] = []
    for index, mark in enumerate(marks):
        operation = _operation(mark.expression, names)
        goal = _goal(mark, is_last=index == len(marks) - 1)
        steps.append(f"{operation} to find {goal}" if goal else operation)
        if mark.value is not None:
            names.add_result(mark.value, _thing(mark))
    return "\n".join(
        (
            f"Problem type: {_problem_type(f'{problem_text} {solution}', len(steps))}",
            f"Strategy: {_overview(steps)}",
            "Steps:",
            *_bullets(steps),
        )
    )


def attach_strategies(problems: Iterable[Problem]) -> tuple[list[Problem], StrategyReport]:
    """Fills `strategy` from `solution` where it is absent and the solution has marks; all other fields stay.

    A strategy that leaks is not attached but reported.
    """
    filled: list[Problem] = []
    leaked: list[tuple[str, tuple[str, ...]]] = []
    already_present = extracted = without_mark = 0
    for problem in problems:
        strategy = problem.strategy
        if strategy:
            already_present += 1
        elif (strategy := strategy_from_calculator_trace(problem.solution or "", problem.problem)) is None:
            without_mark += 1
        elif found := leaks(strategy, problem):
            leaked.append((problem.id, tuple(found)))
            strategy = None
        else:
            extracted += 1
        filled.append(replace(problem, strategy=strategy))
    return filled, StrategyReport(len(filled), already_present, extracted, without_mark, tuple(leaked))


def leaks(strategy: str, problem: Problem) -> list[str]:
    """Everything in `strategy` that gives numbers away: digits, number words, and the answer as it is written."""
    found = [match[0] for match in (*_DIGITS.finditer(strategy), *_NUMBER_WORD.finditer(strategy))]
    answer = problem.answer.strip()
    if answer and re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", strategy, re.IGNORECASE):
        found.append(answer)
    return list(dict.fromkeys(found))


def _has_number(text: str) -> bool:
    return bool(_DIGITS.search(text) or _NUMBER_WORD.search(text))


# Reading the marks


def _marks(solution: str) -> Iterator[_Mark]:
    for sentence in _SENTENCE_END.split(solution):
        found = list(_MARK.finditer(sentence))
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
            yield _Mark(lead, sentence[start:stop], expression, value, money)


def _parsed(mark: str, written: str) -> tuple[Expression | None, float | None]:
    left, _, right = mark.partition("=")
    value = _number(right.strip().lstrip("$"))
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


def _number(text: str) -> float | None:
    text = text.replace(",", "").rstrip("%. ")
    return float(text) if re.fullmatch(r"-?(?:\d+\.?\d*|\.\d+)", text) else None


# What a number is called


_NOT_A_NOUN = _words(
    "is was has does as his this its less plus times minus equals us thus makes gives gets costs spends needs "
    "pays takes earns eats buys sells uses works goes runs leaves plays reads always yes besides across perhaps "
    "sometimes"
)
_IRREGULAR = _words("people children men women feet fish sheep deer mice teeth geese dollars cents pounds")
_NP_STOP = _words(
    "in on at for from to per each every that who which when while if after before left remaining total "
    "altogether of together during with by than a an the as because so since and or but is are was were be will "
    "would can could have has had he she they it we you i his her their this these those away long wide deep more "
    "less fewer apart overall combined into until without today yesterday tomorrow now out off not worth up down "
    "how then also only there"
)
_QUANTITY = re.compile(
    rf"(?P<money>[$€£])?(?P<num>{_NUM})(?P<percent>\s?%| percent)?"
    r"(?P<words>(?:[ -]+[A-Za-z'’]+){0,3})(?P<slash>/[a-z]+)?"
    rf"|(?<![A-Za-z-])(?P<word>{'|'.join(_VALUES)})(?P<words2>(?: [A-Za-z'’]+){{1,3}})",
    re.IGNORECASE,
)
_UNITS = _words("kg km cm mm m g lb lbs oz ml l mph ft sq percent fruit money water time food pizza")
_DIMENSIONS = _words("old tall long wide deep high older taller longer shorter younger farther faster")
_PER = re.compile(r"\b(?:per|an?|every|each) (second|minute|hour|day|night|week|weekend|month|year)\b|\b(per [a-z]+)\b")


class _Names:
    """Names for the numbers of one solution: an earlier result first, else the noun beside the number in the texts."""

    def __init__(self, problem: str, solution: str) -> None:
        solution = _MARK.sub("", solution)
        self._results: list[tuple[float, str]] = []
        self._known: dict[float, _Name] = {}
        self._fractions = set(re.findall(r"(\d+)/(\d+)", problem or solution))
        self._learn(problem or solution)
        self._given = set(self._known)
        self._learn(solution)

    def _learn(self, text: str) -> None:
        """Names the numbers of `text` that have no name yet; what counts two things is just "the given amount"."""
        found: dict[float, _Name] = {}
        for match in _QUANTITY.finditer(text):
            value = _VALUES[match["word"].lower()] if match["word"] else _number(match["num"])
            if value is None:
                continue
            name = _noun_name(match)
            if name is _PERCENTAGE:
                found.setdefault(round(value / 100, 6), _PERCENTAGE)
            before = found.setdefault(value, name or _GIVEN)
            if name is not None and before != name:
                found[value] = name if before is _GIVEN else _AMBIGUOUS
        self._known = {**found, **{value: name for value, name in self._known.items() if name is not _GIVEN}}

    def add_result(self, value: float, thing: str) -> None:
        """Makes `value` known as the newest result, called `thing`."""
        self._results.append((value, thing))

    def of(self, value: float) -> _Name:
        for back, (result, thing) in enumerate(reversed(self._results)):
            if result == value:
                how = "just found" if back == 0 else "found earlier"
                return _Name(f"{thing} {how}", "the results found so far", value)
        name = self._known.get(value) or self._known.get(round(value, 6)) or _FACTOR
        if name is _GIVEN and value not in self._given:
            name = _FACTOR
        return replace(name, value=value)

    def is_fraction(self, numerator: float, denominator: float) -> bool:
        return (f"{numerator:g}", f"{denominator:g}") in self._fractions


def _noun_name(match: re.Match[str]) -> _Name | None:
    if match["percent"]:
        return _PERCENTAGE
    words = (match["words"] or match["words2"] or "").split()
    if (match["words"] or "").startswith("-"):  # "a 6-foot board" counts no boards
        return None
    per = _PER.search(" ".join(words))
    rate = f" per {per[1]}" if per and per[1] else f" {per[2]}" if per else ""
    if not rate and words[:1] in (["each"], ["apiece"]):
        rate = " per item"
    if match["slash"]:
        rate = f" per {match['slash'][1:]}"
    if _has_number(rate):
        rate = ""
    if match["money"]:
        return _Name(f"the amount of money{rate}", f"the amounts of money{rate}")
    noun = _noun(words)
    if noun is None or _has_number(noun):
        return None
    return _Name(f"the number of {noun}{rate}", f"the numbers of {noun}{rate}")


def _noun(words: Sequence[str]) -> str | None:
    """The words up to the first plural noun, or None where a function word comes first."""
    for index, word in enumerate(words):
        low = word.lower()
        if low in _NP_STOP or low in _NOT_A_NOUN or not low.isalpha() or (low != word and index == 0):
            return None
        if _is_plural(word):
            return " ".join(words[: index + 1]).lower()
    return None


# What is done with the numbers


def _operation(tree: Expression | None, names: _Names) -> str:
    if isinstance(tree, ast.UnaryOp):
        tree = tree.operand
    if not isinstance(tree, ast.BinOp):
        return "work out the next quantity"
    if isinstance(tree.op, (ast.Add, ast.Sub)):
        return _sum(tree, names)
    return _product(tree, names)


def _sum(tree: ast.BinOp, names: _Names) -> str:
    plus, minus = _flat(tree, ast.Add, ast.Sub)
    if not all(_leaf(node) for node in (*plus, *minus)):
        inner = " and ".join(dict.fromkeys(_verb(node) for node in (*plus, *minus) if not _leaf(node)))
        top = "add the parts up" if not minus else "subtract" if len(plus) == 1 else "add and subtract the parts"
        return f"{inner} first, then {top}"
    added, removed = (
        [_GIVEN if name.singular == _FACTOR.singular else name for name in _named(nodes, names)]
        for nodes in (plus, minus)
    )
    if not removed:
        return f"add {_joined(added)}"
    if len(added) == len(removed) == 1 and added[0].singular == removed[0].singular:
        return f"take the difference between {added[0].plural}"
    start = _joined(added) if len(added) == 1 else f"the sum of {_joined(added)}"
    return f"subtract {_joined(removed)} from {start}"


def _product(tree: ast.BinOp, names: _Names) -> str:
    top, bottom = _flat(tree, ast.Mult, ast.Div)
    if not all(_leaf(node) for node in (*top, *bottom)):
        inner = " and ".join(dict.fromkeys(_verb(node) for node in (*top, *bottom) if not _leaf(node)))
        return f"{inner} first, then {'multiply' if len(top) > 1 else 'divide'}"
    above, below = _named(top, names), _named(bottom, names)
    if len(above) == 2 and len(below) == 1:
        for index, name in enumerate(above):
            other = above[1 - index]
            if below[0].value == 100 and name.singular == _PERCENTAGE.singular:
                return f"take the given percentage of {other.singular}"
            if names.is_fraction(name.value or 0, below[0].value or 0):
                return f"take the given fraction of {other.singular}"
    if len(above) == 2 and not below:
        for index, name in enumerate(above):
            if name.singular == _PERCENTAGE.singular:
                return f"take the given percentage of {above[1 - index].singular}"
    if not below:
        return f"multiply {_times(above)}"
    if len(above) == 1 and len(below) == 1 and above[0].singular == below[0].singular:
        return f"take the ratio of {above[0].plural}"
    divisor = _times(below) if len(below) == 1 else f"the product of {_joined(below)}"
    if len(above) == 1:
        return f"divide {above[0].singular} by {divisor}"
    return f"multiply {_times(above)}, and divide by {divisor}"


def _flat(node: Expression, forward: type, inverse: type) -> tuple[list[Expression], list[Expression]]:
    """Terms that are added (multiplied) and terms that are subtracted (divided by)."""
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, (forward, inverse)):
        return [node], []
    left, left_inverse = _flat(node.left, forward, inverse)
    right, right_inverse = _flat(node.right, forward, inverse)
    if isinstance(node.op, inverse):
        right, right_inverse = right_inverse, right
    return [*left, *right], [*left_inverse, *right_inverse]


def _leaf(node: Expression) -> bool:
    return isinstance(node, ast.Constant) or (isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant))


def _verb(node: Expression) -> str:
    verbs = {ast.Add: "add", ast.Sub: "subtract", ast.Mult: "multiply", ast.Div: "divide"}
    if isinstance(node, ast.UnaryOp) and not _leaf(node):
        return _verb(node.operand)
    return verbs[type(node.op)] if isinstance(node, ast.BinOp) else "subtract"


def _named(nodes: Sequence[Expression], names: _Names) -> list[_Name]:
    return [names.of(_constant(node)) for node in nodes]


def _constant(node: Expression) -> float:
    if isinstance(node, ast.UnaryOp):
        return -_constant(node.operand)
    assert isinstance(node, ast.Constant)
    return float(node.value)  # type: ignore[arg-type]


def _joined(names: Sequence[_Name], last: str = "and") -> str:
    """The names as an enumeration; names that repeat are said once, in the plural."""
    count: dict[str, int] = {}
    for name in names:
        count[name.plural] = count.get(name.plural, 0) + 1
    said = list(dict.fromkeys(name.plural if count[name.plural] > 1 else name.singular for name in names))
    return _enumerated(said, last)


def _enumerated(items: Sequence[str], last: str = "and") -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}"


def _times(names: Sequence[_Name]) -> str:
    return _joined(names, "by" if len(names) == 2 else "and")


# What the operation is for


_LEADS = re.compile(
    r"^(?:\s|[-*•]|(?:so|then|thus|hence|therefore|now|next|also|finally|and|but|first|firstly|second|secondly|lastly|"
    r"meanwhile|this means(?: that)?|that means(?: that)?|we know that|accordingly|however|initially|"
    r"as a result|right now|in all|overall|consequently|in conclusion|afterwards?)\b[ ,:]*)+",
    re.IGNORECASE,
)
_TOGETHER = re.compile(r"\b(?:in total|altogether|together|combined|in all)\b,?\s*", re.IGNORECASE)
_CLAUSE = re.compile(
    r",\s+|;\s*|\b(?:which )?means(?: that)?\b|\bmeaning(?: that)?\b|\bso(?: that)?\b|\bthen\b|\bthus\b"
)
_TOTAL_OF = re.compile(
    r"\b(?:for |giving |makes |make |is |are )?(?:an?|the|his|her|their) (?:grand |combined )?total of$"
)
_COPULA = re.compile(
    r"\s*\b(?:is|are|was|were|be|will be|would be|equals|becomes|came to|comes to|is equal to|of)$|:$|=$"
)
_PRONOUN = re.compile(
    r"^(?:this|that|it|which|these|those|that['’]s|it['’]s|i\.e\.?|he|she|they|we|and|or|by|for)\b", re.IGNORECASE
)
_HEADED = re.compile(
    r"^(?:the|an?|his|her|their|its|my|our|your|each|every|all|both|total|[A-Z]?\w+['’]s?)\s", re.IGNORECASE
)
_VERB = _words(
    "is are was were be been has have had cost costs spent spend spends need needs made make makes bought buy "
    "buys paid pay pays take takes took sold sell sells got get gets ate eat eats earn earns used use uses read "
    "reads received receive receives weigh weighs save saves gave give gives saw sees see leave leaves left "
    "caught catch catches pick picks drink drinks drank walk walks won win wins lost lose loses run runs ran "
    "reads write writes wrote drive drives drove work works produce produces contain contains keep keeps kept "
    "bring brings brought bake bakes travel travels score scores collect collects plant plants found find finds "
    "sleep sleeps slept swim swims swam grow grows grew add adds build builds built carry carries charge charges "
    "consume consumes put puts hold holds held want wants watch watches share shares donate donates draw draws "
    "drew feed feeds fed fill fills go goes went lay lays live lives lived play plays ride rides rode send sends "
    "sent sing sings start starts teach teaches throw throws threw wear wears order orders print prints pass "
    "passes practice practices solve solves study studies do does did jump jumps complete completes burn burns "
    "owe owes require requires perform performs type types"
)
_CUT = re.compile(
    r"[.;:!?,()=*+]|\bbecause\b|\bso\b|\bwhich\b|\bsince\b|\band (?=he|she|they|the|his|her|their|then)|\s[-–/x]\s|\$"
)


def _goal(mark: _Mark, *, is_last: bool) -> str | None:
    """What a mark computes, as an object of "find": "how many clips she sold in May", or None."""
    lead, after = _main_clause(mark)
    noun, rest = _object(after)
    candidates = [_question(lead, noun, rest, mark.is_money)]
    if is_last and not rest:
        candidates.append("what the question asks for")
    candidates.append(_quantity(noun, rest, mark.is_money))
    for candidate in candidates:
        phrase = _without_numbers(candidate) if candidate else None
        if phrase and 2 <= len(phrase.split()) <= 26:
            return phrase
    return None


def _thing(mark: _Mark) -> str:
    """A short name for the value of a mark, for the steps that use it."""
    lead, after = _main_clause(mark)
    noun, _ = _object(after)
    phrase = "the amount of money" if mark.is_money else f"the number of {noun.removeprefix('more ')}" if noun else None
    if phrase is None and _HEADED.match(lead) and (copula := _COPULA.search(lead)):
        phrase = _lower_first(lead[: copula.start()])
    phrase = _without_numbers(phrase) if phrase else None
    return phrase if phrase and len(phrase.split()) <= 8 and "," not in phrase else "the result"


def _main_clause(mark: _Mark) -> tuple[str, str]:
    """The words in front of the value and behind it, where "X is 9 because <<...>>9" has them before the mark."""
    lead, after = mark.before.strip(), mark.after
    reason = re.search(r"\b(?:because|since|as)$", lead)
    if reason and mark.value is not None:
        for number in re.finditer(_NUM, lead):
            if _number(number[0]) == mark.value:
                return _clause(lead[: number.start()].rstrip(" $")), lead[number.end() : reason.start()]
        return "", ""
    return _clause(lead), after


def _clause(lead: str) -> str:
    """The last clause, without what leads to it; a leading "In total" moves to its end."""
    together = _TOGETHER.match(_LEADS.sub("", lead))
    parts = [part for part in _CLAUSE.split(lead) if part and part.strip()]
    if not parts:
        return ""
    opening = _LEADS.sub("", lead)
    is_list = re.match(r"(?:and|or)\b", parts[-1].strip()) and not re.match(r"(?:since|if|after|when)\b", opening, re.I)
    clause = _LEADS.sub("", opening if is_list else parts[-1]).strip()
    clause = _TOGETHER.sub("", clause, count=1) if together and _TOGETHER.match(clause) else clause
    asked = re.search(r"\b(?:find|calculate|determine|compute|figure out)\b (?:out )?(.*?):?$", clause)
    if asked:
        return f"find {asked[1]}"
    return f"{clause}|in total" if together else clause


def _object(after: str) -> tuple[str, str]:
    """What is counted and the words that follow: " clips in May." gives ("clips", "in May")."""
    words = _CUT.split(after.strip(), maxsplit=1)[0].split()
    start = 1 if words[:1] == ["more"] and len(words) > 1 else 0
    stop = start
    while stop < len(words) and words[stop].lower() not in _NP_STOP:
        stop += 1
        if _is_plural(words[stop - 1]):
            break
    if stop == start or (not _is_plural(words[stop - 1]) and words[stop - 1].lower() not in _UNITS):
        return "", " ".join(words)
    stop += _extension(words[stop:])
    return " ".join(words[:stop]), " ".join(words[stop:])


def _extension(words: Sequence[str]) -> int:
    """How many words still belong to the counted noun before them: "of sugar", "and nieces", "old"."""
    if words[:1] == ["of"] and words[1:2] and words[1].lower() not in _NP_STOP:
        return next((i for i, word in enumerate(words) if i and word.lower() in _NP_STOP), len(words))
    if words[:1] in (["and"], ["or"]) and len(words) > 1 and _is_plural(words[1]):
        return 2
    return int(bool(words) and words[0].lower() in _DIMENSIONS)


def _is_plural(word: str) -> bool:
    low = word.lower()
    if low in _NOT_A_NOUN or low in _NP_STOP:
        return False
    return low in _IRREGULAR or (low.isalpha() and low.endswith("s") and not low.endswith(("ss", "ous")))


def _question(lead: str, noun: str, rest: str, is_money: bool) -> str | None:
    lead, _, together = lead.partition("|")
    lead = re.sub(r"\s+(?:another|an additional|additional|an extra|extra|an?|the|only|about|x)$", "", lead)
    if lead.startswith("find "):
        return lead.removeprefix("find ").strip()
    tail = " ".join(part for part in (rest, together) if part)
    if total := _TOTAL_OF.search(lead):
        subject = lead[: total.start()].strip(" ,")
        if not _has_verb(subject):
            return None
        return _how_many(subject, noun, f"{tail} in total".strip(), is_money)
    copula = _COPULA.search(lead)
    if copula and _HEADED.match(lead) and not _PRONOUN.match(lead):
        subject = re.sub(r"^[Tt]otal\b", "the total", _lower_first(lead[: copula.start()].strip()))
        if noun.startswith("years old"):
            return f"how old {subject} {copula[0].strip()} {tail}".strip()
        if copula[0].strip() in (":", "=") or len(noun.split()) <= 1 or is_money:
            return None if copula[0].strip() == "of" else f"{subject} {tail}".strip()
    if not _has_verb(lead) or re.match(r"(?:this|that|it|which|these|those|that['’]s)\b", lead, re.IGNORECASE):
        return None
    if noun.startswith("years old"):
        return f"how old {_lower_first(lead)} {tail}".strip()
    return _how_many(lead, noun, tail, is_money)


def _how_many(subject: str, noun: str, rest: str, is_money: bool) -> str:
    amount = "how much money" if is_money else f"how many {noun}" if noun else "how much"
    return f"{amount} {_lower_first(subject)} {rest}".strip()


def _quantity(noun: str, rest: str, is_money: bool) -> str | None:
    if noun and rest.split(" ")[0] in _VERB:
        return f"how many {noun} {rest}"
    if is_money:
        return f"the amount of money {rest}".strip()
    return f"the number of {noun} {rest}".strip() if noun else None


def _has_verb(text: str) -> bool:
    """Whether the text is a clause: a verb after the first word, and no loose end."""
    words = re.findall(r"[A-Za-z'’]+", text.lower())
    if not 1 < len(words) <= 16 or words[-1] in _LOOSE_ENDS:
        return False
    pairs = list(pairwise(words))
    ends_in_s = re.fullmatch(r"[a-z]+[^s'’]s", words[-1]) and pairs[-1][0] not in _ARTICLES
    if ends_in_s or re.search(r"['’](?:ll|ve|d|re)\b", text):
        return True
    return any(
        word in _VERB or (word.endswith("ed") and len(word) > 4 and before not in _ARTICLES) for before, word in pairs
    )


_FRONT_WORDS = _words(
    "the a an he she they it we you i his her their its my our your this that these those there each every all "
    "both if when after before in at on for since with by to from and as per total during together"
)


_ARTICLES = _words("the a an his her its their my our your total of and these those same")
_LOOSE_ENDS = _words("and or because since as if that which of than but so the a an total")


def _lower_first(text: str) -> str:
    first, space, rest = text.strip().partition(" ")
    return f"{first.lower() if first.lower() in _FRONT_WORDS else first}{space}{rest}"


def _without_numbers(phrase: str) -> str | None:
    """The phrase with its numbers paraphrased, or None where that would distort it."""
    if re.search(
        rf"(?<![A-Za-z])(?:{_FACTORS})(?![A-Za-z])|\d\s*[-+*/x=]\s*\d|\btimes (?:as|more)\b|[=*+<>]", phrase, re.I
    ):
        return None
    number = rf"(?<![A-Za-z\d])(?:{_NUM}|{_CARDINALS})(?:[ -](?:{_CARDINALS}))*(?![A-Za-z\d])"
    article = r"\b(the|an?|his|her|their|its|other|first|last|next|these|those|all|my|our|your|another)"
    for pattern, paraphrase in (
        (rf"{number}\s?(?:%|percent\b)", "the given percentage"),
        (rf"[$€£]\s?{number}", "the given price"),
        (rf"{article} {number}[ -](?=[a-z])", r"\1 "),
        (r"(?i:\bone) (?!of\b|that\b)(?=[aeiou]|hour)", "an "),
        (r"(?i:\bone) (?!of\b|that\b)(?=[a-z])", "a "),
        (rf"(?i:{number})[ -](?=[a-z])", "the given "),
    ):
        phrase = re.sub(pattern, paraphrase, phrase)
    phrase = re.sub(r"\b(?:the given|the|a|an) (?=the\b)", "", re.sub(r"\s+", " ", phrase)).strip(" ,.:;-–")
    return None if not phrase or _has_number(phrase) or re.search(r"[$€£%]", phrase) else phrase


# The text


_TOPICS = (
    ("percentages", r"%|\bpercent"),
    ("ratios", r"\bratios?\b"),
    ("fractions", r"\b\d/\d+\b|\b(?:half|third|quarter|fifth)s? (?:of|as)\b"),
    ("money", r"\$|\b(?:dollars?|cents|cost|price)\b"),
    ("ages", r"\byears? old(?:er)?\b|\bage\b"),
    ("distance and speed", r"\b(?:miles?|kilometers?|km|mph)\b"),
    ("time", r"\b(?:minutes?|hours?|days?|weeks?|months?)\b"),
    ("weights", r"\b(?:pounds?|ounces?|kg|kilograms?|grams?)\b"),
)


def _problem_type(text: str, steps: int) -> str:
    topics = [topic for topic, pattern in _TOPICS if re.search(pattern, text, re.IGNORECASE)][:3]
    about = _enumerated(topics or ["quantities"])
    return f"a {'multi-step' if steps > 1 else 'single-step'} arithmetic word problem about {about}."


_KINDS = (
    ("add", "addition"),
    ("subtract", "subtraction"),
    ("take the difference", "subtraction"),
    ("multiply", "multiplication"),
    ("divide", "division"),
    ("take the ratio", "division"),
    ("take the given percentage", "a percentage of an amount"),
    ("take the given fraction", "a fraction of an amount"),
    ("work out", "reasoning about the unknown"),
)


def _overview(steps: Sequence[str]) -> str:
    kinds = list(dict.fromkeys(kind for step in steps for start, kind in _KINDS if step.startswith(start)))
    means = _enumerated(kinds)
    if len(steps) == 1:
        return f"pick out the amounts that matter and reach the answer directly by {means}."
    return f"find the quantities in between, each from amounts already known, by {means}, until the answer is reached."


def _bullets(steps: Sequence[str]) -> Iterator[str]:
    for index, step in enumerate(steps):
        if len(steps) == 1:
            yield f"- {step[0].upper()}{step[1:]}."
        else:
            word = "First" if index == 0 else "Finally" if index == len(steps) - 1 else ("Next", "Then")[index % 2 == 0]
            yield f"- {word}, {step}."
