"""Any endpoint that speaks the OpenAI chat-completions protocol, asked patiently: many at a time, never too fast.

What may pass by itself is tried again with growing, jittered pauses: too many requests, server errors, cut connections,
silence, bodies that are no completion. A server that says how long to wait (Retry-After) is obeyed by all requests.
What cannot pass (wrong key, no such model, nobody there) stops the run with one sentence; what concerns one question
alone (a prompt that is too long) fails that question.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import httpx

from sgpo.strategies.asking import Answer, Failure, Question
from sgpo.strategies.settings import EndpointConfig
from sgpo.types import SgpoError

_TRANSIENT = frozenset((408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529))
_FATAL = {401: "refuses the key", 402: "asks for payment", 403: "refuses access", 404: "knows no such model or address"}
_MAX_BODY_BYTES = 32 * 2**20
_GIVE_UP_AFTER = 8  # questions in a row that failed: the endpoint is down, and the rest would only fail more slowly

OnResult = Callable[[Question, Answer | Failure], None]


class _Transient(Exception):
    """Worth another try, after `wait_s` at least where the server said so."""

    def __init__(self, cause: str, wait_s: float = 0.0) -> None:
        super().__init__(cause)
        self.wait_s = wait_s


class EndpointBackend:
    """A Backend over HTTP. The address is no part of its identity: the same model elsewhere gives the same answers.

    Raises:
        SgpoError: no model named, the base URL is none, or the environment variable of the key is not set.
    """

    def __init__(self, config: EndpointConfig) -> None:
        if not config.model:
            raise SgpoError("endpoint.model is required: the name of the model as the endpoint knows it")
        if not _is_http(config.base_url):
            raise SgpoError(f"endpoint.base_url must be like https://api.openai.com/v1, got {config.base_url!r}")
        self.identity = {"backend": "openai", "model": config.model, "body": config.body}
        self.retries: Counter[str] = Counter()
        self._config = config
        self._url = config.base_url.rstrip("/")
        self._headers = _headers(config)
        self._reached = False
        self._failed_in_a_row = 0
        self._next_start = 0.0

    def close(self) -> None:
        """Nothing is held: each call of `answer` has its own connections."""

    def answer(self, questions: Sequence[Question], on_result: OnResult) -> None:
        """The answer to each question, several asked at a time."""
        asyncio.run(self._answer_all(questions, on_result))

    async def _answer_all(self, questions: Sequence[Question], on_result: OnResult) -> None:
        waiting = iter(questions)
        limits = httpx.Limits(max_connections=self._config.concurrency)
        async with httpx.AsyncClient(headers=self._headers, limits=limits, timeout=self._config.timeout_s) as client:
            if not self._reached:
                await self._reach(client)
            count = min(self._config.concurrency, len(questions))
            workers = [asyncio.create_task(self._work(client, waiting, on_result)) for _ in range(count)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _work(self, client: httpx.AsyncClient, waiting: Iterator[Question], on_result: OnResult) -> None:
        for question in waiting:
            result = await self._one(client, question)
            self._failed_in_a_row = self._failed_in_a_row + 1 if isinstance(result, Failure) else 0
            on_result(question, result)
            if isinstance(result, Failure) and self._failed_in_a_row >= _GIVE_UP_AFTER:
                raise SgpoError(
                    f"{self._url}: the last {_GIVE_UP_AFTER} questions all failed ({result.reason}); "
                    "see to the endpoint, then the same command goes on where it stopped"
                )

    async def _one(self, client: httpx.AsyncClient, question: Question) -> Answer | Failure:
        body = self._body(question)
        cause, tries = "", self._config.max_retries + 1
        for tried in range(tries):
            if tried:
                self.retries[cause] += 1
                await asyncio.sleep(self._pause(tried - 1))
            await self._turn()
            try:
                return await asyncio.wait_for(self._post(client, body), self._config.timeout_s)
            except (_Transient, httpx.RequestError, asyncio.TimeoutError) as error:
                cause = _cause(error)
                self._heed_wait(error)
        return Failure(f"no answer after {tries} tries, the last: {cause}")

    async def _post(self, client: httpx.AsyncClient, body: Mapping[str, Any]) -> Answer | Failure:
        async with client.stream("POST", f"{self._url}/chat/completions", json=body) as response:
            content = bytearray()
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > _MAX_BODY_BYTES:
                    return Failure(f"the answer had more than {_MAX_BODY_BYTES} bytes")
        status = response.status_code
        if status in _TRANSIENT:
            raise _Transient(f"HTTP {status}", _retry_after(response.headers))
        if status in _FATAL:
            raise SgpoError(
                f"{self._url} {_FATAL[status]} (HTTP {status}, model {body['model']!r}): {_message(content)}"
            )
        if status != 200:
            return Failure(f"HTTP {status}: {_message(content)}")
        return _completion(content)

    async def _reach(self, client: httpx.AsyncClient) -> None:
        """Finds out whether anybody is there, and whether the key is right, before the first question is paid for."""
        for tried in range(self._config.max_retries + 1):
            try:
                response = await asyncio.wait_for(client.get(f"{self._url}/models"), self._config.timeout_s)
            except (httpx.ConnectError, httpx.UnsupportedProtocol) as error:
                raise SgpoError(
                    f"endpoint.base_url {self._url} cannot be reached ({_first_line(error)}); "
                    "start the server or correct the address"
                ) from error
            except (httpx.RequestError, asyncio.TimeoutError) as error:
                if tried == self._config.max_retries:
                    raise SgpoError(f"endpoint.base_url {self._url} does not answer ({_cause(error)})") from error
                await asyncio.sleep(self._pause(tried))
                continue
            if response.status_code in (401, 403):
                key = f"in {self._config.api_key_env}" if self._config.api_key_env else "(none was sent)"
                raise SgpoError(f"{self._url} refuses the key {key} (HTTP {response.status_code}); set the right one")
            break  # some servers do not list their models: any other answer means that somebody is there
        self._reached = True

    def _body(self, question: Question) -> dict[str, Any]:
        sampling = question.sampling
        body = {
            "model": self._config.model,
            "messages": [{"role": role, "content": content} for role, content in question.messages],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": question.seed,
            **self._config.body,
        }
        return {key: value for key, value in body.items() if value is not None}

    async def _turn(self) -> None:
        """Waits until the next request may start: requests_per_minute, and what Retry-After asked for."""
        now = time.monotonic()
        start = max(now, self._next_start)
        if self._config.requests_per_minute is not None:
            self._next_start = start + 60.0 / self._config.requests_per_minute
        await asyncio.sleep(start - now)

    def _heed_wait(self, error: BaseException) -> None:
        wait_s = error.wait_s if isinstance(error, _Transient) else 0.0
        if wait_s > self._config.max_wait_s:
            raise SgpoError(
                f"{self._url} asks to wait {wait_s:.0f} s ({error}), more than endpoint.max_wait_s = "
                f"{self._config.max_wait_s:.0f}; the same command goes on later where it stopped"
            )
        if wait_s:
            self._next_start = max(self._next_start, time.monotonic() + wait_s)

    def _pause(self, tried: int) -> float:
        """Doubles with every try up to max_backoff_s; jittered, so that many requests do not come back together."""
        return min(self._config.backoff_s * 2.0**tried, self._config.max_backoff_s) * random.uniform(0.5, 1.0)


def _is_http(address: str) -> bool:
    try:
        url = httpx.URL(address)
    except httpx.InvalidURL:
        return False
    return url.scheme in ("http", "https") and bool(url.host)


def _headers(config: EndpointConfig) -> dict[str, str]:
    if config.api_key_env is None:
        return {}
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise SgpoError(
            f"the environment variable {config.api_key_env} holds no key for {config.base_url}: set it, name another "
            "with endpoint.api_key_env, or set endpoint.api_key_env to null for a server without keys"
        )
    if not (key.isascii() and key.isprintable()):
        raise SgpoError(f"the key in {config.api_key_env} holds characters that no key has; set it anew")
    return {"Authorization": f"Bearer {key}"}


def _completion(content: bytes | bytearray) -> Answer:
    try:
        payload = json.loads(content)
        choice = payload["choices"][0]
        text, finish = choice["message"]["content"], choice.get("finish_reason")
        if not isinstance(text, str | None):
            raise TypeError
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise _Transient("a body that is no completion") from None
    usage = payload.get("usage")
    counts = [usage.get(key) if isinstance(usage, dict) else None for key in ("prompt_tokens", "completion_tokens")]
    prompt, completion = (count if isinstance(count, int) and count >= 0 else None for count in counts)
    # A lone surrogate in a JSON escape is no text: it could be written to no file.
    text = (text or "").encode("utf-8", "replace").decode()
    return Answer(text, "length" if finish == "length" else "stop", prompt, completion)


def _retry_after(headers: httpx.Headers) -> float:
    """Seconds to wait; the header holds seconds or a date, and 0 is what nonsense counts as."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, min(float(value), 1e9))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _message(content: bytes | bytearray) -> str:
    """The server's own words about an error, shortened."""
    try:
        text = json.loads(content)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        text = content.decode("utf-8", "replace")
    return " ".join(str(text).split())[:200] or "no message"


def _cause(error: BaseException) -> str:
    if isinstance(error, _Transient):
        return str(error)
    if isinstance(error, asyncio.TimeoutError | httpx.TimeoutException):
        return "time-out"
    return "cut or refused connection"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0] or type(error).__name__
