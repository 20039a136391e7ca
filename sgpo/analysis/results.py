"""From samples to numbers: the transfer table and matrix, whom guidance helps, clusters, bands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sgpo.analysis import effects, similarity
from sgpo.analysis.design import Design, Study
from sgpo.analysis.samples import Row
from sgpo.analysis.settings import AnalyzeSection
from sgpo.analysis.transfer import ARMS, FOREIGN, MATRIX, Draw
from sgpo.strategies.leakage import Solution, find_leaks
from sgpo.types import Problem

CONTRASTS = (
    ("own", "none"),
    ("same_type", "none"),
    ("other_type", "none"),
    ("placeholder", "none"),
    ("own", "same_type"),
    ("own", "placeholder"),
    ("same_type", "other_type"),
)


class Results:
    """All that one analysis says, from its samples.

    Args:
        rows: the judged row of every draw of the design.
    """

    def __init__(self, settings: AnalyzeSection, study: Study, design: Design, rows: Mapping[Draw, Row]) -> None:
        self._settings, self._study, self._design, self._rows = settings, study, design, rows
        self.outcomes: dict[str, dict[int, list[bool]]] = {arm: {} for arm in (*ARMS, MATRIX)}
        for draw in design.draws:
            self.outcomes[draw.arm].setdefault(draw.problem, []).append(self._correct(draw))
        self._rates = {arm: effects.rates(found) for arm, found in self.outcomes.items()}
        self._leaking = [_leaks(problem) for problem in study.problems]

    def numbers(self) -> dict[str, Any]:
        """Sections of analysis.json, of plain values and the records of `effects`."""
        arms = [arm for arm in ARMS if self.outcomes[arm]]
        return {
            "arms": [self._arm(arm) for arm in ARMS],
            "contrasts": [
                effects.difference(first, second, self.outcomes)
                for first, second in CONTRASTS
                if first in arms and second in arms
            ],
            "help_and_harm": [
                effects.help_and_harm(arm, self.outcomes[arm], self.outcomes["none"], self._settings.level)
                for arm in arms[1:]
            ],
            "types": self._types(),
            "matrix": self._matrix(),
            "placeholder_excess_tokens": self._excess(),
            "clusters": self._clusters(),
            "similarity_bands": self._similarity_bands(),
            "quality": self._quality(),
        }

    def problem_rows(self) -> list[Row]:
        """One row per problem: what it is, and its pass rate in each arm."""
        study = self._study
        return [
            {
                "id": problem.id,
                "type": study.types[i],
                "cluster": study.clusters[i] + 1,
                "guidance_tokens": study.lengths[i],
                "score": self._score(i),
                "leaks": self._leaking[i],
                "placeholder_excess_tokens": self._design.placeholder_excess[i],
                **{f"rate_{arm}": self._rates[arm].get(i) for arm in ARMS},
            }
            for i, problem in enumerate(study.problems)
        ]

    def _correct(self, draw: Draw) -> bool:
        return self._rows[draw]["correct"]

    def _arm(self, arm: str) -> Row:
        draws = [draw for draw in self._design.draws if draw.arm == arm]
        rows = [self._rows[draw] for draw in draws]
        found = {
            "arm": arm,
            "rate": effects.estimate(list(self._rates[arm].values())),
            "excluded_problems": len(self._study.problems) - len(self._rates[arm]),
            "samples": len(rows),
        }
        if not rows:
            return found
        texts = self._study.texts
        same = sum(draw.source is not None and texts[draw.source] == texts[draw.problem] for draw in draws)
        return {
            **found,
            "prompt_tokens": _mean([row["prompt_tokens"] for row in rows]),
            "tokens": _mean([row["tokens"] for row in rows]),
            "truncated": _mean([row["truncated"] for row in rows]),
            "no_answer": _mean([row["status"] == "no_answer" for row in rows]),
            "failed_verdicts": sum(row["status"] in ("timeout", "error", "too_long") for row in rows),
            "identical_guidance": same / len(rows) if arm in FOREIGN else None,
        }

    def _types(self) -> list[Row]:
        names = sorted({kind for kind in self._study.types if kind is not None})
        members = {name: [i for i, kind in enumerate(self._study.types) if kind == name] for name in names}
        return [
            {"type": name, "problems": len(ids)}
            | {arm: effects.estimate([self._rates[arm][i] for i in ids if i in self._rates[arm]]) for arm in ARMS}
            for name, ids in members.items()
        ]

    def _matrix(self) -> list[Row]:
        cells = []
        for (source, target), draws in self._design.cells.items():
            found: dict[int, list[bool]] = {}
            for draw in draws:
                found.setdefault(draw.problem, []).append(self._correct(draw))
            rate = effects.estimate(list(effects.rates(found).values()))
            cells.append({"strategy_type": source, "problem_type": target, "draws": len(draws), "rate": rate})
        return cells

    def _excess(self) -> Row:
        excess = self._design.placeholder_excess
        return {"exact": excess.count(0), "least": min(excess), "most": max(excess)}

    def _clusters(self) -> Row:
        study, similar = self._study, self._study.alike
        count = len(study.problems)
        typed = [i for i, kind in enumerate(study.types) if kind is not None]
        others = similar.clone().fill_diagonal_(-1.0)
        groups: dict[int, list[int]] = {}
        for i, label in enumerate(study.clusters):
            groups.setdefault(label, []).append(i)
        return {
            "method": self._settings.similarity,
            "different_texts": len(set(study.texts)),
            "mean_similarity": float((similar.sum() - count) / (count * (count - 1))),
            "with_near_duplicate": int((others.amax(1) >= self._settings.duplicate_similarity).sum()),
            "silhouette": study.silhouette,
            "adjusted_rand_index": similarity.adjusted_rand_index(
                [study.clusters[i] for i in typed], [study.types[i] for i in typed]
            ),
            "groups": [self._cluster(label, members) for label, members in groups.items()],
        }

    def _cluster(self, label: int, members: Sequence[int]) -> Row:
        kinds = [kind for i in members if (kind := self._study.types[i]) is not None]
        top = max(sorted(set(kinds)), key=kinds.count, default=None)
        middle = similarity.medoid(self._study.alike, members)
        return {
            "cluster": label + 1,
            "problems": len(members),
            "most_frequent_type": top,
            "its_share": kinds.count(top) / len(kinds) if top is not None else None,
            "example_id": self._study.problems[middle].id,
            "example": self._study.texts[middle],
        }

    def _similarity_bands(self) -> list[effects.Band]:
        """Foreign strategies by their similarity to the own one, against the rate above the plain prompt's."""
        foreign = [d for d in self._design.draws if d.arm in FOREIGN and d.source is not None]
        values = [float(self._study.alike[d.problem, d.source or 0]) for d in foreign]
        gains = [self._correct(d) - self._rates["none"][d.problem] for d in foreign]
        return effects.bands(values, gains, [d.problem for d in foreign], self._settings.bands)

    def _quality(self) -> Row:
        """Gain of the own strategy over none, by the score of the strategy, its length, and whether it leaks."""
        gains = {i: self._rates["own"][i] - self._rates["none"][i] for i in range(len(self._study.problems))}

        def banded(values: Mapping[int, float | None]) -> list[effects.Band]:
            known = {i: value for i, value in values.items() if value is not None}
            return effects.bands(list(known.values()), [gains[i] for i in known], list(known), self._settings.bands)

        return {
            "by_score": banded({i: self._score(i) for i in gains}),
            "by_length": banded({i: float(self._study.lengths[i]) for i in gains}),
            "by_leak": {
                name: effects.estimate([gains[i] for i in gains if self._leaking[i] is leaks])
                for name, leaks in (("leaks", True), ("clean", False))
            },
        }

    def _score(self, i: int) -> float | None:
        value = self._study.problems[i].extra.get(self._settings.score_key)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _leaks(problem: Problem) -> bool | None:
    """By text and numbers only, against the answer and, where there is one, the solution; None for chat turns."""
    if not problem.strategy:
        return None
    solution = Solution(problem.problem, problem.solution or "", problem.answer)
    return bool(find_leaks(problem.strategy, solution, lambda pairs: [False] * len(pairs)))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
