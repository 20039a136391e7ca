"""From samples to statements: avg@k and pass@k with their intervals, and the paired comparison of two evaluations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sgpo.evaluation.sample_log import Samples, differences, read_samples
from sgpo.types import RewardResult, SgpoError
from sgpo.utils.statistics import bootstrap_interval, nested_bootstrap_interval, pass_at_k, permutation_p_value

Interval = tuple[float, float]

_EXPECTED_DIFFERENCES = frozenset({"model", "model_path", "dtype"})


@dataclass(frozen=True, slots=True)
class PassRate:
    """pass@k: the chance that one of k samples is correct, with its 95 % interval."""

    k: int
    value: float
    interval: Interval


@dataclass(frozen=True, slots=True)
class Score:
    """`accuracy` is avg@samples: the mean over problems of the share of correct samples.

    interval: 95 %, bootstrap over problems. nested_interval: over problems and, within each, samples.
    pass_at: for k = 1, 2, 4, ... and k = samples. length: mean tokens. statuses: samples by status of their result.
    """

    problems: int
    samples: int
    accuracy: float
    interval: Interval
    nested_interval: Interval
    pass_at: tuple[PassRate, ...]
    length: float
    truncated: float
    statuses: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        """All fields, for summary.json."""
        return asdict(self)

    def sentence(self) -> str:
        """One line for the terminal."""
        passes = "  ".join(f"pass@{rate.k} {rate.value:.4f}" for rate in self.pass_at if rate.k > 1)
        odd = "  ".join(f"{status} {count}" for status, count in self.statuses.items() if status != "ok")
        return "  ".join(
            filter(
                None,
                (
                    f"avg@{self.samples} {self.accuracy:.4f}  95% over problems {_brackets(self.interval)}, "
                    f"over problems and samples {_brackets(self.nested_interval)}",
                    passes,
                    f"{self.problems} problems  length {self.length:.1f}  truncated {self.truncated:.3f}",
                    odd,
                ),
            )
        )


@dataclass(frozen=True, slots=True)
class Comparison:
    """B against A on the same problems. `difference` is avg@k of B minus that of A.

    interval: 95 %, bootstrap over problems. p_value: two-sided permutation test of no difference. wins, losses, ties:
    problems on which B was right more often than A, less often, as often.
    """

    benchmark: str
    problems: int
    accuracy_a: float
    accuracy_b: float
    difference: float
    interval: Interval
    p_value: float
    wins: int
    losses: int
    ties: int
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """All fields, for the file of --out."""
        return asdict(self)

    def sentence(self) -> str:
        """One line for the terminal."""
        text = (
            f"{self.benchmark}: {self.accuracy_a:.4f} -> {self.accuracy_b:.4f}, difference {self.difference:+.4f}, 95% "
            f"{_brackets(self.interval)}, permutation p = {self.p_value:.4f}, {self.problems} problems: {self.wins} "
            f"better, {self.losses} worse, {self.ties} equal"
        )
        return text + (f" (settings differ: {'; '.join(self.notes)})" if self.notes else "")


def score(samples: Samples, *, seed: int, leave_out: Collection[str] = ()) -> Score:
    """The score of a file of samples, all problems of which have equally many; `leave_out` are ids not to count.

    A sample is correct where its reward is above the setting's correct_above.

    Raises:
        SgpoError: samples are missing, or none are left.
    """
    correct = {name: rows for name, rows in _correct(samples).items() if name not in leave_out}
    if not correct:
        raise SgpoError(f"{samples.path} has no problem left to score; use another benchmark or keep all of its rows")
    rows = [row for (name, _), row in samples.rows.items() if name in correct]
    table = [correct[name] for name in sorted(correct)]
    k = len(table[0])
    means = [sum(row) / k for row in table]
    return Score(
        problems=len(table),
        samples=k,
        accuracy=sum(means) / len(means),
        interval=bootstrap_interval(means, seed=seed),
        nested_interval=nested_bootstrap_interval(table, seed=seed),
        pass_at=tuple(_pass_rate(table, at, seed) for at in _powers(k)),
        length=sum(row["tokens"] for row in rows) / len(rows),
        truncated=sum(row["truncated"] for row in rows) / len(rows),
        statuses=dict(Counter(row.get("status", "ok") for row in rows).most_common()),
    )


def compare(a: Samples, b: Samples, *, seed: int = 0) -> Comparison:
    """The paired comparison of two finished evaluations of the same problems.

    Raises:
        SgpoError: the two are over different problems, or one is unfinished.
    """
    name = b.setting.get("benchmark", b.path.stem)
    if (first := a.setting.get("benchmark", name)) != name:
        raise SgpoError(f"{a.path} is over {first} and {b.path} over {name}: only the same problems can be compared")
    correct_a, correct_b = _correct(a), _correct(b)
    if odd := sorted(correct_a.keys() ^ correct_b.keys()):
        raise SgpoError(
            f"{a.path} and {b.path} are over different problems ({len(odd)} are in one only, first {odd[0]!r}): "
            "evaluate both on the same rows"
        )
    if a.setting.get("problems") != b.setting.get("problems"):
        raise SgpoError(
            f"{a.path} and {b.path} are over different problems: the ids agree, but texts or answers do not; "
            "evaluate both on the same rows"
        )
    pairs = [(_mean(correct_a[key]), _mean(correct_b[key])) for key in sorted(correct_a)]
    gaps = [after - before for before, after in pairs]
    return Comparison(
        benchmark=name,
        problems=len(pairs),
        accuracy_a=_mean([before for before, _ in pairs]),
        accuracy_b=_mean([after for _, after in pairs]),
        difference=_mean(gaps),
        interval=bootstrap_interval(gaps, seed=seed),
        p_value=permutation_p_value(gaps, seed=seed),
        wins=sum(gap > 0 for gap in gaps),
        losses=sum(gap < 0 for gap in gaps),
        ties=sum(gap == 0 for gap in gaps),
        notes=tuple(
            text for text in differences(a.setting, b.setting) if text.split(":")[0] not in _EXPECTED_DIFFERENCES
        ),
    )


def compare_files(a: Path, b: Path, *, seed: int = 0) -> list[Comparison]:
    """The comparison of two files, or of the benchmarks that two folders of `sgpo eval` have in common."""
    if a.is_dir() and b.is_dir():
        names = sorted({path.name for path in a.glob("*.jsonl")} & {path.name for path in b.glob("*.jsonl")})
        if not names:
            raise SgpoError(f"{a} and {b} have no benchmark in common; give two folders that sgpo eval wrote")
        return [compare(read_samples(a / name), read_samples(b / name), seed=seed) for name in names]
    return [compare(read_samples(a), read_samples(b), seed=seed)]


def _correct(samples: Samples) -> dict[str, list[float]]:
    """1.0 or 0.0 of every sample, by problem; SgpoError where some are missing."""
    table: dict[str, list[float]] = {}
    above = samples.setting.get("correct_above", 0.0)
    for (name, _), row in sorted(samples.rows.items()):
        result = RewardResult(row["reward"], row.get("status", "ok"), above)
        table.setdefault(name, []).append(float(result.is_correct))
    k = samples.setting.get("samples", max(map(len, table.values()), default=0))
    wanted = samples.setting.get("problem_count", len(table)) * k
    if len(samples.rows) != wanted or any(len(row) != k for row in table.values()) or not table:
        raise SgpoError(
            f"{samples.path} is unfinished: {len(samples.rows)} of {wanted or 'its'} samples are there; give the "
            "command that wrote it again"
        )
    return table


def _pass_rate(table: Sequence[Sequence[float]], k: int, seed: int) -> PassRate:
    rates = [pass_at_k(round(sum(row)), len(row), k) for row in table]
    return PassRate(k, _mean(rates), bootstrap_interval(rates, seed=seed))


def _powers(top: int) -> list[int]:
    return [*(2**i for i in range(top.bit_length()) if 2**i < top), top]


def _brackets(interval: Interval) -> str:
    return f"[{interval[0]:.4f}, {interval[1]:.4f}]"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
