"""The step's problems, their rollouts in both contexts, and the results on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from sgpo.algorithm.dapo import is_informative
from sgpo.data.epochs import problems_of_step
from sgpo.rewards.scoring import reward_item, score_rollouts
from sgpo.train.session import Progress, Session, is_last
from sgpo.train.step_metrics import Clock
from sgpo.types import Kind, RewardResult, Rollout, RolloutRequest, SamplingParams, ScoredGroup, SgpoError, TaskData
from sgpo.utils import distributed
from sgpo.utils.seeds import seed_of


def sample_and_score(
    s: Session, step: int, progress: Progress, clock: Clock
) -> tuple[list[ScoredGroup], list[ScoredGroup]]:
    """All groups that this rank sampled in the step, and those to learn from: the same, unless groups are refilled.

    Refilling (DAPO's dynamic sampling) drops what all or no rollouts solve, and samples on until the step is full.
    """
    sampled = _round(s, step, progress, clock)
    wanted, further = len(sampled), s.config.algorithm.refill_rounds
    if not further:
        return sampled, sampled
    while True:
        kept = [group for group in sampled if is_informative(group)][:wanted]
        if not further or all(distributed.gather(len(kept) == wanted)) or is_last(s, step, progress):
            return sampled, kept
        further -= 1
        sampled += _round(s, step, progress, clock)


def _round(s: Session, step: int, progress: Progress, clock: Clock) -> list[ScoredGroup]:
    """Both groups of this rank's problems of the next batch, with their results."""
    indices, requests, sampling = _requests(s, progress.rounds)
    if s.ahead:
        sampled = s.ahead.copy()
        s.ahead.clear()
    else:
        s.display.stage("rollout", len(requests))
        sampled = s.sampler.generate(requests, sampling, s.display.advance, _score_early(s))
    check_version(sampled, step, behind=int(s.config.rollout.overlap))
    clock.stage("rollout")
    s.display.stage("score", len(sampled))
    groups = scored_groups(s.task, indices, sampled, partial(score_rollouts, s.rewards, s.tokenizer, s.task))
    clock.stage("score")
    progress.rounds += 1
    for count, tokens in distributed.gather((len(sampled), sum(len(rollout.completion_ids) for rollout in sampled))):
        progress.rollouts += count
        progress.rollout_tokens += tokens
    return groups


def begin_next(s: Session, step: int) -> None:
    """Starts on the rollouts of the next step, by the weights that this step is about to change."""
    _, requests, sampling = _requests(s, step)
    s.sampler.begin(requests, sampling, _score_early(s))


def collect_next(s: Session, version: int) -> None:
    """Waits for the rollouts that `begin_next` started."""
    s.display.stage("rollout")
    s.ahead.extend(s.sampler.collect(version))


def _requests(s: Session, number: int) -> tuple[list[int], list[RolloutRequest], SamplingParams]:
    """Those of batch `number` of the run."""
    rollout, seed = s.config.rollout, s.config.run.seed
    indices = problems_of_step(len(s.task.problems), per_step=rollout.problems_per_step, seed=seed, step=number)
    requests = build_requests(s.task, indices, n_auto=rollout.n_auto, n_guided=rollout.n_guided, seed=seed, step=number)
    return indices, requests, SamplingParams(rollout.temperature, rollout.top_p, rollout.max_new_tokens)


def _score_early(s: Session) -> Callable[[Rollout], None]:
    """Has each completion judged while others are still being sampled."""
    return lambda rollout: s.rewards.begin(reward_item(s.tokenizer, s.task, rollout))


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
    score: Callable[[Sequence[Rollout]], Sequence[RewardResult]],
) -> list[ScoredGroup]:
    """Sorts rollouts and their results into one group per problem."""
    cells: dict[tuple[int, Kind], list[tuple[Rollout, RewardResult]]] = {}
    for rollout, result in zip(rollouts, score(rollouts), strict=True):
        cells.setdefault((rollout.request.problem_index, rollout.request.kind), []).append((rollout, result))

    def group(index: int) -> ScoredGroup:
        auto, guided = cells.get((index, "auto"), []), cells.get((index, "guided"), [])
        return ScoredGroup(
            problem=task.problems[index],
            prompts=task.prompts[index],
            auto=tuple(rollout for rollout, _ in auto),
            guided=tuple(rollout for rollout, _ in guided),
            auto_results=tuple(result for _, result in auto),
            guided_results=tuple(result for _, result in guided),
            demo_ids=task.demo_ids[index] if task.demo_ids else (),
        )

    return [group(index) for index in indices]
