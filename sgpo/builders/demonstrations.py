"""Worked solutions as completions: what the chat template already holds is not said twice, and never contradicted."""

from __future__ import annotations

import re

from sgpo.data.problems import listing
from sgpo.rewards.thinking import after_thinking, begins_thinking, open_thinking, thinking_of
from sgpo.types import Problem, SgpoError


def solution_texts(source: str, problems: list[Problem], tail: str) -> list[str]:
    r"""What a model is to write behind prompts that end in `tail` (text), for each problem's solution.

    A template may open thinking for the model (`<think>\n`) or open and close it. A solution that begins with the same
    marker goes on behind it.

    Raises:
        SgpoError: lists the solutions that contradict the template: no end of the thinking that it opens, or thoughts
            where it has closed them.
    """
    texts = [_continued(problem.solution or "", thinking_of(tail)) for problem in problems]
    complaints = [
        f"{problem.place or problem.id}: {complaint}"
        for problem, text in zip(problems, texts, strict=True)
        if (complaint := _contradiction(text, tail))
    ]
    if complaints:
        head = (
            f"{source}: {len(complaints)} of {len(problems)} solutions do not go with the model's chat template; "
            "change them, or set data.template_kwargs (enable_thinking, where the template has it)"
        )
        raise SgpoError(listing(head, complaints))
    return texts


def _continued(solution: str, thinking: str) -> str:
    """The solution without the beginning that it shares with the template's `thinking`, up to white space."""
    if not thinking:
        return solution
    shared = re.match(r"\s*" + r"\s*".join(map(re.escape, thinking.split())), solution)
    if shared is None:
        return solution
    rest = solution[shared.end() :]
    return rest.lstrip() if thinking != thinking.rstrip() else rest


def _contradiction(text: str, tail: str) -> str:
    opening = open_thinking(tail)
    if opening and after_thinking(opening + text) is None:
        return f"the template opens thinking with {opening.strip()!r}, which the solution does not end"
    if thinking_of(tail) and not opening and begins_thinking(text):
        return f"it begins with thoughts, which the template has closed already ({thinking_of(tail).strip()!r})"
    return ""
