"""Logits of a narrow product (fp8, int8), exact near each row's maximum: what that costs in accuracy and in time.

python -m benchmarks.narrow_logits --states own:FOLDER [--rows 1024] [--kl-rows 256] [--cache FILE.pt] --out FILE.jsonl
python -m benchmarks.narrow_logits --states calibrated --shape 896 151936 --out FILE.jsonl
python -m benchmarks.narrow_logits --quick
python -m benchmarks.narrow_times FILE.jsonl                  # what the shares of its rows would cost on an H100

On a CPU, by simulation: operands are rounded to the narrow format with their scales, multiplied in float32, and held
against products in fp64 of the same bfloat16 states and head. `distance` D: entries whose narrow logit is within D
nats of the row's largest narrow one, and the target's, are taken from the exact product; 0: none. In KL rows an entry
is exact on both sides if it is near on one. The rest, the tail, is multiplied by a factor:

  plain      1
  variance   e^-(m + s^2 / 2), mean m and variance s^2 of the row's noise from what rounding did to each operand
  band       sum of the exact over sum of the narrow e^z in the two nats above the tail, per row (pooled where few)

Formats: see `benchmarks.narrow_formats`; `float32` is today's product, `bf16_out` its logits rounded to bfloat16,
`fp8_both` is fp8_difference rounded likewise. Kinds of rows: policy, kl, and kl_near, whose teacher's
states are moved to 1 % of their distance. Errors of log-prob, entropy in nats; KL relative, by decades of the true KL;
dz, dH relative (Frobenius). `doubt` = tail's share times the band's root mean square noise, which a caller could be
given; `covered` the error over it. Per chunk of 1024 rows: shares of entries and of columns, and for the cheapest mix
the share of columns exact for all rows (wanted by at least HOT) and of entries gathered one by one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks import states as sources
from benchmarks.narrow_formats import FORMATS, Narrow
from benchmarks.narrow_times import CHUNK, Wanted
from benchmarks.states import HeadStates
from sgpo.types import SgpoError

STEP, BUCKETS, DISTANCES = 2, 8, (0, 4, 6, 8, 10, 12, 14)
BLOCK, FEW, NEAR = 32, 32, 0.01
DECADES = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
SHARES = torch.tensor([0.5, 0.99, 1.0], dtype=torch.float64)


def buckets(distance_RV: Tensor, values: list[Tensor]) -> Tensor:
    """Sums of the values by distance from the row's maximum in steps of STEP nats, the last open, [K, R, BUCKETS]."""
    place = distance_RV.div(STEP).clamp(0, BUCKETS - 1).long()
    return torch.stack([x.new_zeros(len(x), BUCKETS).scatter_add_(1, place, x) for x in values])


def factors(sums: Tensor, variance_R: Tensor, edge: int) -> Iterator[tuple[str, Tensor]]:
    """(name, factor of the tail [R]); sums: count, exact, narrow, each [R, BUCKETS]."""
    yield "plain", torch.ones_like(variance_R)
    yield "variance", variance_R.exp()
    if not edge:
        return
    count, exact, narrow = sums[..., edge - 1]
    pooled = exact.sum() / narrow.sum() if bool(exact.sum() > 0) else torch.ones(())
    yield "band", torch.where((count >= FEW) & (narrow > 0), exact / narrow, pooled.to(exact))


def quantiles(x: Tensor, prefix: str) -> dict[str, float]:
    return dict(
        zip((f"{prefix}_p50", f"{prefix}_p99", f"{prefix}_max"), x.double().quantile(SHARES).tolist(), strict=True)
    )


# the two kinds of rows


class Rows:
    """Collects per-row figures of one kind over blocks; `table[distance][correction][figure]` -> list of [R]."""

    def __init__(self) -> None:
        self.table: dict[int, dict[str, dict[str, list[Tensor]]]] = {}

    def add(self, distance: int, name: str, **figures: Tensor) -> None:
        found = self.table.setdefault(distance, {}).setdefault(name, {})
        for key, value in figures.items():
            found.setdefault(key, []).append(value)

    def result(self, distance: int, name: str) -> dict[str, Any]:
        found = {key: torch.cat(value) for key, value in self.table[distance][name].items()}
        row: dict[str, Any] = {key: _ratio(found, key) for key in ("dz", "dh") if f"{key}_lost" in found}
        if "logprob" in found:
            row |= {**quantiles(found["logprob"], "logprob"), **quantiles(found["entropy"], "entropy")}
            row |= {"logprob_mean": float(found["logprob_signed"].mean()), "tail_mean": float(found["tail"].mean())}
            kept = found["doubt"] > 1e-12
            row |= quantiles((found["logprob"] / found["doubt"])[kept], "covered") if bool(kept.any()) else {}
            return row | {"noise_mean": float(found["noise"].mean())}
        for low, high in itertools.pairwise(DECADES):
            inside = (found["kl"] >= low) & (found["kl"] < high)
            if int(inside.sum()) >= 5:
                row[f"kl_{low:.0e}"] = quantiles(found["kl_error"][inside], "error")
        return row


def _ratio(found: dict[str, Tensor], name: str) -> float:
    return float((found[f"{name}_lost"].sum() / found[f"{name}_size"].sum()).clamp(min=0).sqrt())


def dhidden(rows: Rows, d: int, name: str, lost: Tensor, dz: Tensor, head: Tensor) -> None:
    rows.add(d, name, dh_lost=(lost.float() @ head).square().sum(1), dh_size=(dz.float() @ head).square().sum(1))


def policy_block(rows: Rows, narrow: Narrow, hidden: Tensor, target: Tensor, head: Head, deep: bool) -> Tensor:
    """Adds the figures of some policy rows, with dH where `deep`; returns the distances [R, V] that entries have."""
    zn, variance = narrow.logits(hidden)
    z = hidden.double() @ head.exact
    top, at = z.amax(1, keepdim=True), target.unsqueeze(1)
    x, xn = z - top, zn - top
    e, n = x.exp(), xn.exp()
    distance = (zn.amax(1, keepdim=True) - zn).scatter_(1, at, 0.0)
    s = buckets(distance, [torch.ones_like(e), e, n, e * e, n * n, e * n, e * x, n * xn, (xn - x).square()])
    total = s[1].sum(1)
    p = e / total.unsqueeze(1)
    dz = p.scatter_add(1, at, -torch.ones_like(p[:, :1]))
    for d in DISTANCES:
        k = d // STEP
        near, tail = s[..., :k].sum(2), s[..., k:].sum(2)
        band = s[..., k - 1] if k else tail
        noise = (band[8] / band[0].clamp(min=1)).sqrt()
        for name, f in factors(s[:3], variance, k):
            sum_ = near[1] + f * tail[2]
            signed = total.log() - sum_.log() + (0.0 if k else (xn - x).gather(1, at).squeeze(1))
            mean = (near[6] + f * (tail[7] + f.log() * tail[2])) / sum_
            entropy = (sum_.log() - mean) - (total.log() - s[6].sum(1) / total)
            lost = near[3] * (1 / sum_ - 1 / total) ** 2
            lost = lost + f**2 * tail[4] / sum_**2 - 2 * f * tail[5] / (sum_ * total) + tail[3] / total**2
            share = f * tail[2] / sum_
            rows.add(d, name, logprob=signed.abs(), logprob_signed=signed, entropy=entropy.abs(), dz_lost=lost,
                     dz_size=dz.square().sum(1), tail=share, noise=noise, doubt=share * noise)  # fmt: skip
            if deep and name == "band":
                made = torch.where(distance < d, e, n * f.unsqueeze(1)) / sum_.unsqueeze(1)
                dhidden(rows, d, name, made - p, dz, head.plain)
    return distance


def kl_block(rows: Rows, narrow: Narrow, student: Tensor, teacher: Tensor, head: Head, deep: bool) -> None:
    """Adds the figures of some distillation rows."""
    one, other = narrow.logits(student), narrow.logits(teacher)
    if narrow.format.difference:
        other = (one[0] + narrow.logits(teacher - student)[0], one[1])
    z = [h.double() @ head.exact for h in (student, teacher)]
    tops = [y.amax(1, keepdim=True) for y in z]
    (x_s, x_t), (n_s, n_t) = ([y - top for y, top in zip(pair, tops, strict=True)] for pair in (z, (one[0], other[0])))
    distance = torch.minimum(*(y.amax(1, keepdim=True) - y for y in (n_s, n_t)))
    u, un = x_s - x_t, n_s - n_t
    es, et, ns, nt = (y.exp_() for y in (x_s, x_t, n_s, n_t))
    pairs = [a * b for a, b in ((es, es), (es, et), (et, et), (es, ns), (es, nt), (et, ns), (et, nt), (ns, ns),
                                (ns, nt), (nt, nt))]  # fmt: skip
    s = buckets(distance, [torch.ones_like(u), es, et, ns, nt, et * u, nt * un, *pairs])
    sum_s, sum_t = s[1].sum(1), s[2].sum(1)
    kl = sum_s.log() - sum_t.log() - s[5].sum(1) / sum_t
    gram = s[7:].sum(2)
    size = gram[0] / sum_s**2 - 2 * gram[1] / (sum_s * sum_t) + gram[2] / sum_t**2
    for d in DISTANCES:
        k = d // STEP
        near, tail = s[..., :k].sum(2), s[..., k:].sum(2)
        second = factors(s[[0, 1, 3] if narrow.format.difference else [0, 2, 4]], other[1], k)
        for (name, f), (_, g) in zip(factors(s[[0, 1, 3]], one[1], k), second, strict=True):
            a, b = near[1] + f * tail[3], near[2] + g * tail[4]
            found = a.log() - b.log() - (near[5] + g * (tail[6] + (f.log() - g.log()) * tail[4])) / b
            # dz' - dz is (1/a - 1/A) e_S - (1/b - 1/B) e_T near the maximum, f/a n_S - g/b n_T - e_S/A + e_T/B beyond.
            lost = _square(near[7:], (1 / a - 1 / sum_s, 1 / sum_t - 1 / b, 0 * f, 0 * f))
            lost = lost + _square(tail[7:], (-1 / sum_s, 1 / sum_t, f / a, -g / b))
            rows.add(d, name, kl=kl, kl_error=(found - kl).abs() / kl, dz_lost=lost, dz_size=size)
            if deep and name == "band":
                p_s, p_t = (torch.where(distance < d, y, c.unsqueeze(1) * w) / total.unsqueeze(1)
                            for y, w, c, total in ((es, ns, f, a), (et, nt, g, b)))  # fmt: skip
                dz = es / sum_s.unsqueeze(1) - et / sum_t.unsqueeze(1)
                dhidden(rows, d, name, p_s - p_t - dz, dz, head.plain)


def _square(gram: Tensor, by: tuple[Tensor, ...]) -> Tensor:
    """|sum of by_i v_i|^2 from the ten inner products of four vectors, [R]."""
    pairs = ((0, 0), (0, 1), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 2), (2, 3), (3, 3))
    return sum(((1 + (i != j)) * g * by[i] * by[j] for g, (i, j) in zip(gram, pairs, strict=True)), 0 * by[0])


# running


@dataclass(frozen=True)
class Head:
    """The head [V, H] in float32, its transpose in fp64."""

    plain: Tensor
    exact: Tensor


def measured(states: HeadStates, names: list[str], kl_rows: int) -> Iterator[dict[str, Any]]:
    """One row per format and kind of rows."""
    head = Head(states.head.float(), states.head.double().t().contiguous())
    hidden, student = states.policy_hidden.float(), states.distill_hidden[:kl_rows].float()
    teacher = states.teacher_hidden[:kl_rows].float()
    for name in names:
        narrow, deep = Narrow(name, head.plain, hidden), 64
        policy, wanted = Rows(), Wanted(len(head.plain), DISTANCES[1:])
        for start in range(0, len(hidden), BLOCK):
            part = slice(start, start + BLOCK)
            found = policy_block(policy, narrow, hidden[part], states.policy_targets[part], head, start < deep)
            if start < CHUNK:
                wanted.add(found)
        shares = {d: wanted.shares(d) for d in DISTANCES[1:]}
        yield {"format": name, "kind": "policy", "rows": len(hidden), "worst_logit_error": narrow.worst(hidden),
               "shares": shares, **_table(policy)}  # fmt: skip
        for kind, step in (("kl", 1.0), ("kl_near", NEAR)):
            rows = Rows()
            for start in range(0, len(student), BLOCK):
                h, t = student[start : start + BLOCK], teacher[start : start + BLOCK]
                kl_block(rows, narrow, h, h + step * (t - h), head, start < deep)
            yield {"format": name, "kind": kind, "rows": len(student), **_table(rows)}


def _table(rows: Rows) -> dict[str, Any]:
    return {"errors": {d: {name: rows.result(d, name) for name in found} for d, found in rows.table.items()}}


def _short(x: Any) -> Any:
    """Three digits of every number."""
    if isinstance(x, dict):
        return {key: _short(value) for key, value in x.items()}
    return float(f"{x:.3g}") if isinstance(x, float) else x


def line(row: dict[str, Any], distance: int = 10, name: str = "band") -> str:
    found = row["errors"][distance][name]
    keys = ("logprob_p99", "logprob_max", "entropy_p99", "dz", "dh")
    text = " ".join(f"{key} {found[key]:.1e}" for key in keys if found.get(key) is not None)
    kl = " ".join(f"{key} {value['error_p50']:.0e}/{value['error_max']:.0e}" for key, value in found.items()
                  if key.startswith("kl_"))  # fmt: skip
    shares = " ".join(f"{key} {100 * x:.2g} %" for key, x in row.get("shares", {}).get(distance, {}).items())
    return f"{row['format']:15} {row['kind']:8} {text} {kl} {shares}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", default="calibrated", help="own:FOLDER, real:FOLDER, calibrated or spread:RATIO")
    parser.add_argument("--shape", type=int, nargs=2, default=(896, 151936), metavar=("H", "V"))
    parser.add_argument("--data", type=Path, default=sources.DEFAULT_DATA)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--kl-rows", type=int, default=256)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--cache", type=Path, help=".pt file that keeps the model's states")
    parser.add_argument("--quick", action="store_true", help="small synthetic states, for a look at the output")
    parser.add_argument("--out", type=Path, default=Path("runs/narrow_logits.jsonl"))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.quick:
        options.states, options.shape, options.rows, options.kl_rows = "calibrated", (256, 2000), 64, 32
    (hidden, vocab), rows = options.shape, options.rows
    try:
        states = sources.make(options.states, hidden, vocab, rows, max(rows, options.kl_rows), dtype=torch.bfloat16,
                              device="cpu", seed=0, data=options.data, cache=options.cache)  # fmt: skip
    except SgpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    common = {"benchmark": "narrow_logits", "hidden": states.head.shape[1], "vocab": states.head.shape[0]}
    common |= {"source": states.source, "states": sources.summary(states, rows=options.kl_rows)}
    common |= measure.origin("cpu", "benchmarks.narrow_logits")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), options.out.open("a", encoding="utf-8") as file:
        for row in measured(states, options.formats, options.kl_rows):
            print(line(row, name="band"), flush=True)
            file.write(json.dumps(_short({**common, **row})) + "\n")
            file.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
