"""What every method gives the trainer: for each problem of an optimizer step its training sequences and its guidance.

A method is which rollouts, which advantage, which weight per token and which reduction; the loss of a micro-batch then
only sums weight x row loss (`sgpo.algorithm.loss`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from sgpo.types import WORDS, Rollout, ScoredGroup, SgpoError, TrainSequence

Context = tuple[tuple[int, ...], tuple[int, ...]]  # prompt ids, completion ids
Scorer = Callable[[list[Context]], list[list[float]]]  # log-probs of each completion's tokens after its prompt


@dataclass(frozen=True, slots=True)
class Guidance:
    """What was decided for one problem.

    `teacher_completions` holds o+ (or all correct guided rollouts); it is empty where none is correct or alpha is 0.
    `selection_score` is what o+ was chosen by.
    """

    alpha: float = 0.0
    alpha_uncapped: float = 0.0
    teacher_completions: tuple[Rollout, ...] = ()
    selection_score: float | None = None


@dataclass(frozen=True, slots=True)
class ProblemStep:
    """One problem in an optimizer step: its rollouts, what is learnt of them, and what was decided."""

    group: ScoredGroup
    sequences: list[TrainSequence]
    guidance: Guidance = Guidance()


def all_sequences(problems: Sequence[ProblemStep]) -> list[TrainSequence]:
    """Problem by problem."""
    return [sequence for problem in problems for sequence in problem.sequences]


def check_completions(groups: Sequence[ScoredGroup]) -> None:
    """Raises SgpoError where a rollout has no token, for a weight per token divides by their number."""
    for group in groups:
        for rollout in (*group.auto, *group.guided):
            if not rollout.completion_ids:
                where = f"sample {rollout.request.sample_index} {WORDS[rollout.request.kind]}"
                raise SgpoError(
                    f"the rollout engine gave problem {group.problem.id!r} a completion without a token ({where}); the "
                    "shortest is an EOS: mend the engine"
                )


class Method(Protocol):
    """What each of this rank's groups gives one optimizer step, in their order."""

    def __call__(
        self,
        groups: Sequence[ScoredGroup],
        *,
        problems: int,
        score: Scorer,
        total: Callable[[float], float],
    ) -> list[ProblemStep]:
        """
        Args:
            problems: problems of the optimizer step over all ranks, the P of Eq. 7.
            score: log-probs under given prompts; collective, so every rank calls it equally often.
            total: sum of a number over all ranks; collective likewise.
        """
        ...
