"""From responses to one strategy per problem: ask for candidates, check them, score them, keep the best.

Works in rounds over all problems, so that a backend always has many questions at once: ask what is missing, read the
answers, ask again what was malformed or leaked, up to `max_asks` times; then the same for the scores. Every question
follows from the input, the settings and earlier answers alone, so a run that starts anew with a full cache comes to
the same result without asking.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sgpo.strategies.asking import Answer, Asker, Failure, Question, Sampling
from sgpo.strategies.leakage import Equal, Leak, Solution, find_leaks
from sgpo.strategies.questions import Malformed, Messages, Templates, parse_scores, parse_strategy
from sgpo.types import Problem
from sgpo.utils.seeds import seed_of

_LISTED_LEAKS = 6


@dataclass(frozen=True, slots=True)
class Settings:
    """Candidates per problem, how often an unusable answer is asked for again, and how answers are sampled."""

    candidates: int
    max_asks: int
    sampling: Sampling
    scoring: Sampling
    seed: int


@dataclass(frozen=True, slots=True)
class Source:
    """A problem with the solution that is shown, and all of the response, which must not leak."""

    problem: Problem
    shown: str
    response: str


@dataclass
class Candidate:
    """One strategy of a problem on its way; `rejected` is why it is out."""

    source: int
    index: int
    strategy: str | None = None
    scores: dict[str, float] | None = None
    rejected: str = ""

    @property
    def score(self) -> float:
        """The mean of its scores."""
        assert self.scores is not None
        return sum(self.scores.values()) / len(self.scores)


@dataclass
class Tally:
    """Answers that could not be used, by what was wrong; those of earlier runs count like those of this one."""

    malformed: Counter[str] = field(default_factory=Counter)
    leaks: Counter[str] = field(default_factory=Counter)
    leaking_answers: int = 0
    undecided_comparisons: int = 0
    leak_examples: list[dict[str, str]] = field(default_factory=list)


OnRound = Callable[[str, int], None]


class Extraction:
    """One run over all sources.

    Args:
        after_thinking: the part of a text that follows the thinking; None where the thinking never ends.
        equal: compares formulas, see `leakage`.
        on_round: called with a round's name and its number of questions before they are asked.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        settings: Settings,
        templates: Templates,
        asker: Asker,
        *,
        after_thinking: Callable[[str], str | None],
        equal: Equal,
        on_round: OnRound = lambda name, count: None,
    ) -> None:
        self._sources = sources
        self._settings = settings
        self._templates = templates
        self._asker = asker
        self._after_thinking = after_thinking
        self._equal = equal
        self._on_round = on_round
        self._solution: tuple[int, Solution] | None = None
        self.tally = Tally()

    def run(self) -> list[list[Candidate]]:
        """The candidates of every source, in order."""
        groups = [[Candidate(i, k) for k in range(self._settings.candidates)] for i in range(len(self._sources))]
        candidates = [candidate for group in groups for candidate in group]
        self._rounds("candidates", candidates, self._extraction, self._settings.sampling, self._take_strategy)
        clean = [candidate for candidate in candidates if candidate.strategy is not None]
        self._rounds("scores", clean, self._scoring, self._settings.scoring, self._take_scores)
        return groups

    def _rounds(
        self,
        name: str,
        candidates: Sequence[Candidate],
        messages: Callable[[Candidate, str], Messages],
        sampling: Sampling,
        take: Callable[[Candidate, str], str],
    ) -> None:
        """Asks until `take`, which says what is wrong with an answer, is content or the asks are used up."""
        open_reasons = {(c.source, c.index): "" for c in candidates}
        for attempt in range(self._settings.max_asks):
            waiting = [c for c in candidates if (c.source, c.index) in open_reasons]
            if not waiting:
                return
            questions = [
                Question(
                    messages(c, open_reasons[c.source, c.index]),
                    sampling,
                    c.index,
                    attempt,
                    seed_of(self._settings.seed, name, c.index, attempt) % 2**31,
                )
                for c in waiting
            ]
            self._on_round(name if attempt == 0 else f"{name}, ask {attempt + 1}", len(questions))
            for candidate, result in zip(waiting, self._asker.ask(questions), strict=True):
                key = (candidate.source, candidate.index)
                if isinstance(result, Failure):
                    candidate.rejected = result.reason
                    del open_reasons[key]
                elif wrong := self._read(candidate, result, take):
                    open_reasons[key] = wrong
                else:
                    del open_reasons[key]
        for candidate in candidates:
            if wrong := open_reasons.get((candidate.source, candidate.index)):
                candidate.rejected = f"{name}: {wrong} (asked {self._settings.max_asks} times)"

    def _read(self, candidate: Candidate, answer: Answer, take: Callable[[Candidate, str], str]) -> str:
        try:
            if answer.finish == "length":
                raise Malformed("it was cut off at the longest length allowed; be brief")
            text = self._after_thinking(answer.text)
            if text is None:
                raise Malformed("its thinking part never ended")
            return take(candidate, text)
        except Malformed as error:
            self.tally.malformed[str(error)] += 1
            return str(error)

    def _extraction(self, candidate: Candidate, reason: str) -> Messages:
        source = self._sources[candidate.source]
        return self._templates.extraction(source.problem.problem, source.shown, reason)

    def _scoring(self, candidate: Candidate, reason: str) -> Messages:
        source = self._sources[candidate.source]
        assert candidate.strategy is not None
        return self._templates.scoring(source.problem.problem, source.shown, candidate.strategy, reason)

    def _take_strategy(self, candidate: Candidate, text: str) -> str:
        strategy = parse_strategy(text)
        if leaks := self.leaks(candidate.source, strategy):
            return f"it gave results away: {', '.join(leak.text for leak in leaks[:_LISTED_LEAKS])}"
        candidate.strategy = strategy
        return ""

    def _take_scores(self, candidate: Candidate, text: str) -> str:
        candidate.scores = parse_scores(text)
        return ""

    def leaks(self, index: int, strategy: str) -> list[Leak]:
        """What `strategy` gives away of source `index`, counted in the tally."""
        source = self._sources[index]
        if self._solution is None or self._solution[0] != index:  # the candidates of a source come one after the other
            problem = source.problem
            self._solution = index, Solution(problem.problem, source.response, problem.answer)
        leaks = find_leaks(strategy, self._solution[1], self._equal)
        if leaks:
            self.tally.leaking_answers += 1
            self.tally.leaks.update({leak.kind for leak in leaks})
            self.tally.undecided_comparisons += sum(leak.kind == "undecided" for leak in leaks)
            if len(self.tally.leak_examples) < 50:
                example = {"id": source.problem.id, "kind": leaks[0].kind, "text": leaks[0].text}
                self.tally.leak_examples.append(example)
        return leaks


def best(candidates: Sequence[Candidate]) -> Candidate | None:
    """The scored candidate with the highest mean score, the first of equals; None where none is scored."""
    return max((c for c in candidates if c.scores is not None), key=lambda c: c.score, default=None)
