"""Which problems of an evaluation set are in the training data: word for word, up to notation, or for the most part."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from sgpo.data.problems import normalised_text
from sgpo.types import Problem

NGRAM = 13

_SPACING = re.compile(r"\\[,;:!> ]|~|\\(?:quad|qquad|displaystyle|limits|left|right|big|Big)(?![A-Za-z])|[$\s]")
_FRACTION = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True, slots=True)
class Match:
    """An evaluation problem and the training problem it is found in.

    how: "exact", the same text; "normalised", the same up to case, white space and LaTeX spacing; "overlap", `share` of
    its word 13-grams are in that one training problem.
    """

    id: str
    train_id: str
    how: Literal["exact", "normalised", "overlap"]
    share: float


def find_contamination(
    train: Sequence[Problem], evaluation: Sequence[Problem], *, min_overlap: float = 0.5
) -> list[Match]:
    """The evaluation problems that are in the training data, each with the training problem that is closest to it.

    Args:
        min_overlap: smallest share of an evaluation problem's 13-grams that one training problem must hold. A single
            common 13-gram says little: "relatively prime positive integers, find m + n" alone makes one. A text of
            fewer than 13 words has no 13-gram and is compared as a whole only.
    """
    exact = {problem.problem: problem.id for problem in reversed(train)}
    bare = {without_spacing(problem.problem): problem.id for problem in reversed(train)}
    wanted = {gram for problem in evaluation for gram in _grams(problem.problem)}
    holders: dict[int, list[int]] = defaultdict(list)  # only grams of the evaluation: memory follows the small side
    for index, problem in enumerate(train):
        for gram in _grams(problem.problem) & wanted:
            holders[gram].append(index)
    found = []
    for problem in evaluation:
        if problem.problem in exact:
            found.append(Match(problem.id, exact[problem.problem], "exact", 1.0))
        elif (key := without_spacing(problem.problem)) in bare:
            found.append(Match(problem.id, bare[key], "normalised", 1.0))
        elif (closest := _closest(_grams(problem.problem), holders)) and closest[1] >= min_overlap:
            found.append(Match(problem.id, train[closest[0]].id, "overlap", closest[1]))
    return found


def without_spacing(text: str) -> str:
    r"""The text without case, white space, `$`, LaTeX spacing and the size of brackets and fractions."""
    return _SPACING.sub("", _FRACTION.sub(r"\\frac", normalised_text(text))).rstrip(".?!")


def _grams(text: str) -> set[int]:
    """Hashes of all runs of 13 words or numbers; punctuation and LaTeX marks are not counted."""
    words = _WORD.findall(normalised_text(text))
    return {hash(tuple(words[i : i + NGRAM])) for i in range(len(words) - NGRAM + 1)}


def _closest(grams: Iterable[int], holders: dict[int, list[int]]) -> tuple[int, float] | None:
    """The training problem that holds most of `grams`, and their share."""
    grams = list(grams)
    counts: dict[int, int] = defaultdict(int)
    for gram in grams:
        for index in holders.get(gram, ()):
            counts[index] += 1
    if not counts:
        return None
    best = max(counts, key=lambda index: (counts[index], -index))
    return best, counts[best] / len(grams)
