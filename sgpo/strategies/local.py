"""A model on this machine as the one who answers: any RolloutEngine, token ids in and out, with the chat template."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

from sgpo.rewards.scoring import completion_text
from sgpo.strategies.asking import Answer, Failure, Question
from sgpo.types import Rollout, RolloutEngine, RolloutRequest, SamplingParams, SgpoError


class LocalBackend:
    """A Backend over a rollout engine.

    Args:
        engine: with the weights of the model in place.
        tokenizer: a Hugging Face tokenizer with a chat template.
        identity: names the weights.
        max_positions: the model's longest sequence; None where it has no limit.
        batch: questions per call of the engine; each answer is kept as soon as it is there.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        tokenizer: Any,
        *,
        identity: Mapping[str, Any],
        max_positions: int | None,
        batch: int,
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise SgpoError("the tokenizer of local.model.path has no chat template: use an instruction-tuned model")
        self.identity = {"backend": "local", **identity}
        self.retries: Counter[str] = Counter()
        self._engine = engine
        self._tokenizer = tokenizer
        self._max_positions = max_positions
        self._batch = batch

    def answer(self, questions: Sequence[Question], on_result: Callable[[Question, Answer | Failure], None]) -> None:
        """The answer to each question, sampled by a model on this machine."""
        fitting: list[tuple[Question, tuple[int, ...]]] = []
        for question in questions:
            ids = self._prompt(question)
            longest = len(ids) + question.sampling.max_tokens
            if self._max_positions is not None and longest > self._max_positions:
                reason = f"{len(ids)} prompt tokens + max_tokens exceed the model's {self._max_positions} positions"
                on_result(question, Failure(reason))
            else:
                fitting.append((question, ids))
        for sampling, group in groupby(fitting, key=lambda pair: pair[0].sampling):
            params = SamplingParams(sampling.temperature, sampling.top_p, sampling.max_tokens)
            pairs = list(group)
            for start in range(0, len(pairs), self._batch):
                self._generate(pairs[start : start + self._batch], params, on_result)

    def close(self) -> None:
        """Ends the sampler."""
        self._engine.close()

    def _generate(
        self,
        pairs: Sequence[tuple[Question, tuple[int, ...]]],
        params: SamplingParams,
        on_result: Callable[[Question, Answer | Failure], None],
    ) -> None:
        requests = [
            RolloutRequest(row, "auto", question.index, ids, question.seed) for row, (question, ids) in enumerate(pairs)
        ]

        def keep(rollout: Rollout) -> None:
            question, ids = pairs[rollout.request.problem_index]
            text = completion_text(self._tokenizer, rollout.completion_ids)
            finish = "length" if rollout.truncated else "stop"
            on_result(question, Answer(text, finish, len(ids), len(rollout.completion_ids)))

        self._engine.generate(requests, params, None, keep)

    def _prompt(self, question: Question) -> tuple[int, ...]:
        turns = [{"role": role, "content": content} for role, content in question.messages]
        ids = self._tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=False)
        return tuple(ids)
