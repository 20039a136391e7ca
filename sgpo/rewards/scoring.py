"""Results on rollouts: token ids become the text that a reward function sees, beside the problem's answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sgpo.rewards.pool import RewardItem, RewardPool
from sgpo.types import RewardResult, Rollout, TaskData


def score_rollouts(
    rewards: RewardPool, tokenizer: Any, task: TaskData, rollouts: Sequence[Rollout]
) -> list[RewardResult]:
    """The result on each completion's text, in order."""
    return rewards.score([reward_item(tokenizer, task, rollout) for rollout in rollouts])


def reward_item(tokenizer: Any, task: TaskData, rollout: Rollout) -> RewardItem:
    """What the reward function is to judge of a rollout: its text without special tokens."""
    problem = task.problems[rollout.request.problem_index]
    completion = tokenizer.decode(rollout.completion_ids, skip_special_tokens=True)
    return RewardItem(completion=completion, gold=problem.answer, problem=problem.problem)
