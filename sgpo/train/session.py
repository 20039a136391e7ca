"""What a run holds from its first step to its last: its parts, and how far it has come."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from sgpo.algorithm.loss import SgpoLoss
from sgpo.algorithm.method import Method
from sgpo.config import Config
from sgpo.engine.checkpoint import Checkpoints
from sgpo.engine.weight_sync import PolicySampler
from sgpo.engine.zero import ZeroEngine
from sgpo.reporting.live_display import LiveDisplay
from sgpo.reporting.run_logs import MetricsLogger, RolloutTable
from sgpo.rewards.pool import RewardPool
from sgpo.train.memory_vs_plan import MemoryTracker
from sgpo.train.profiler import Profiler
from sgpo.types import Rollout, TaskData, TrainSequence


@dataclass(slots=True)
class Progress:
    """What a checkpoint remembers beside weights, optimizer and random states. Accuracies are held-out.

    `rounds` batches of problems have been sampled (one per step, more where groups are refilled).
    """

    step: int = 0
    rounds: int = 0
    rollouts: int = 0
    rollout_tokens: int = 0
    wall_s: float = 0.0
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    best_accuracy: float = -1.0


@dataclass(frozen=True, slots=True)
class Session:
    """The parts of a run, each made once, before the first step."""

    config: Config
    tokenizer: Any
    task: TaskData
    held_out: TaskData | None
    engine: ZeroEngine
    sampler: PolicySampler
    rewards: RewardPool
    method: Method
    loss: SgpoLoss
    checkpoints: Checkpoints
    logger: MetricsLogger
    table: RolloutTable
    display: LiveDisplay
    total_steps: int
    started: float
    memory: MemoryTracker
    profiler: Profiler | None = None
    ahead: list[Rollout] = field(default_factory=list)  # rollout.overlap: those of the next step, once they are there

    @property
    def batching(self) -> dict[str, int]:
        """What forms micro-batches, beside their sequences."""
        return {"token_budget": self.config.engine.micro_batch_tokens, "pad_id": self.tokenizer.pad_token_id}

    @property
    def not_finite(self) -> dict[str, Any]:
        """What an optimizer step does about numbers that are not finite, and what it calls a sequence."""
        return {"non_finite": self.config.optim.non_finite, "name": self._name}

    def _name(self, sequence: TrainSequence) -> str:
        pairs = zip(self.task.problems, self.task.prompts, strict=True)
        found = (problem.id for problem, pair in pairs if sequence.prompt_ids in (pair.plain, pair.guided))
        return f"a completion of problem {next(found, '?')}"


def total_steps_of(config: Config, problems: int) -> int:
    """Steps of the run, by train.epochs and train.max_steps."""
    per_epoch = problems // config.rollout.problems_per_step
    steps = math.ceil(config.train.epochs * per_epoch)
    return min(steps, config.train.max_steps or steps)


def is_last(s: Session, done: int, progress: Progress) -> bool:
    """No further step: their number is reached, or the budget of rollouts has no room for another batch."""
    rollout, limit = s.config.rollout, s.config.train.max_rollouts
    batch = rollout.problems_per_step * (rollout.n_auto + rollout.n_guided)
    return done >= s.total_steps or (limit is not None and progress.rollouts + batch > limit)
