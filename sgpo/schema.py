"""Frozen records that cross the borders between the packages, and the RolloutEngine protocol. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Kind = Literal["auto", "guided"]


class SgpoError(Exception):
    """Bad input or a state that cannot go on: one clear sentence for the user (what, where, expected, what to do).

    The command line prints the sentence without a traceback and exits with code 2.
    """


@dataclass(frozen=True, slots=True)
class ChatTurn:
    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Problem:
    """One row of a data file. `guidance` is what the guided prompt carries: a strategy text or chat turns."""

    id: str
    problem: str
    answer: str
    strategy: str | None = None
    guidance_turns: tuple[ChatTurn, ...] = ()
    solution: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def has_guidance(self) -> bool:
        return bool(self.strategy or self.guidance_turns)


@dataclass(frozen=True, slots=True)
class PromptPair:
    """The two contexts of one problem as token ids; `guided` is None where the problem has no guidance."""

    plain: tuple[int, ...]
    guided: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """One completion to sample. `seed` alone decides the randomness, never the batch it happens to run in."""

    problem_index: int
    kind: Kind
    sample_index: int
    prompt_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class SamplingParams:
    temperature: float
    top_p: float
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled completion. `completion_ids` ends with an EOS id unless `truncated`.

    `rollout_logprobs` are the sampler's own, of the distribution it sampled from (after temperature and top-p); for
    greedy decoding (temperature 0) those of temperature 1.
    """

    request: RolloutRequest
    completion_ids: tuple[int, ...]
    rollout_logprobs: tuple[float, ...]
    truncated: bool
    policy_version: int


@dataclass(frozen=True, slots=True)
class TrainSequence:
    """One completion with all that its loss needs; every weight is per completion token and final (no later division).

    `policy_weight` and `advantage` drive the clipped policy loss, `target_weight` the distillation (or imitation) of
    this completion. The teacher of a distilled completion is the same completion after `teacher_prompt_ids`.
    `old_logprobs` None means that the policy has not moved since the rollout (ratio exactly 1).
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    advantage: float = 0.0
    policy_weight: float = 0.0
    target_weight: float = 0.0
    teacher_prompt_ids: tuple[int, ...] | None = None
    old_logprobs: tuple[float, ...] | None = None

    @property
    def is_live(self) -> bool:
        return self.target_weight != 0.0 or (self.policy_weight != 0.0 and self.advantage != 0.0)

    @property
    def length(self) -> int:
        """Tokens of the longer of its contexts."""
        return max(len(self.prompt_ids), len(self.teacher_prompt_ids or ())) + len(self.completion_ids)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A reward and how it came about. `status` is "ok", "no_answer", "too_long", "timeout" or "error"."""

    reward: float
    status: str = "ok"


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A problem of the current step with all its rollouts; rewards in the order of the rollouts."""

    problem: Problem
    prompts: PromptPair
    auto: tuple[Rollout, ...]
    guided: tuple[Rollout, ...]
    auto_verdicts: tuple[Verdict, ...]
    guided_verdicts: tuple[Verdict, ...]

    @property
    def auto_rewards(self) -> list[float]:
        return [verdict.reward for verdict in self.auto_verdicts]

    @property
    def guided_rewards(self) -> list[float]:
        return [verdict.reward for verdict in self.guided_verdicts]


class RolloutEngine(Protocol):
    """Samples completions from the weights it was last given."""

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        sampling: SamplingParams,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Rollout]:
        """One rollout per request, in the order of the requests; on_progress(finished requests, sampled tokens)."""
        ...

    def load_weights(self, named_tensors: Iterable[tuple[str, Any]], policy_version: int) -> None:
        """Takes over the trainer's weights, tensor by tensor, under their Hugging Face names."""
        ...

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...
