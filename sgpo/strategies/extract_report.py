"""What an extraction tells: a line while it runs, and counts, tokens and cost at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sgpo.strategies.asking import Backend, Usage
from sgpo.strategies.extraction import Candidate, Tally
from sgpo.strategies.settings import ExtractConfig


def status_line(config: ExtractConfig, usage: Usage, tally: Tally) -> str:
    """Answers, failures, leaks, tokens and cost so far."""
    parts = [
        f"{usage.asked} answers",
        f"{usage.cached} from the cache" if usage.cached else "",
        f"{usage.failed} failed" if usage.failed else "",
        f"{tally.malformed.total()} malformed" if tally.malformed else "",
        f"{tally.leaking_answers} leaking" if tally.leaking_answers else "",
        f"{usage.prompt_tokens:,} + {usage.completion_tokens:,} tokens",
    ]
    if (cost := _cost(config, usage.prompt_tokens, usage.completion_tokens)) is not None:
        parts.append(f"cost {cost:.4f}")
    return "  ".join(filter(None, parts))


def _cost(config: ExtractConfig, prompt_tokens: int, completion_tokens: int) -> float | None:
    prices = config.endpoint.price_prompt, config.endpoint.price_completion
    if prices[0] is None or prices[1] is None or config.backend != "openai":
        return None
    return (prompt_tokens * prices[0] + completion_tokens * prices[1]) / 1e6


def report_details(
    config: ExtractConfig, backend: Backend, usage: Usage, tally: Tally, groups: Sequence[Sequence[Candidate]]
) -> dict[str, Any]:
    """The part of the report that tells what the answers were and what they cost."""
    candidates = [candidate for group in groups for candidate in group]
    all_prompt = usage.prompt_tokens + usage.cached_prompt_tokens
    all_completion = usage.completion_tokens + usage.cached_completion_tokens
    return {
        "candidates": {
            "wanted": len(candidates),
            "scored": sum(c.scores is not None for c in candidates),
            "without_usable_strategy": sum(c.strategy is None for c in candidates),
            "clean_but_unscored": sum(c.strategy is not None and c.scores is None for c in candidates),
        },
        "malformed": {"answers": tally.malformed.total(), "by_reason": dict(tally.malformed.most_common())},
        "leaks": {
            "leaking_answers": tally.leaking_answers,
            "answers_by_kind": dict(tally.leaks.most_common()),
            "undecided_comparisons": tally.undecided_comparisons,
            "examples": tally.leak_examples,
        },
        "requests": {
            "answered": usage.asked,
            "from_cache": usage.cached,
            "failed": usage.failed,
            "retries": dict(backend.retries),
        },
        "tokens": {
            "prompt": usage.prompt_tokens,
            "completion": usage.completion_tokens,
            "prompt_with_cached": all_prompt,
            "completion_with_cached": all_completion,
            "answers_without_token_count": usage.without_token_count,
        },
        "cost": _cost(config, usage.prompt_tokens, usage.completion_tokens),
        "cost_with_cached": _cost(config, all_prompt, all_completion),
    }
