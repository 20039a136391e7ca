"""Strategies from solutions with calculator marks (GSM8K's <<48/2=24>>), without a model: the same text every time.

A strategy has three parts, as in the paper: problem type, strategy, procedural steps. Each mark becomes a step: its
operation, what it works on, and what it is for. The last two come from the words around the mark; where these give no
readable phrase, the step says less. Nothing that looks like a number survives (see `leaks`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from sgpo.strategies.calculator_goals import goal_of, short_name_of
from sgpo.strategies.calculator_marks import DIGITS, NUMBER_WORD, read_marks
from sgpo.strategies.calculator_names import Names
from sgpo.strategies.calculator_operations import describe_operation, enumerate_words
from sgpo.types import Problem


@dataclass(frozen=True, slots=True)
class StrategyReport:
    """What `attach_strategies` did; `leaked` holds (problem id, leaks) of strategies that were therefore dropped."""

    total: int
    already_present: int
    extracted: int
    without_mark: int
    leaked: tuple[tuple[str, tuple[str, ...]], ...]


def strategy_from_calculator_trace(solution: str, problem_text: str = "") -> str | None:
    """The strategy behind a solution with calculator marks, or None where it has no mark.

    Args:
        solution: worked text with marks such as <<48/2=24>>.
        problem_text: the question, where known: only used to name the numbers that the solution works on.
    """
    marks = list(read_marks(solution))
    if not marks:
        return None
    names = Names(problem_text, solution)
    steps: list[str] = []
    for index, mark in enumerate(marks):
        operation = describe_operation(mark.expression, names)
        goal = goal_of(mark, is_last=index == len(marks) - 1)
        steps.append(f"{operation} to find {goal}" if goal else operation)
        if mark.value is not None:
            names.add_result(mark.value, short_name_of(mark))
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
    found = [match[0] for match in (*DIGITS.finditer(strategy), *NUMBER_WORD.finditer(strategy))]
    answer = problem.answer.strip()
    if answer and re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", strategy, re.IGNORECASE):
        found.append(answer)
    return list(dict.fromkeys(found))


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
    about = enumerate_words(topics or ["quantities"])
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
    means = enumerate_words(kinds)
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
