"""How many entries and columns narrow logits have to compute again, and what that would cost on an H100.

    python -m benchmarks.narrow_times benchmarks/results/narrow_logits.jsonl

Estimates from measured rates (`results/gpu_h100_products.txt`, the stages in README.md), not measurements.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.narrow_formats import FORMATS, Format

CHUNK, HOT = 1024, 5


class Wanted:
    """How many rows of a chunk want each column, by distance."""

    def __init__(self, vocab: int, distances: Iterable[int]) -> None:
        self.counts = {d: torch.zeros(vocab) for d in distances}
        self.rows = 0

    def add(self, distance: Tensor) -> None:
        self.rows += len(distance)
        for d, count in self.counts.items():
            count += (distance < d).sum(0)

    def shares(self, d: int) -> dict[str, float]:
        count = self.counts[d]
        hot = count >= HOT
        each = {"entries": count.mean() / self.rows, "columns": (count > 0).float().mean()}
        each |= {"hot_columns": hot.float().mean(), "loose_entries": count[~hot].sum() / len(count) / self.rows}
        return {key: float(value) for key, value in each.items()}


def estimate(shares: dict[str, float], form: Format) -> dict[str, float]:
    """ms on an H100 for 8192 + 1024 rows (10240 with both contexts) at the 7B head, of known rates, nothing measured.

    bf16: product and passes over the logits of live mode as measured. Narrow: fp8 product at 1165 (float32 out) or 1364
    TFLOP/s (bfloat16 out), int8 at 679; the head's rounding once a step; the same passes and one that chooses, by their
    width in bytes; exact: gathered columns (copied, then at 722 TFLOP/s), loose entries by reading a head row each.
    `entries`, `columns`: the exact pass, had it only loose entries or only columns. The copy's speed is 2.96 TB/s.
    """
    rows, hidden, vocab = 10240, 3584, 152064
    product, width = 2e-9 * rows * hidden * vocab, 2 if form.bf16_out else 4
    passes, sweep = 4.37, width * rows * vocab / 2.96e9
    column = product / 722 + math.ceil(rows / CHUNK) * 4 * hidden * vocab / 2.96e9
    entry = 2 * rows * vocab * hidden / 2.96e9
    rate = {0.0: 722, 127.0: 679}.get(form.largest, 1364 if form.bf16_out else 1165)
    found = {"product": product * (1 + 2 * form.split * form.pairs / hidden) / rate}
    rounding = 3 * hidden * vocab / 2.96e9 if form.largest else 0.0
    found |= {"rounding": rounding, "passes": passes * width / 4, "choosing": sweep}
    found["exact"] = shares["hot_columns"] * column + shares["loose_entries"] * entry
    narrow, bf16 = sum(found.values()), product / 722 + passes
    found |= {"narrow": narrow, "bf16": bf16, "saved": bf16 - narrow}
    return found | {"entries": shares["entries"] * entry, "columns": shares["columns"] * column}


def times(path: Path) -> Iterator[str]:
    """A line per format and distance of a file's policy rows."""
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        for distance, shares in row.get("shares", {}).items():
            found = {key: round(value, 1) for key, value in estimate(shares, FORMATS[row["format"]]).items()}
            yield f"{row['source']['kind']} {row['source'].get('model', '')} {row['format']} {distance}: {found}"


if __name__ == "__main__":
    print(*times(Path(sys.argv[1])), sep="\n")
