"""Progress of a run for whoever watches: a live panel on a terminal, one plain line per step elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, TextIO

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sgpo.reporting.run_files import Phase

# label, key, format: for all phases at once, because a row shows only what it holds.
_FIELDS = (
    ("accuracy without strategy", "accuracy_auto", ".3f"),
    ("with strategy", "accuracy_guided", ".3f"),
    ("accuracy", "accuracy", ".3f"),
    ("low", "accuracy_low", ".3f"),
    ("high", "accuracy_high", ".3f"),
    ("with strategy", "guided_accuracy", ".3f"),
    ("k", "k", ".0f"),
    ("alpha", "alpha_mean", ".3f"),
    ("KL", "kl_mean", ".3f"),
    ("KL kept", "kl_kept_mean", ".3f"),
    ("masked", "kl_masked_share", ".1%"),
    ("entropy", "entropy", ".3f"),
    ("length", "length", ".0f"),
    ("length without strategy", "length_auto", ".0f"),
    ("length with strategy", "length_guided", ".0f"),
    ("truncated", "truncated", ".1%"),
    ("epoch", "epoch", ".2f"),
    ("loss", "loss", ".4f"),
    ("validation loss", "val_loss", ".4f"),
    ("lr", "lr", ".2e"),
    ("grad norm", "grad_norm", ".3f"),
    ("tokens/s", "rollout_tokens_per_s", ",.0f"),
    ("step s", "step_s", ".1f"),
)


_TRENDS = (
    ("train", "accuracy_auto", "without strategy"),
    ("train", "accuracy_guided", "with strategy"),
    ("eval", "accuracy", "held-out accuracy"),
)


_TREND_STEPS = 10  # the trend compares the mean of the last ten steps with that of the ten before


_SPARK_WIDTH = 30


_ETA_MARKS = 20


def _fields(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, formatted value) of every number that `values` holds and that the display knows."""
    return [
        (label, format(values[key], spec)) for label, key, spec in _FIELDS if isinstance(values.get(key), int | float)
    ]


def sparkline(shares: Sequence[float], *, ascii_only: bool = False) -> str:
    """One character per value in 0..1, on the fixed scale 0..1: what looks flat is flat. A NaN is a blank."""
    marks = "_.-=+*#@" if ascii_only else "▁▂▃▄▅▆▇█"
    return "".join(
        " " if math.isnan(share) else marks[min(int(min(max(share, 0.0), 1.0) * len(marks)), len(marks) - 1)]
        for share in shares
    )


def _trend(shares: Sequence[float]) -> str:
    """Mean of the last ten values minus that of the ten before, or nothing while there are fewer than twenty."""
    if len(shares) < 2 * _TREND_STEPS:
        return ""
    last = sum(shares[-_TREND_STEPS:])
    before = sum(shares[-2 * _TREND_STEPS : -_TREND_STEPS])
    return f"{(last - before) / _TREND_STEPS:+.3f}"


@dataclass(frozen=True, slots=True)
class _Stage:
    name: str
    total: int | None
    started: float
    done: int = 0
    tokens: int = 0


class LiveDisplay:
    """Progress of one loop (warm-up or training): a live panel on a terminal, one plain line per step elsewhere.

    Use as a context manager. Values that are missing, None or text are left out; no call raises because of them.

    Args:
        total_steps: steps of the whole loop, for "k/N" and the time left.
        title: shown on the panel, usually the name of the run.
        console: where to draw; standard output by default.
        is_main: False on every rank but one; such a display shows nothing.
        clock: seconds from an arbitrary origin.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        title: str = "sgpo",
        console: Console | None = None,
        is_main: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        console = console or Console()
        self._total_steps = total_steps
        self._title = title
        self._is_main = is_main
        self._clock = clock
        self._file: TextIO = console.file  # type: ignore[assignment]
        self._ascii_only = not console.encoding.lower().startswith("utf")
        # rich draws from a second thread: every field below is replaced as a whole and never changed in place.
        self._stage = _Stage("start", None, clock())
        self._step = 0
        self._latest: dict[str, dict[str, Any]] = {}
        self._history: dict[str, tuple[float, ...]] = {}
        self._marks: tuple[tuple[int, float], ...] = ()  # (step, clock) of the latest reports
        # The stream is asked, not rich: FORCE_COLOR makes rich see a terminal in a log file.
        is_live = is_main and self._file.isatty() and not console.is_dumb_terminal
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4) if is_live else None

    def __enter__(self) -> LiveDisplay:
        if self._live is not None:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def stage(self, name: str, total: int | None = None) -> None:
        """A new stage of the step begins ("rollout", "score", "train", "sync", "eval", "warmup"), of `total` items."""
        self._stage = _Stage(name, total, self._clock())

    @property
    def where(self) -> str:
        """The step under way, counted from 1, and its stage."""
        return f"step {self._step + 1}, stage {self._stage.name}"

    def advance(self, done: int, tokens: int = 0) -> None:
        """Items and tokens finished since the stage began, as counts so far (a rollout engine's on_progress fits)."""
        stage = self._stage
        self._stage = _Stage(stage.name, stage.total, stage.started, done, tokens)

    def step(self, step: int, values: Mapping[str, Any], phase: Phase = "train") -> None:
        """Step `step` (counted from 1) is over with these metrics; an "eval" row does not count for the time left."""
        self._latest = {**self._latest, phase: dict(values)}
        for trend_phase, key, _ in _TRENDS:
            if phase == trend_phase and isinstance(values.get(key), int | float):
                self._history = {**self._history, key: (*self._history.get(key, ()), values[key])[-_SPARK_WIDTH:]}
        if phase != "eval":
            self._step = step
            self._marks = (*self._marks, (step, self._clock()))[-_ETA_MARKS:]
        if self._is_main and self._live is None:
            print(self._plain_line(step, values, phase), file=self._file, flush=True)

    def _eta(self) -> str:
        """Time left as h:mm:ss at the pace of the latest reports; "?" before the second one."""
        if not self._marks or self._marks[-1][0] <= self._marks[0][0]:
            return "?"
        # Over steps, not reports: a loop may report every tenth step only, and a resumed one does not begin at 0.
        (first, started), (last, ended) = self._marks[0], self._marks[-1]
        seconds = (ended - started) / (last - first) * max(self._total_steps - last, 0)
        return str(timedelta(seconds=round(seconds)))

    def _plain_line(self, step: int, values: Mapping[str, Any], phase: str) -> str:
        cells = [f"{phase} {step}/{self._total_steps}", *(f"{label} {text}" for label, text in _fields(values))]
        return " | ".join([*cells, f"ETA {self._eta()}"])

    def _render(self) -> Panel:
        rows: list[RenderableType] = [self._header(), *self._trend_rows()]
        for phase, values in self._latest.items():
            cells = [Text.assemble((f"{label} ", "dim"), text) for label, text in _fields(values)]
            rows.append(Columns([Text(phase, style="cyan"), *cells], padding=(0, 2), equal=True))
        return Panel(Group(*rows), title=Text(self._title), title_align="left", border_style="dim")

    def _header(self) -> Table:
        stage = self._stage
        elapsed_s = self._clock() - stage.started
        rate = f"{stage.tokens / elapsed_s:,.0f} tok/s" if stage.tokens and elapsed_s > 0 else ""
        count = f"{stage.done}/{stage.total}" if stage.total else f"{elapsed_s:.0f} s"
        grid = Table.grid(padding=(0, 2))
        grid.add_row(
            Text(f"step {self._step}/{self._total_steps}", style="bold"),
            Text(stage.name, style="cyan"),
            ProgressBar(total=stage.total, completed=stage.done, width=24, pulse=stage.total is None),
            Text(count),
            Text(rate),
            Text(f"ETA {self._eta()}"),
        )
        return grid

    def _trend_rows(self) -> list[RenderableType]:
        grid = Table.grid(padding=(0, 2))
        for _, key, label in _TRENDS:
            shares = self._history.get(key, ())
            if shares:
                spark = Text(sparkline(shares, ascii_only=self._ascii_only), style="green")
                grid.add_row(Text(label), Text(f"{shares[-1]:.3f}", style="bold"), spark, Text(_trend(shares)))
        return [grid] if grid.row_count else []
