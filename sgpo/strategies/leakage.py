r"""Does a strategy give the answer or an intermediate result away? A text check, and Math-Verify for other spellings.

What is compared, in this order:

1. **The final answer**: as a number, as a formula, as text. It leaks even where the problem statement holds the same
   number, unless it is part of a longer formula that the problem states word for word (the 4 in $2\pi x^4$).
2. **Numbers** of the solution that the problem does not state, in digits or in words. A negative number is stated where
   the problem holds it as a negative one; besides that, signs do not count, since a minus is an operation as well.
3. **Formulas** of the solution that the problem does not state and that hold a number besides exponents and indices:
   `r = 2m + 4` is a result, `c^2 = a^2 + b^2` is a theorem. Sides of an equation count by themselves, and so does a
   part of a longer formula; of `b = 3` with a 3 that the problem states, the equation counts.

Equal means the same text or the same number; formulas are also compared by the `equal` that the caller brings
(Math-Verify in a killable process): 2(m + 2) is 2m + 4. A comparison that did not end counts as a leak, "undecided".

What a strategy may contain:

- numbers and formulas that the problem states;
- numbers that only count: list markers in sequence, "step 2", "equation (1)", exponents and indices of letters;
- number words in front of a part of the method ("two equations", "three separate cases"): they describe the procedure.
  In front of anything else ("six days") they are numbers like any other. "one" counts only where it is said to be the
  result, since it is a pronoun as well; ordinals never count, "half" and its like only where they are the answer;
- 0, and the constants 1, 2, 90, 100, 180, 360 where the solution uses them but never obtains them: "divide by 2" is a
  method, but after `x = 2` in the solution it is a leak. Nothing is obtained by setting something to zero;
- numbers from elsewhere, which the solution does not hold.

An answer that is a word or a single letter (a name, a choice "B") is a leak where the problem does not hold it, else
only where it is said to be the result: names and choices of the problem have to be mentioned.

The check errs on the side of rejecting: a clean candidate lost costs one more question, a leak spoils the training.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Literal

from sgpo.strategies import mathtext
from sgpo.strategies.mathtext import BREAK, Expression, Number

Equal = Callable[[Sequence[tuple[str, str]]], Sequence[bool | None]]
"""Whether the two formulas of each pair are equal; None where the comparison did not end."""

MAX_FORMULAS = 30
"""A text with more formulas than this is a computation and no strategy."""
_COMPARED_AT_ONCE = 4  # so that a formula made to take for ever costs few time-outs

_CONSTANTS = frozenset(map(Fraction, (1, 2, 90, 100, 180, 360)))
_OBTAINED = re.compile(
    r"(?:=|\b(?<!there\s)(?:is|are|equals?|equal\s+to|gives?|gets?|yields?|becomes?|obtain|answer|result))[\s¦({:-]*$",
    re.IGNORECASE,
)
_LABEL = re.compile(r"\b(?:steps?|equations?|conditions?|cases?|parts?|eq\.)\s*\(?$", re.IGNORECASE)
_METHOD_PARTS = re.compile(
    r"[ -](?:(?!(?:is|are|was|be|from|of|by|in|as|to|and|or|the|with|for|gives|since|when|into)\b)[a-z-]+ ){0,2}"
    r"(?:equations?|unknowns?|variables?|cases?|conditions?|constraints?|inequalit(?:y|ies)|steps?|stages?|parts?|"
    r"expressions?|formulas?|relations?|sides?|quantit(?:y|ies)|definitions?|facts?)\b",
    re.IGNORECASE,
)
_MARKER = re.compile(
    r"^[ \t]*(?:[-*•][ \t]*)?(?:\*\*)?(?:step[ \t]+)?(\d{1,2})[.):](?=\s)", re.IGNORECASE | re.MULTILINE
)
_FRACTION = re.compile(r"-?\d+\s*/\s*\d+|-?\\frac\s*\{\s*\d+\s*\}\s*\{\s*\d+\s*\}")
_RESULT_WORDS = r"\b(?:answer|result|solution|conclude|therefore|thus|hence|equals?)\b[^.\n]{0,40}?"


@dataclass(frozen=True, slots=True)
class Leak:
    """What gives something away, as it stands in the strategy."""

    kind: Literal["answer", "number", "formula", "undecided", "computation"]
    text: str


class Solution:
    """What must not be given away: the numbers and formulas of one solution and its answer, without the problem's."""

    def __init__(self, problem: str, solution: str, answer: str) -> None:
        self._problem_words = problem
        self._problem = mathtext.plain(problem)
        text = mathtext.plain(solution)
        self._answer_words = _bare(answer)
        answer_text = mathtext.plain(self._answer_words)
        answer_numbers = list(_numbers(answer_text))
        self.answer = _only_number(answer_text, answer_numbers)
        self.answer_sides = () if self.answer else tuple(_formula_sides(answer_text))
        given = {
            value for n in (*_numbers(self._problem), *mathtext.fraction_words(self._problem)) for value in n.values
        }
        self.given = given | ({Fraction(100)} if re.search(r"%|percent", self._problem) else set())
        found = list(_numbers(text))
        self.numbers = {v for n in (*found, *answer_numbers) for v in n.values} - self.given
        self.negatives = _negatives(found) | _negatives(answer_numbers)
        self.negatives -= _negatives(_numbers(self._problem))
        self.obtained = {v for n in found if _OBTAINED.search(text, max(0, n.start - 30), n.start) for v in n.values}
        self.formulas = {
            side
            for e in mathtext.expressions(text)
            for side in e.sides
            if mathtext.carries_numbers(side) and not self.states(side)
        }
        self.results = _results(mathtext.expressions(text)) - _results(mathtext.expressions(self._problem))
        self._joined_formulas = BREAK.join(sorted(self.formulas))

    def holds(self, formula: Expression) -> bool:
        """Whether the solution holds a side of this formula, or says of the same name that it is the same number."""
        sides = [s for s in formula.sides if mathtext.carries_numbers(s) and not self.states(s)]
        within = any(_occurs(side, self._joined_formulas) for side in sides)
        return within or bool(_results([formula]) & self.results)

    def states(self, formula: str) -> bool:
        """Whether the problem holds this formula word for word, and not just as a piece of a longer number or name."""
        return _occurs(formula, self._problem)

    def names_answer(self, text: str) -> str | None:
        """The answer as it stands in `text`, where it is text rather than a number."""
        answer = self._answer_words
        if self.answer is not None or not answer:
            return None
        pattern = r"\s*".join(re.escape(letter) for letter in answer[:200] if not letter.isspace())
        pattern = rf"(?<![\w\\]){pattern}(?!\w)"
        is_word = re.fullmatch(r"[A-Za-z][A-Za-z' -]*", answer)
        if is_word and (len(answer) == 1 or re.search(pattern, self._problem_words, re.IGNORECASE)):
            pattern = _RESULT_WORDS + pattern
        match = re.search(pattern, text, re.IGNORECASE if len(answer) > 1 else 0)
        return match[0] if match else None


def find_leaks(strategy: str, solution: Solution, equal: Equal) -> list[Leak]:
    """Everything in `strategy` that gives `solution` away; empty for a clean strategy."""
    text = mathtext.plain(strategy)
    formulas = list(mathtext.expressions(text))
    if len(formulas) > MAX_FORMULAS:
        return [Leak("computation", f"{len(formulas)} formulas")]
    stated = [e for e in formulas if solution.states(e.text) and not _FRACTION.fullmatch(e.text)]
    leaks = [
        *_number_leaks(text, stated, solution),
        *_formula_leaks([e for e in formulas if e not in stated], solution),
    ]
    if name := solution.names_answer(strategy):
        leaks.append(Leak("answer", name))
    if not leaks:  # the slow question comes last
        leaks = _equal_leaks([e for e in formulas if e not in stated], solution, equal)
    return list(dict.fromkeys(leaks))


def _number_leaks(text: str, stated: Sequence[Expression], solution: Solution) -> Iterator[Leak]:
    skipped = [match.span(1) for match in _list_markers(text)] + [(e.start, e.end) for e in stated]
    for number in (*_numbers(text), *mathtext.fraction_words(text)):
        if any(start <= number.start and number.end <= end for start, end in skipped):
            continue
        if _is_counting(text, number):
            continue
        if solution.answer is not None and _is_answer(number, solution.answer):
            yield Leak("answer", number.text)
        elif number.values & solution.numbers and not _is_harmless(number, text, solution):
            yield Leak("number", number.text)
        elif number.sign < 0 and number.values & solution.negatives:
            yield Leak("number", f"-{number.text}")


def _is_answer(number: Number, answer: Number) -> bool:
    return bool(number.values & answer.values) and (number.sign == answer.sign or 0 in answer.values)


def _is_counting(text: str, number: Number) -> bool:
    """Labels of steps, counts of the parts of a method, and the pronoun "one"."""
    before = (text, max(0, number.start - 30), number.start)
    if len(number.text) == 1 and _LABEL.search(*before):
        return True
    if not number.is_word:
        return False
    if number.text.lower() == "one":
        return not _OBTAINED.search(*before) or text[number.end : number.end + 4].lower().startswith(" of ")
    return bool(_METHOD_PARTS.match(text, number.end))


def _is_harmless(number: Number, text: str, solution: Solution) -> bool:
    if number.values == {Fraction(0)} or number.values & solution.given:
        return True
    if number.is_word and any(value.denominator > 1 for value in number.values):
        return True
    stated_as_result = _OBTAINED.search(text, max(0, number.start - 30), number.start)
    return bool(number.values & _CONSTANTS) and not number.values & solution.obtained and not stated_as_result


def _formula_leaks(formulas: Sequence[Expression], solution: Solution) -> Iterator[Leak]:
    for formula in formulas:
        if any(side in solution.answer_sides and not solution.states(side) for side in formula.sides):
            yield Leak("answer", formula.text)
        elif solution.holds(formula):
            yield Leak("formula", formula.text)


def _equal_leaks(formulas: Sequence[Expression], solution: Solution, equal: Equal) -> list[Leak]:
    """Formulas that differ in writing only. Two with different letters are taken to be different."""
    asked: list[tuple[Leak, tuple[str, str]]] = []
    golds = [("answer", side) for side in solution.answer_sides]
    if solution.answer is not None:
        golds.append(("answer", ("-" if solution.answer.sign < 0 else "") + solution.answer.text))
    golds += [("formula", side) for side in sorted(solution.formulas)]
    golds += [("number", _written(value)) for value in sorted(solution.numbers - _CONSTANTS) if value]
    for formula in formulas:
        for side in formula.sides:
            if mathtext.is_atom(side):
                continue
            names, may_be_result = mathtext.letters(side), mathtext.carries_numbers(side)
            for kind, gold in golds:
                if mathtext.letters(gold) == names and (may_be_result or kind == "answer"):
                    asked.append((Leak(kind, formula.text), (_latex(gold), _latex(side))))  # type: ignore[arg-type]
    asked = list(dict.fromkeys(asked))
    for start in range(0, len(asked), _COMPARED_AT_ONCE):
        some = asked[start : start + _COMPARED_AT_ONCE]
        results = equal([pair for _, pair in some])
        found = [
            leak if same else Leak("undecided", leak.text)
            for (leak, _), same in zip(some, results, strict=True)
            if same is not False
        ]
        if found:
            return found
    return []


def _only_number(answer: str, numbers: Sequence[Number]) -> Number | None:
    """The number that the answer is, with or without a unit; None for formulas, lists and words."""
    bare = answer.strip(" -" + BREAK)
    if whole := [number for number in numbers if number.text == bare]:
        return whole[0]
    alone = len({number.values for number in numbers}) == 1 and not any(_formula_sides(answer))
    return numbers[0] if alone else None


def _formula_sides(answer: str) -> Iterator[str]:
    for expression in mathtext.expressions(answer):
        yield from (side for side in expression.sides if not re.fullmatch(r"-?[\d.,]+|\\?[A-Za-z]+", side))


def _results(formulas: Iterable[Expression]) -> set[frozenset[str]]:
    """What is said to be which number: the pairs of neighbouring sides of which one is a bare number."""
    return {
        frozenset(pair)
        for formula in formulas
        for pair in pairwise(formula.sides)
        if sum(bool(re.fullmatch(r"-?[\d.,]+", side)) for side in pair) == 1
    }


def _negatives(numbers: Iterable[Number]) -> set[Fraction]:
    return {value for number in numbers if number.sign < 0 for value in number.values}


def _occurs(part: str, whole: str) -> bool:
    """Whether `part` stands in `whole`, white space aside, and not just as a piece of a longer number or name."""
    letters = re.sub(r"[\s*]", "", part)
    if not letters or len(letters) > 500:
        return False
    pattern = r"[\s*]*".join(map(re.escape, letters))
    return bool(re.search(rf"(?<![\w\\]){pattern}(?!\w)", whole))


def _numbers(text: str) -> Iterator[Number]:
    yield from mathtext.numerals(text)
    yield from mathtext.number_words(text)


def _list_markers(text: str) -> Iterator[re.Match[str]]:
    """Markers at the start of lines as long as they count up from 1: "98. is the answer" is no marker."""
    expected = 1
    for match in _MARKER.finditer(text):
        if int(match[1]) == expected:
            expected += 1
            yield match


def _bare(answer: str) -> str:
    r"""The answer without math delimiters, \boxed{} and a full stop at the end."""
    answer = re.sub(r"^\s*(?:\$+|\\\(|\\\[)|(?:\$+|\\\)|\\\])\s*$", "", answer.strip()).strip()
    if match := re.fullmatch(r"\\(?:boxed|fbox|text|mathrm|textbf)\s*\{(.*)\}", answer, re.DOTALL):
        return _bare(match[1])
    return answer.strip("() ") if re.fullmatch(r"\(?[A-Za-z]\)?", answer) else answer.rstrip(". ")


def _latex(formula: str) -> str:
    return formula.replace("*", " \\cdot ")


def _written(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
