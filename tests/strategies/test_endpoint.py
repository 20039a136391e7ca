"""The endpoint backend against a real server on 127.0.0.1 that misbehaves."""

import json
import socket
import time
from email.utils import formatdate

import httpx
import pytest
from chat_server import FAULTS, ChatServer
from processes import PATIENCE_S, PROMPT_S, scaled

from sgpo.strategies.asking import Answer, Failure, Question, Sampling
from sgpo.strategies.endpoint import EndpointBackend, _completion, _retry_after, _Transient
from sgpo.strategies.settings import EndpointConfig
from sgpo.types import SgpoError


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("TEST_KEY", "sk-secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def questions(count, text="how?"):
    return [Question((("system", "s"), ("user", f"{text} {i}")), Sampling(0.5, 0.9, 64), 0, 0, i) for i in range(count)]


def echo(request, dice):
    return f"re: {request['messages'][-1]['content']}"


def backend(server, **settings):
    defaults = {
        "model": "m",
        "api_key_env": "TEST_KEY",
        "backoff_s": 0.01,
        "max_backoff_s": 0.05,
        "timeout_s": PATIENCE_S,
    }
    return EndpointBackend(EndpointConfig(**{"base_url": server.url, **defaults, **settings}))


def answers(engine, asked):
    results = {}
    engine.answer(asked, lambda question, result: results.setdefault(id(question), result))
    return [results[id(question)] for question in asked]


def test_every_fault_is_survived():
    with ChatServer(echo, faults=0.6, slow_s=scaled(30.0)) as server:
        engine = backend(server, timeout_s=scaled(2.0), concurrency=8)
        asked = questions(60)
        results = answers(engine, asked)
        assert [result.text for result in results] == [f"re: how? {i}" for i in range(60)]
        assert all(result.completion_tokens == len(result.text) for result in results)
        outcomes = server.outcomes()
        assert set(FAULTS) < set(outcomes)
        assert outcomes["answered"] == 60
        assert sum(engine.retries.values()) == len(server.log) - 60
        assert set(engine.retries) == {
            "HTTP 429",
            "HTTP 500",
            "time-out",
            "cut or refused connection",
            "a body that is no completion",
        }


@pytest.mark.parametrize("fault", FAULTS)
def test_tries_are_bounded(fault):
    with ChatServer(echo, faults=1.0, slow_s=scaled(30.0), only=(fault,)) as server:
        engine = backend(server, timeout_s=scaled(2.0), max_retries=1)
        [result] = answers(engine, questions(1))
        assert isinstance(result, Failure)
        assert "after 2 tries" in result.reason
        assert sum(engine.retries.values()) == 1
        assert set(server.outcomes()) == {fault}


def test_what_is_sent():
    with ChatServer(echo) as server:
        answers(backend(server, body={"seed": None, "max_tokens": None, "max_completion_tokens": 7}), questions(1))
        assert server.bodies == [
            {
                "model": "m",
                "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "how? 0"}],
                "temperature": 0.5,
                "top_p": 0.9,
                "max_completion_tokens": 7,
            }
        ]
        answers(backend(server), questions(1))
        assert server.bodies[1]["seed"] == 0
        assert server.headers[0]["Authorization"] == "Bearer sk-secret"
        answers(backend(server, api_key_env=None), questions(1))
        assert "Authorization" not in server.headers[2]


def test_retry_after_is_obeyed_by_all():
    with ChatServer(echo, faults=1.0, retry_after="0.7", only=("429 with Retry-After",)) as server:
        engine = backend(server, concurrency=1, max_retries=1)
        assert all(isinstance(result, Failure) for result in answers(engine, questions(2)))
        gaps = [after - before for before, after in zip(server.started, server.started[1:], strict=False)]
        assert len(gaps) == 3
        assert min(gaps) >= 0.65  # the last gap lies between two different questions


def test_a_wait_beyond_the_limit_ends_the_run():
    with ChatServer(echo, faults=1.0, retry_after="86400", only=("429 with Retry-After",)) as server:
        started = time.monotonic()
        with pytest.raises(SgpoError, match="asks to wait 86400 s"):
            answers(backend(server), questions(4))
        assert time.monotonic() - started < PROMPT_S


def test_pauses_grow_and_are_jittered():
    with ChatServer(echo) as server:
        engine = backend(server, backoff_s=1.0, max_backoff_s=5.0)
        for tried, longest in enumerate([1.0, 2.0, 4.0, 5.0, 5.0]):
            pauses = {engine._pause(tried) for _ in range(50)}
            assert len(pauses) > 1
            assert longest / 2 <= min(pauses)
            assert max(pauses) <= longest


def test_requests_per_minute():
    with ChatServer(echo) as server:
        answers(backend(server, requests_per_minute=120, concurrency=8), questions(12))
        assert server.started[-1] - server.started[0] >= 11 * 0.5 - 0.3


def test_concurrency():
    with ChatServer(echo, delay_s=0.5) as server:
        answers(backend(server, concurrency=3), questions(12))
        assert server.most_at_once == 3


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_ends_the_run_before_any_question(status):
    with ChatServer(echo, status=status) as server:
        with pytest.raises(SgpoError, match=r"refuses the key in TEST_KEY") as error:
            answers(backend(server), questions(4))
        assert server.log == []
        assert "sk-secret" not in str(error.value)


def test_no_such_model_ends_the_run():
    with ChatServer(echo, status=404) as server:
        with pytest.raises(SgpoError, match=r"knows no such model.*'m'.*not today"):
            answers(backend(server, concurrency=1), questions(4))
        assert len(server.log) == 1


def test_a_refused_question_fails_alone_until_all_do():
    with ChatServer(echo, status=400) as server:
        engine = backend(server, concurrency=1)
        assert answers(engine, questions(3)) == [Failure("HTTP 400: not today")] * 3
        with pytest.raises(SgpoError, match="the last 8 questions all failed"):
            answers(engine, questions(40))
        assert len(server.log) == 8


def test_nobody_there():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
    pauses = {"backoff_s": 2 * PROMPT_S, "max_backoff_s": 2 * PROMPT_S, "max_retries": 1}
    engine = EndpointBackend(EndpointConfig(base_url=url, model="m", api_key_env=None, **pauses))
    started = time.monotonic()
    with pytest.raises(SgpoError, match=r"base_url http://127\S+ cannot be reached"):
        answers(engine, questions(1))
    assert time.monotonic() - started < PROMPT_S  # without a pause


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"model": ""}, "endpoint.model is required"),
        ({"base_url": "localhost:8000"}, "base_url must be like https://"),
        ({"base_url": "http://[::1/v1"}, "base_url must be like https://"),
        ({"base_url": "ftp://x/v1"}, "base_url must be like https://"),
        ({"api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY holds no key"),
        ({"api_key_env": "ODD_KEY"}, "characters that no key has"),
    ],
)
def test_settings_that_cannot_work(monkeypatch, settings, expected):
    monkeypatch.setenv("ODD_KEY", "sk-\nsecret")
    with pytest.raises(SgpoError, match=expected) as error:
        EndpointBackend(EndpointConfig(**{"model": "m", "api_key_env": None, **settings}))
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("3", 3), ("0.5", 0.5), ("-1", 0), ("soon", 0), ("", 0), ("Wed, 01 Jan 2025 00:00:00 GMT", 0)],
)
def test_retry_after(value, seconds):
    assert _retry_after(httpx.Headers({"Retry-After": value})) == seconds


def test_retry_after_as_a_date():
    wait = _retry_after(httpx.Headers({"Retry-After": formatdate(time.time() + 60, usegmt=True)}))
    assert 50 < wait <= 60


def completion(**changes):
    return json.dumps({"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}], **changes}).encode()


def test_completions():
    assert _completion(completion()) == Answer("hi", "stop")
    usage = {"prompt_tokens": 5, "completion_tokens": 2}
    assert _completion(completion(usage=usage)) == Answer("hi", "stop", 5, 2)
    assert _completion(completion(usage={"prompt_tokens": "many"})) == Answer("hi", "stop")
    cut = [{"message": {"content": None}, "finish_reason": "length"}]
    assert _completion(completion(choices=cut)) == Answer("", "length")
    assert _completion(completion(choices=[{"message": {"content": "\ud800"}}])) == Answer("?", "stop")


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"\xff", completion(choices=None), completion(choices=[{}])])
def test_what_is_no_completion(content):
    with pytest.raises(_Transient):
        _completion(content)
