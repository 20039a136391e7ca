"""From token ids to what a reward function sees: the text, behind the thinking that its prompt left open.

Training, held-out evaluation, benchmarks and `sgpo strategies analyze` all build their items here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any

from sgpo.rewards.pool import RewardItem, RewardPool
from sgpo.rewards.thinking import is_marker_token, thinking_of
from sgpo.types import Problem, RewardResult, Rollout, TaskData


def score_rollouts(
    rewards: RewardPool, tokenizer: Any, task: TaskData, rollouts: Sequence[Rollout]
) -> list[RewardResult]:
    """The result on each completion's text, in order."""
    return rewards.score([reward_item(tokenizer, task, rollout) for rollout in rollouts])


def reward_item(tokenizer: Any, task: TaskData, rollout: Rollout) -> RewardItem:
    """What the reward function is to judge of a rollout."""
    text = completion_text(tokenizer, rollout.completion_ids)
    return judged_item(task.problems[rollout.request.problem_index], text, task.opening)


def judged_item(problem: Problem, text: str, opening: str) -> RewardItem:
    """A completion as it is judged: behind `opening`, with which its prompt left thinking open ("" where it did not).

    Without it, a truncated thought would read like an answer.
    """
    return RewardItem(completion=opening + text, gold=problem.answer, problem=problem.problem)


def completion_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of a completion without special tokens, except for those that mark thinking."""
    markers = _marker_tokens(tokenizer)
    if not markers.keys().isdisjoint(ids):
        parts = []
        for marker, group in groupby(ids, key=markers.get):
            run = list(group)
            parts.append(tokenizer.decode(run, skip_special_tokens=True) if marker is None else marker * len(run))
        if thinking_of(text := "".join(parts)):  # else what was kept is no part of a marker here
            return text
    return tokenizer.decode(ids, skip_special_tokens=True)


@lru_cache(maxsize=8)
def _marker_tokens(tokenizer: Any) -> dict[int, str]:
    """Special tokens, by id, that decoding without special tokens must not lose."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {i: token.content for i, token in added.items() if token.special and is_marker_token(token.content)}
