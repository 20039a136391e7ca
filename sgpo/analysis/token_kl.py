"""Where along a solution the guided and the plain context disagree: token KL by position, by step and by token.

The KL is d_t of Eq. 3 (arXiv 2606.24064), in nats, before the mask of Eq. 5.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sgpo.analysis.effects import Estimate, estimate

DECILES = 10
MOST_STEPS = 12
TOP_TOKENS = 20
_LEAST_COUNT = 3  # of a token among the top ones by mean
_WINDOW = 4  # tokens before the one that is decoded, enough to finish a character


@dataclass(frozen=True, slots=True)
class TokenKl:
    """One completion: the text that each token adds, and its KL."""

    problem: int
    problem_id: str
    sample: int
    pieces: tuple[str, ...]
    kl: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the solutions: mean KL (each completion counts once), share of its tokens above the limit."""

    name: str
    tokens: int
    kl: Estimate
    above_share: float


@dataclass(frozen=True, slots=True)
class TopToken:
    """A token text, how often it occurs, its mean KL, and its share of the KL of all tokens."""

    text: str
    count: int
    mean: float
    share_of_all: float


def token_pieces(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> tuple[str, ...]:
    """The text that each token adds to those before it; blanks and characters over several tokens come out right."""
    pieces = []
    for i in range(len(ids)):
        before, whole = decode(ids[max(0, i - _WINDOW) : i]), decode(ids[max(0, i - _WINDOW) : i + 1])
        pieces.append(whole[len(before) :] if whole.startswith(before) else decode([ids[i]]))
    return tuple(pieces)


def step_of_tokens(pieces: Sequence[str], pattern: str) -> list[int]:
    """The 0-based step of every token. A step ends where `pattern` matches, and the match belongs to it."""
    text = "".join(pieces)
    borders = sorted({match.end() for match in re.finditer(pattern, text) if 0 < match.end() < len(text)})
    steps, position, current = [], 0, 0
    for piece in pieces:
        # A blank that leads a word goes with the word.
        start = position + (len(piece) - len(piece.lstrip()) if piece.strip() else 0)
        while current < len(borders) and borders[current] <= start:
            current += 1
        steps.append(current)
        position += len(piece)
    return steps


def summarize(rows: Sequence[TokenKl], *, limit: float | None, pattern: str) -> dict[str, Any]:
    """All numbers of the KL section; `limit` is max_token_kl, None: off. Needs at least one token."""
    every = torch.tensor([value for row in rows for value in row.kl], dtype=torch.float64)
    above = torch.zeros_like(every, dtype=torch.bool) if limit is None else every > limit
    kept = torch.where(above, 0.0, every)
    in_order = every.sort().values
    median, p90, p99 = (float(in_order[int(share * (len(every) - 1))]) for share in (0.5, 0.9, 0.99))
    deciles = [[min(t * DECILES // len(row.kl), DECILES - 1) for t in range(len(row.kl))] for row in rows]
    steps = [step_of_tokens(row.pieces, pattern) for row in rows]
    return {
        "rollouts": len(rows),
        "problems": len({row.problem for row in rows}),
        "tokens": len(every),
        "max_token_kl": limit,
        "mean": float(every.mean()),
        "mean_after_mask": float(kept.mean()),
        "mean_per_problem": estimate(_per_problem(rows, [sum(row.kl) / len(row.kl) for row in rows])),
        "above_share": float(above.double().mean()),
        "median": median,
        "p90": p90,
        "p99": p99,
        "max": float(every.max()),
        "by_decile": [
            _part(rows, deciles, k, f"{10 * k}-{10 * k + 10} %", limit) for k in range(DECILES) if _has(deciles, k)
        ],
        "by_step": [_part(rows, steps, k, str(k + 1), limit) for k in range(MOST_STEPS) if _has(steps, k)],
        "steps_per_rollout": sum(row[-1] + 1 for row in steps) / len(steps),
        "top_tokens": top_tokens(rows),
    }


def top_tokens(rows: Sequence[TokenKl]) -> list[TopToken]:
    """Token texts with the highest mean KL, of those that occur a few times."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for piece, value in zip(row.pieces, row.kl, strict=True):
            found.setdefault(piece, []).append(value)
    total = sum(sum(values) for values in found.values()) or 1.0
    tokens = [
        TopToken(text, len(values), sum(values) / len(values), sum(values) / total)
        for text, values in found.items()
        if len(values) >= _LEAST_COUNT
    ]
    return sorted(tokens, key=lambda token: -token.mean)[:TOP_TOKENS]


def _has(parts: Sequence[Sequence[int]], k: int) -> bool:
    return any(k in row for row in parts)


def _part(rows: Sequence[TokenKl], parts: Sequence[Sequence[int]], k: int, name: str, limit: float | None) -> Part:
    """The tokens of part k: averaged within a completion, then over those of a problem, then over problems."""
    chosen, values = [], []
    for row, part in zip(rows, parts, strict=True):
        if mine := [value for value, where in zip(row.kl, part, strict=True) if where == k]:
            chosen.append(row)
            values.append(mine)
    tokens = sum(map(len, values))
    means = [sum(mine) / len(mine) for mine in values]
    above = sum(limit is not None and value > limit for mine in values for value in mine)
    return Part(name, tokens, estimate(_per_problem(chosen, means)), above / tokens)


def _per_problem(rows: Sequence[TokenKl], values: Sequence[float]) -> list[float]:
    found: dict[int, list[float]] = {}
    for row, value in zip(rows, values, strict=True):
        found.setdefault(row.problem, []).append(value)
    return [sum(each) / len(each) for each in found.values()]
