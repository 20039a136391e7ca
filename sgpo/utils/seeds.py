"""All randomness of a run comes from (run seed, what it is for): nothing to save, nothing to replay on resume."""

from __future__ import annotations

import hashlib


def seed_of(run_seed: int, *parts: str | int) -> int:
    """A seed in [0, 2^63) that depends on every part and on nothing else."""
    text = "\x1f".join(str(part) for part in (run_seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
