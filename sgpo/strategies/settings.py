"""Every knob of `sgpo strategies extract`. Loads without torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from sgpo.config import Section


class EndpointConfig(Section):
    """A chat-completions endpoint, and how hard to try."""

    base_url: str = Field(default="https://api.openai.com/v1", description="up to, without, /chat/completions")
    model: str = Field(default="", description="name of the model as the endpoint knows it; required")
    api_key_env: str | None = Field(
        default="OPENAI_API_KEY", description="environment variable that holds the key; null: none is sent"
    )
    concurrency: int = Field(default=16, ge=1, description="requests under way at the same time")
    requests_per_minute: float | None = Field(default=None, gt=0, description="null: no limit")
    timeout_s: float = Field(default=300.0, gt=0, description="limit of one request, from its start to its last byte")
    max_retries: int = Field(default=6, ge=0, description="further tries after errors that may pass by themselves")
    backoff_s: float = Field(default=1.0, gt=0, description="pause before the first further try; doubles, jittered")
    max_backoff_s: float = Field(default=60.0, gt=0)
    max_wait_s: float = Field(default=600.0, gt=0, description="a Retry-After beyond this ends the run")
    price_prompt: float | None = Field(default=None, ge=0, description="price of a million prompt tokens")
    price_completion: float | None = Field(default=None, ge=0, description="price of a million completion tokens")
    body: dict[str, Any] = Field(
        default={}, description="more fields of each request; null takes one out, as {seed: null}"
    )


class LeakConfig(Section):
    """Limits of comparing formulas with the solution's."""

    workers: int = Field(default=2, ge=1, description="processes in which Math-Verify compares formulas")
    timeout_s: float = Field(default=3.0, gt=0, description="a comparison that takes longer counts as a leak")
    memory_mib: int = Field(default=1024, ge=64, description="memory that one comparison may take")


class ExtractConfig(Section):
    """What to extract, by which backend, and what to ask."""

    input: str = Field(description="JSONL file (or any form of data.train) with id, problem, answer and the response")
    output: str = Field(description="JSONL file to write: one problem with its strategy per line, ready for data.train")
    backend: Literal["openai", "local", "calculator_trace"] = Field(
        default="openai",
        description="openai: an endpoint with that protocol; local: a model folder; calculator_trace: no model, from"
        " <<...>> marks of the response",
    )
    response_key: str = Field(default="response", description="field that holds the strong model's response")
    thinking: Literal["strip", "keep"] = Field(
        default="strip", description="strip: show only what follows the thinking part of the response"
    )
    limit: int | None = Field(default=None, ge=1, description="use only the first rows")
    cache: str | None = Field(default=None, description="file of all answers so far; default: OUTPUT.cache.jsonl")
    report: str | None = Field(default=None, description="file of the report; default: OUTPUT.report.json")
    template: str | None = Field(default=None, description="texts of the questions (YAML); default: the packaged ones")
    candidates: int = Field(default=5, ge=1, description="strategies per response, of which the best is kept")
    max_asks: int = Field(default=3, ge=1, description="times one answer is asked for while it is malformed or leaks")
    temperature: float = Field(default=0.8, ge=0, description="of the candidates")
    top_p: float = Field(default=0.95, gt=0, le=1)
    max_tokens: int = Field(default=8192, ge=1, description="of one answer, its own thinking included")
    score_temperature: float = Field(default=0.0, ge=0, description="of the judgement of a candidate")
    seed: int = Field(default=0, ge=0, description="sent with each question; another seed asks everything anew")
    endpoint: EndpointConfig = EndpointConfig()
    local: dict[str, Any] = Field(
        default={},
        description="backend local: keys of `sgpo train`, as --local.model.path FOLDER --local.rollout.engine hf",
    )
    local_batch: int = Field(default=64, ge=1, description="backend local: questions per call of the engine")
    leaks: LeakConfig = LeakConfig()
