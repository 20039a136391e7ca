"""A result with the steps that led to it, for people: made of the `Finding` that the result itself rests on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sgpo.rewards.answers import after_thinking, condense, last_boxed, normalised
from sgpo.types import RewardResult

_MAX_CHARS = 200  # of a formula that is shown


@dataclass(frozen=True, slots=True)
class Explanation:
    """The result, and what was found, read and decided: one step a line."""

    result: RewardResult
    steps: tuple[str, ...]


def explain(
    spec: str,
    reward: Callable[[str, str, str], RewardResult],
    completion: str,
    gold: str,
    problem: str,
    *,
    require_box: bool,
) -> Explanation:
    """The result of `reward`, which `spec` names, and its steps; may hang where the reward does."""
    if spec == "math_verify":
        return _of_math_verify(completion, gold, require_box=require_box)
    result = reward(completion, gold, problem)
    if spec != "exact":
        return Explanation(result, (f"{spec} returned {result.reward:g}",))
    answer = condense(completion)
    compared = (f"compared as text: {normalised(gold)} with {normalised(answer)}",) if answer else ()
    return Explanation(result, (_found(completion, answer), *compared))


def _of_math_verify(completion: str, gold: str, *, require_box: bool) -> Explanation:
    from sgpo.rewards import values, verifier  # "exact" can do without sympy

    finding = verifier.judge(completion, gold, require_box=require_box)
    steps = [_found(completion, condense(completion, require_box))]
    for name, text in (("gold answer", finding.gold), ("answer", finding.answer)):
        if text:
            form = f"; to sympy: {_form(next(iter(values.parsed(text)), text))}" if finding.by_value else ""
            steps.append(f"{name}, tidied: {_short(text)}{form}")
    steps.append(f"decided by: {finding.rule}")
    return Explanation(RewardResult(float(finding.equal), finding.status), tuple(steps))


def _found(completion: str, answer: str) -> str:
    text = after_thinking(completion)
    if text is None:
        return "the thinking never ends, so there is no answer"
    if not answer:
        return "no box after the thinking, so there is no answer"
    box = last_boxed(text)
    return (
        f"no box; the text after the thinking is searched: {_short(text)}"
        if box is None
        else f"in the last box: {_short(box)}"
    )


def _form(value: object) -> str:
    try:
        return _short(str(value))
    except ValueError:
        return "a number too long to print"  # Python's limit for the digits of an integer


def _short(text: str) -> str:
    return text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]}... ({len(text)} characters)"
