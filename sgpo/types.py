"""Frozen records that cross the borders between the packages, and the RolloutEngine protocol. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Kind = Literal["auto", "guided"]

# What people are told of the two kinds of rollout; files keep the short words.
WORDS: dict[str, str] = {"auto": "without strategy", "guided": "with strategy"}


class SgpoError(Exception):
    """Bad input or a state that cannot go on: one clear sentence for the user (what, where, expected, what to do).

    The command line prints the sentence without a traceback and exits with code 2.
    """


class EngineFailure(SgpoError):
    """A rollout engine died or hangs. Its next load_weights starts it anew; nothing of the trainer is lost."""


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """One message of a chat."""

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
        """Whether it can be sampled with guidance."""
        return bool(self.strategy or self.guidance_turns)


@dataclass(frozen=True, slots=True)
class PromptPair:
    """The two contexts of one problem as token ids; `guided` is None where the problem has no guidance."""

    plain: tuple[int, ...]
    guided: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class TaskData:
    """Problems with both of their prompts, in the same order; a demonstration's ids where the method uses them."""

    problems: list[Problem]
    prompts: list[PromptPair]
    demo_ids: list[tuple[int, ...]] | None = None


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
    """How tokens are drawn, and how many at most."""

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


def rollout_from_json(row: dict[str, Any]) -> Rollout:
    """Undoes json.dumps(dataclasses.asdict(rollout))."""
    request = {**row["request"], "prompt_ids": tuple(row["request"]["prompt_ids"])}
    return Rollout(
        **{
            **row,
            "request": RolloutRequest(**request),
            "completion_ids": tuple(row["completion_ids"]),
            "rollout_logprobs": tuple(row["rollout_logprobs"]),
        }
    )


@dataclass(frozen=True, slots=True)
class TrainSequence:
    """One completion with all that its loss needs; every weight is per completion token and final (no later division).

    `policy_weight` and `advantage` drive the clipped policy loss, `distill_weight` the distillation (or imitation) of
    this completion. The teacher of a distilled completion is the same completion after `teacher_prompt_ids`.
    `old_logprobs` None means that the policy has not moved since the rollout (ratio exactly 1). `rollout_logprobs` are
    the sampler's; `importance` multiplies the policy weight of each token (None: 1).
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    advantage: float = 0.0
    policy_weight: float = 0.0
    distill_weight: float = 0.0
    teacher_prompt_ids: tuple[int, ...] | None = None
    old_logprobs: tuple[float, ...] | None = None
    rollout_logprobs: tuple[float, ...] | None = None
    importance: tuple[float, ...] | None = None

    @property
    def is_live(self) -> bool:
        """Whether it has a gradient: a weight, and for the policy loss an advantage."""
        return self.distill_weight != 0.0 or (self.policy_weight != 0.0 and self.advantage != 0.0)

    @property
    def length(self) -> int:
        """Tokens of the longer of its contexts."""
        return max(len(self.prompt_ids), len(self.teacher_prompt_ids or ())) + len(self.completion_ids)


@dataclass(frozen=True, slots=True)
class RewardResult:
    """The reward of one completion, and how it came about.

    `status` is "ok", "no_answer", "too_long", "timeout" or "error".
    """

    reward: float
    status: str = "ok"


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A problem of the current step with all its rollouts; rewards in the order of the rollouts.

    `demo_ids` is a worked solution, ending with EOS; empty where the method uses none.
    """

    problem: Problem
    prompts: PromptPair
    auto: tuple[Rollout, ...]
    guided: tuple[Rollout, ...]
    auto_results: tuple[RewardResult, ...]
    guided_results: tuple[RewardResult, ...]
    demo_ids: tuple[int, ...] = ()

    @property
    def auto_rewards(self) -> list[float]:
        """Rewards of the rollouts without strategy."""
        return [result.reward for result in self.auto_results]

    @property
    def guided_rewards(self) -> list[float]:
        """Rewards of the rollouts with strategy."""
        return [result.reward for result in self.guided_results]


@dataclass(frozen=True, slots=True)
class SyncReceipt:
    """What a rollout engine says of the weights it was given.

    checksums: of every tensor as it arrived, by name (`sgpo.utils.checksums.checksum`).
    probe_logprobs: log pi(id | ids before) of every probe id but the first, temperature 1, by the new weights.
    """

    checksums: Mapping[str, int]
    probe_logprobs: tuple[float, ...]


class Sampler(Protocol):
    """Samples completions from the weights it has; which those are is not its callers' business."""

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        sampling: SamplingParams,
        on_progress: Callable[[int, int], None] | None = None,
        on_rollout: Callable[[Rollout], None] | None = None,
    ) -> list[Rollout]:
        """One rollout per request, in the order of the requests.

        on_progress(finished requests, sampled tokens) is called now and then, on_rollout as each completion is done.

        Raises EngineFailure where the engine is dead or hangs, SgpoError where it cannot do what is asked.
        """
        ...


class RolloutEngine(Sampler, Protocol):
    """A sampler that takes over the trainer's weights, and whose memory comes and goes."""

    def load_weights(
        self, named_tensors: Iterable[tuple[str, Any]], policy_version: int, probe_ids: Sequence[int] = ()
    ) -> SyncReceipt:
        """Takes over the trainer's weights, tensor by tensor, under the names and in the shapes of a checkpoint.

        An engine may hold a tensor until this returns: whoever yields it must not write into it before. A sleeping
        engine wakes, a dead one is started anew. After an error the engine holds no policy and refuses to sample.

        An engine that samples with adapters gets the frozen weights first, then the adapters; while it `holds_base`,
        adapters alone will do.
        """
        ...

    def holds_base(self) -> bool:
        """Whether the engine has the frozen weights that adapters go beside: it was given them and has not lost them.

        Always False for an engine without adapters. Raises nothing: a dead engine holds no weights.
        """
        ...

    def sleep(self) -> None:
        """Gives back the memory that only rollouts need; the weights may be among it."""
        ...

    def wake(self) -> None:
        """Takes the memory again. An engine that dropped its weights needs load_weights before it can sample."""
        ...

    def close(self) -> None:
        """Ends the sampler and gives all of its memory back."""
        ...
