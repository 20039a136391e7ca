"""Questions to a model and their answers, each on the disk before it is used: nothing is asked or paid for twice."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from sgpo.strategies.questions import Messages
from sgpo.utils.append_log import KeyedLines


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are sampled."""

    temperature: float
    top_p: float
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Question:
    """One completion to ask for. Questions with the same text differ by `index` (the candidate) and `attempt`."""

    messages: Messages
    sampling: Sampling
    index: int
    attempt: int
    seed: int


@dataclass(frozen=True, slots=True)
class Answer:
    """`finish` is "stop", or "length" where the model ran into max_tokens. Tokens None: the backend does not tell."""

    text: str
    finish: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """A question that got no answer; it is not cached, so that the next run asks again."""

    reason: str


class Backend(Protocol):
    """Answers questions, in any order and as many at a time as it likes."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What besides the question decides the answer: part of the cache key."""
        ...

    retries: Counter[str]
    """Tries that came to nothing and were repeated, by cause."""

    def close(self) -> None:
        """Lets go of what it holds; no further question can be asked."""
        ...

    def answer(self, questions: Sequence[Question], on_result: Callable[[Question, Answer | Failure], None]) -> None:
        """Calls `on_result` once per question, in the calling thread.

        Raises SgpoError where no further answer can come: no such model, wrong key, nobody there.
        """
        ...


class AnswerCache(KeyedLines[Answer]):
    """Answers by key in an append-only file, see `KeyedLines`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, what="cache", setting="cache", read=lambda row: Answer(**row), write=asdict)


@dataclass
class Usage:
    """What was asked, and what it took; `cached` answers and their tokens were paid for by an earlier run."""

    asked: int = 0
    cached: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_prompt_tokens: int = 0
    cached_completion_tokens: int = 0
    without_token_count: int = 0

    def add(self, result: Answer | Failure, *, cached: bool) -> None:
        """Counts one answer or failure; `cached`: it came from the disk."""
        if isinstance(result, Failure):
            self.failed += 1
            return
        prompt, completion = result.prompt_tokens or 0, result.completion_tokens or 0
        self.without_token_count += result.prompt_tokens is None or result.completion_tokens is None
        if cached:
            self.cached += 1
            self.cached_prompt_tokens += prompt
            self.cached_completion_tokens += completion
        else:
            self.asked += 1
            self.prompt_tokens += prompt
            self.completion_tokens += completion


class Asker:
    """Takes answers from the cache and the others from the backend. `on_progress` hears how many more are there."""

    def __init__(self, backend: Backend, cache: AnswerCache, on_progress: Callable[[int], None]) -> None:
        self._backend = backend
        self._cache = cache
        self._on_progress = on_progress
        self.usage = Usage()

    def ask(self, questions: Sequence[Question]) -> list[Answer | Failure]:
        """One result per question, in order."""
        keys = [self._key(question) for question in questions]
        results: dict[str, Answer | Failure] = {}
        missing: dict[str, Question] = {}
        for key, question in zip(keys, questions, strict=True):
            if answer := self._cache.get(key):
                results[key] = answer
                self.usage.add(answer, cached=True)
            elif key not in missing:
                missing[key] = question
        self._on_progress(len(questions) - len(missing))
        key_of = {id(question): key for key, question in missing.items()}

        def keep(question: Question, result: Answer | Failure) -> None:
            key = key_of[id(question)]
            if isinstance(result, Answer):
                self._cache.put(key, result)
            results[key] = result
            self.usage.add(result, cached=False)
            self._on_progress(1)

        if missing:
            self._backend.answer(list(missing.values()), keep)
        return [results[key] for key in keys]

    def _key(self, question: Question) -> str:
        content = {"backend": dict(self._backend.identity), **asdict(question)}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
