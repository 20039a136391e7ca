"""The step's problems, their rollouts in both contexts, and the verdicts on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sgpo.types import Kind, Rollout, RolloutRequest, ScoredGroup, SgpoError, TaskData, Verdict
from sgpo.utils.seeds import seed_of


def build_requests(
    task: TaskData, indices: Sequence[int], *, n_auto: int, n_guided: int, seed: int, step: int
) -> list[RolloutRequest]:
    """n_auto completions of every plain prompt and n_guided of every guided one, each with a seed of its own."""

    def requests(index: int, kind: Kind, prompt: tuple[int, ...], count: int) -> list[RolloutRequest]:
        problem_id = task.problems[index].id
        return [
            RolloutRequest(index, kind, k, prompt, seed_of(seed, "rollout", step, problem_id, kind, k))
            for k in range(count)
        ]

    built = []
    for index in indices:
        prompts = task.prompts[index]
        built += requests(index, "auto", prompts.plain, n_auto)
        if n_guided and prompts.guided is not None:
            built += requests(index, "guided", prompts.guided, n_guided)
    return built


def check_version(rollouts: Sequence[Rollout], expected: int, *, behind: int = 0) -> None:
    """Raises SgpoError if a rollout was sampled from other weights than those about to be trained.

    `behind` allows those of so many steps earlier.
    """
    if stale := {rollout.policy_version for rollout in rollouts} - set(range(expected - behind, expected + 1)):
        raise SgpoError(
            f"the rollout engine sampled with the weights of step {min(stale)} where step {expected} was expected; "
            "the weight sync failed: resume from the last checkpoint"
        )


def scored_groups(
    task: TaskData,
    indices: Sequence[int],
    rollouts: Sequence[Rollout],
    score: Callable[[Sequence[Rollout]], Sequence[Verdict]],
) -> list[ScoredGroup]:
    """Sorts rollouts and their verdicts into one group per problem."""
    cells: dict[tuple[int, Kind], list[tuple[Rollout, Verdict]]] = {}
    for rollout, verdict in zip(rollouts, score(rollouts), strict=True):
        cells.setdefault((rollout.request.problem_index, rollout.request.kind), []).append((rollout, verdict))

    def group(index: int) -> ScoredGroup:
        auto, guided = cells.get((index, "auto"), []), cells.get((index, "guided"), [])
        return ScoredGroup(
            problem=task.problems[index],
            prompts=task.prompts[index],
            auto=tuple(rollout for rollout, _ in auto),
            guided=tuple(rollout for rollout, _ in guided),
            auto_verdicts=tuple(verdict for _, verdict in auto),
            guided_verdicts=tuple(verdict for _, verdict in guided),
            demo_ids=task.demo_ids[index] if task.demo_ids else (),
        )

    return [group(index) for index in indices]
