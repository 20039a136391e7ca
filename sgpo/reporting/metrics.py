"""Where the numbers of a run go: metrics.jsonl, TensorBoard, wandb, sampled rollouts and the live display.

Every file is JSON Lines: one object per line, flushed line by line, so that a crash costs at most the line being
written. A resumed run drops the rows beyond its checkpoint, and a straight run and a resumed one leave the same file.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO, TypeAlias, get_args

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sgpo.types import Kind, SgpoError

Phase = Literal["warmup", "train", "eval"]
Value: TypeAlias = float | int | str | None

METRICS_FILE = "metrics.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"
TRAJECTORIES_FILE = "trajectories.jsonl"
PROFILE_FILE = "profile/steps.jsonl"


# ---- JSON Lines ----------------------------------------------------------------------------------------------------


def iter_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yields the objects of a JSON Lines file in order; a last line torn by a crash is left out.

    Torn means: without its newline and not valid JSON. Any other bad line raises SgpoError with file and line.
    """
    path = Path(path)
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise SgpoError(f"{path}: file not found; expected a JSON Lines file written by a run") from None
    with file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError:  # JSONDecodeError and UnicodeDecodeError
                if not line.endswith(b"\n"):
                    return
                raise SgpoError(f"{path}:{number}: not valid JSON; repair or delete this line") from None
            if not isinstance(row, dict):
                raise SgpoError(f"{path}:{number}: expected a JSON object, got {type(row).__name__}; fix this line")
            yield row


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """All rows of a JSON Lines file; tolerance and errors as in `iter_jsonl`."""
    return list(iter_jsonl(path))


def _finite(value: Any) -> Any:
    """The value with every non-finite float, also inside lists and dicts, replaced by None (JSON has no NaN)."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _encode(row: Mapping[str, Any]) -> bytes:
    return json.dumps(_finite(row), allow_nan=False).encode() + b"\n"


def _rewrite_jsonl(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Keeps the rows that `keep` accepts, drops a torn last line; the old file stands until the new one is whole."""
    if not path.exists():
        return
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        for row in iter_jsonl(path):
            if keep(row):
                file.write(_encode(row))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class _JsonlWriter:
    """Appends rows to one file; opening it repairs what a crash or a rolled-back step left at its end."""

    def __init__(self, path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _rewrite_jsonl(path, keep)
        self._file = path.open("ab")

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.write(_encode(row))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


# ---- metrics -------------------------------------------------------------------------------------------------------


class MetricsLogger:
    """Writes one row of metrics per step and phase to run_dir/metrics.jsonl, and to TensorBoard and wandb on request.

    Args:
        run_dir: the folder of the run; created if absent.
        tensorboard: also write run_dir/tensorboard/<phase>/, tags "<phase>/<key>".
        wandb_project: also log to this Weights & Biases project; a resumed run goes on in the same wandb run.
        is_main: False on every rank but one; such a logger accepts all calls and writes nothing.
        resume_step: last step to keep per phase, e.g. {"train": 40, "eval": 40}; rows beyond it are dropped, -1 drops
            the phase altogether. A phase that is not named keeps all its rows. wandb cannot drop what it was sent.

    Raises:
        SgpoError: tensorboard or wandb was asked for and is not installed, or an existing metrics.jsonl is damaged.
        ValueError: a phase other than "warmup", "train", "eval".
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        tensorboard: bool = False,
        wandb_project: str | None = None,
        is_main: bool = True,
        resume_step: Mapping[str, int] | None = None,
    ) -> None:
        self._run_dir = Path(run_dir)
        self._resume_step = dict(resume_step or {})
        for phase in self._resume_step:
            _check_phase(phase)
        self._jsonl: _JsonlWriter | None = None
        self._tensorboard: Callable[[str], Any] | None = None
        self._tensorboard_writers: dict[str, Any] = {}
        self._wandb: Any = None
        if is_main:
            self._jsonl = _JsonlWriter(self._run_dir / METRICS_FILE, self._keep)
            self._tensorboard = self._tensorboard_factory() if tensorboard else None
            self._wandb = _start_wandb(wandb_project, self._run_dir) if wandb_project else None

    def log(self, phase: Phase, step: int, values: Mapping[str, Value]) -> None:
        """One row: {"phase": phase, "step": step, **values}. Floats that are not finite become null in the file.

        Raises ValueError for an unknown phase or for a value named "phase" or "step".
        """
        _check_phase(phase)
        if "phase" in values or "step" in values:
            raise ValueError('the names "phase" and "step" belong to the row itself; rename the value')
        if self._jsonl is None:
            return
        self._jsonl.write({"phase": phase, "step": step, **values})
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        self._log_tensorboard(phase, step, numbers)
        if self._wandb is not None:
            # Phases count their own steps, while wandb wants one step that only grows: so it is a plain column here.
            self._wandb.log({f"{phase}/step": step, **{f"{phase}/{key}": value for key, value in numbers.items()}})

    def close(self) -> None:
        """Flushes and closes every sink; a second call does nothing."""
        if self._jsonl is not None:
            self._jsonl.close()
            self._jsonl = None
        for writer in self._tensorboard_writers.values():
            writer.close()
        self._tensorboard_writers = {}
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _keep(self, row: dict[str, Any]) -> bool:
        last = self._resume_step.get(row["phase"])
        return last is None or row["step"] <= last

    def _tensorboard_factory(self) -> Callable[[str], Any]:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise SgpoError(
                "tensorboard logging is on but the tensorboard package is not installed; "
                "run `pip install tensorboard` or switch it off"
            ) from None

        def open_writer(phase: str) -> Any:
            last = self._resume_step.get(phase)
            # One folder per phase, because purge_step hides every later event of its folder whatever its tag.
            return SummaryWriter(
                str(self._run_dir / "tensorboard" / phase), purge_step=None if last is None else last + 1
            )

        return open_writer

    def _log_tensorboard(self, phase: str, step: int, numbers: Mapping[str, float]) -> None:
        if self._tensorboard is None:
            return
        if phase not in self._tensorboard_writers:
            self._tensorboard_writers[phase] = self._tensorboard(phase)
        for key, value in numbers.items():
            self._tensorboard_writers[phase].add_scalar(f"{phase}/{key}", value, step)
        self._tensorboard_writers[phase].flush()


def _check_phase(phase: str) -> None:
    if phase not in get_args(Phase):
        raise ValueError(f"phase: expected one of {get_args(Phase)}, got {phase!r}")


def _start_wandb(project: str, run_dir: Path) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SgpoError(
            f"wandb_project is {project!r} but the wandb package is not installed; "
            "run `pip install wandb` or leave wandb_project empty"
        ) from None
    id_file = run_dir / "wandb_id.txt"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(8), encoding="utf-8")
    run_id = id_file.read_text(encoding="utf-8").strip()
    run = wandb.init(project=project, name=run_dir.resolve().name, id=run_id, resume="allow", dir=str(run_dir))
    for phase in get_args(Phase):
        run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
    return run


# ---- samples -------------------------------------------------------------------------------------------------------


class RolloutTable:
    """Appends sampled rollouts to run_dir/rollouts.jsonl and per-token KL values to run_dir/trajectories.jsonl.

    `resume_step` is the last training step to keep (None keeps all); `is_main` as in `MetricsLogger`.
    """

    def __init__(self, run_dir: str | Path, *, is_main: bool = True, resume_step: int | None = None) -> None:
        def keep(row: dict[str, Any]) -> bool:
            return resume_step is None or row["step"] <= resume_step

        self._rollouts = _JsonlWriter(Path(run_dir) / ROLLOUTS_FILE, keep) if is_main else None
        self._trajectories = _JsonlWriter(Path(run_dir) / TRAJECTORIES_FILE, keep) if is_main else None

    def add_rollout(
        self,
        step: int,
        *,
        problem_id: str,
        kind: Kind,
        reward: float,
        status: str,
        truncated: bool,
        is_target: bool,
        text: str,
        **extra: Any,
    ) -> None:
        """One sampled completion; `is_target` marks the o+ of its problem; `extra` is any further JSON value."""
        if self._rollouts is not None:
            self._rollouts.write(
                {
                    "step": step,
                    "problem_id": problem_id,
                    "kind": kind,
                    "reward": reward,
                    "status": status,
                    "truncated": truncated,
                    "is_target": is_target,
                    "text": text,
                    **extra,
                }
            )

    def add_trajectory(
        self,
        step: int,
        *,
        problem_id: str,
        tokens: Sequence[str],
        kl: Sequence[float],
        masked: Sequence[bool],
        max_token_kl: float | None,
    ) -> None:
        """The target of one problem, token by token: its text, its KL in nats before the mask, masked or not.

        `max_token_kl` is the threshold delta, None where the run has none. Raises ValueError if the lengths differ.
        """
        if not len(tokens) == len(kl) == len(masked):
            raise ValueError(
                f"tokens, kl and masked: expected equal lengths, got {len(tokens)}, {len(kl)} and {len(masked)}"
            )
        if self._trajectories is not None:
            self._trajectories.write(
                {
                    "step": step,
                    "problem_id": problem_id,
                    "tokens": list(tokens),
                    "kl": list(kl),
                    "masked": list(masked),
                    "max_token_kl": max_token_kl,
                }
            )

    def close(self) -> None:
        for writer in (self._rollouts, self._trajectories):
            if writer is not None:
                writer.close()
        self._rollouts = self._trajectories = None

    def __enter__(self) -> RolloutTable:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


# ---- live display --------------------------------------------------------------------------------------------------

# label, key, format: for all phases at once, because a row shows only what it holds.
_FIELDS = (
    ("auto accuracy", "accuracy_auto", ".3f"),
    ("guided accuracy", "accuracy_guided", ".3f"),
    ("accuracy", "accuracy", ".3f"),
    ("low", "accuracy_low", ".3f"),
    ("high", "accuracy_high", ".3f"),
    ("guided", "guided_accuracy", ".3f"),
    ("k", "k", ".0f"),
    ("alpha", "alpha_mean", ".3f"),
    ("KL", "kl_mean", ".3f"),
    ("KL kept", "kl_kept_mean", ".3f"),
    ("masked", "kl_masked_share", ".1%"),
    ("entropy", "entropy", ".3f"),
    ("length", "length", ".0f"),
    ("auto length", "length_auto", ".0f"),
    ("guided length", "length_guided", ".0f"),
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
    ("train", "accuracy_auto", "auto accuracy"),
    ("train", "accuracy_guided", "guided accuracy"),
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
