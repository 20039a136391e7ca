"""avg@k of a policy on held-out problems, with a bootstrap interval over problems."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sgpo.rewards.pool import RewardPool
from sgpo.rewards.scoring import completion_text, reward_item, score_rollouts
from sgpo.types import Kind, RolloutRequest, Sampler, SamplingParams, TaskData
from sgpo.utils import distributed
from sgpo.utils.seeds import seed_of
from sgpo.utils.statistics import bootstrap_interval


@dataclass(frozen=True, slots=True)
class EvalResult:
    """`accuracy` is avg@k; `low` and `high` bound its 95 % bootstrap interval. One row of `samples` per completion."""

    accuracy: float
    low: float
    high: float
    k: int
    length: float
    truncated: float
    samples: list[dict[str, Any]]

    def metrics(self) -> dict[str, float]:
        """The numbers that a run logs."""
        return {
            "accuracy": self.accuracy,
            "accuracy_low": self.low,
            "accuracy_high": self.high,
            "k": self.k,
            "length": self.length,
            "truncated": self.truncated,
        }


def evaluate(
    rollouts: Sampler,
    rewards: RewardPool,
    tokenizer: Any,
    task: TaskData,
    sampling: SamplingParams,
    *,
    samples: int,
    seed: int,
    kind: Kind = "auto",
    on_progress: Callable[[int, int], None] | None = None,
) -> EvalResult:
    """Answers every problem `samples` times and verifies the answers. Problems are shared out over the ranks.

    kind "guided" puts the guidance into the prompt and leaves out problems that have none. The same `seed` gives the
    same completions for the same weights, so that two evaluations of one run are paired.
    """
    mine = range(distributed.rank(), len(task.problems), distributed.world_size())
    requests = []
    for index in mine:
        prompt = task.prompts[index].plain if kind == "auto" else task.prompts[index].guided
        if prompt is not None:
            requests += [
                RolloutRequest(index, kind, k, prompt, seed_of(seed, "eval", kind, task.problems[index].id, k))
                for k in range(samples)
            ]
    sampled = rollouts.generate(
        requests, sampling, on_progress, lambda rollout: rewards.begin(reward_item(tokenizer, task, rollout))
    )
    results = score_rollouts(rewards, tokenizer, task, sampled)
    rows = [
        {
            "problem_id": task.problems[rollout.request.problem_index].id,
            "sample": rollout.request.sample_index,
            "kind": kind,
            "reward": result.reward,
            "correct": result.is_correct,
            "status": result.status,
            "tokens": len(rollout.completion_ids),
            "truncated": rollout.truncated,
            "text": completion_text(tokenizer, rollout.completion_ids),
        }
        for rollout, result in zip(sampled, results, strict=True)
    ]
    return _summary([row for part in distributed.gather(rows) for row in part], samples, seed)


def _summary(rows: list[dict[str, Any]], k: int, seed: int) -> EvalResult:
    if not rows:
        return EvalResult(float("nan"), float("nan"), float("nan"), k, 0.0, 0.0, [])
    rows.sort(key=lambda row: (row["problem_id"], row["sample"]))
    per_problem: dict[str, list[float]] = {}
    for row in rows:
        per_problem.setdefault(row["problem_id"], []).append(float(row["correct"]))
    means = [sum(values) / len(values) for values in per_problem.values()]
    low, high = bootstrap_interval(means, seed=seed_of(seed, "bootstrap") % 2**31)
    return EvalResult(
        accuracy=sum(means) / len(means),
        low=low,
        high=high,
        k=k,
        length=sum(row["tokens"] for row in rows) / len(rows),
        truncated=sum(row["truncated"] for row in rows) / len(rows),
        samples=rows,
    )
