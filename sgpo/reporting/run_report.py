"""The report of a run: PNG plots in the manner of the paper's Figures 3 to 5 and one self-contained HTML page.

What a run did not log is left out with a sentence that says so; only a folder without metrics is an error.
"""

from __future__ import annotations

import base64
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from sgpo.reporting.metrics import METRICS_FILE, PROFILE_FILE, ROLLOUTS_FILE, TRAJECTORIES_FILE, iter_jsonl, read_jsonl
from sgpo.types import SgpoError

# Okabe and Ito's palette, told apart with any colour vision; the same thing has the same colour in every plot.
BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW, GREY = (
    "#0072B2", "#D55E00", "#009E73", "#AA4499", "#56B4E9", "#E69F00", "#777777",
)  # fmt: skip
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY, GREY)
STYLE: dict[Any, Any] = {
    "font.size": 10.0,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11.0,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}
DPI = 130
SMOOTH_FROM = 20  # shorter curves are drawn as they are
TOKENS_SHOWN = 60
TIME_BARS = 60


# ---- reading a run -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RunData:
    """The metrics of one run: rows by phase, then by step. Rows of one step are merged, the later value counts."""

    path: Path
    phases: dict[str, dict[int, dict[str, Any]]]

    def series(self, phase: str, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps (int64) and values (float64, NaN for null) of one metric; both empty if it never was a number."""
        rows = self.phases.get(phase, {})
        steps = [step for step in sorted(rows) if key in rows[step]]
        values = [_number(rows[step][key]) for step in steps]
        if all(math.isnan(value) for value in values):
            return np.empty(0, np.int64), np.empty(0)
        return np.array(steps, np.int64), np.array(values)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def load_run(run_dir: str | Path) -> RunData:
    """Reads run_dir/metrics.jsonl; raises SgpoError if it is absent, damaged or not a metrics file."""
    path = Path(run_dir) / METRICS_FILE
    if not path.exists():
        raise SgpoError(f"{run_dir}: no {METRICS_FILE} here; expected the folder of a run that has started")
    phases: dict[str, dict[int, dict[str, Any]]] = {}
    for number, row in enumerate(iter_jsonl(path), start=1):
        if "phase" not in row or "step" not in row:
            raise SgpoError(f'{path}:{number}: a row without "phase" and "step"; expected a file written by sgpo train')
        phases.setdefault(row["phase"], {}).setdefault(row["step"], {}).update(row)
    return RunData(Path(run_dir), phases)


# ---- drawing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Curve:
    key: str
    label: str
    color: str
    style: str = "-"


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes. `scale` is "share" (0 to 100 %), "zero" (from 0 up) or "free"."""

    ylabel: str
    curves: tuple[Curve, ...]
    scale: str = "free"


@dataclass(frozen=True, slots=True)
class Plot:
    name: str
    title: str
    panels: tuple[Panel, ...]
    phase: str = "train"


def _both_kinds(stem: str) -> tuple[Curve, Curve]:
    return Curve(f"{stem}_auto", "autonomous", BLUE), Curve(f"{stem}_guided", "guided", ORANGE)


ALPHAS = (Curve("alpha_mean", "after the cap", BLUE), Curve("alpha_uncapped_mean", "before the cap", GREY, "--"))
KLS = (Curve("kl_mean", "all tokens, before the mask", GREY, "--"), Curve("kl_kept_mean", "after the mask", BLUE))
SIGNALS = (
    Curve("zero_variance_share", "autonomous group all alike (no policy signal)", ORANGE),
    Curve("target_share", "with a target (a correct guided rollout)", BLUE),
)
LOSSES = (
    Curve("loss", "total", BLUE),
    Curve("loss_policy", "policy", ORANGE, "--"),
    Curve("loss_distill", "distillation", GREEN, "--"),
)
WARMUP_LOSSES = (Curve("loss", "training loss", BLUE), Curve("val_loss", "validation loss", ORANGE))

CURVES = (
    Plot("accuracy", "Accuracy of the sampled rollouts", (Panel("share correct", _both_kinds("accuracy"), "share"),)),
    Plot("entropy", "Entropy of the policy", (Panel("nats per token", (Curve("entropy", "entropy", BLUE),), "zero"),)),
    Plot(
        "length",
        "Response length",
        (Panel("tokens", _both_kinds("length"), "zero"), Panel("truncated", _both_kinds("truncated"), "share")),
    ),
    Plot(
        "alpha",
        "Weight of the distillation term",
        (
            Panel("mean alpha", ALPHAS, "zero"),
            Panel("problems with\nalpha above 0", (Curve("alpha_live_share", "alpha above 0", GREEN),), "share"),
        ),
    ),
    Plot(
        "kl",
        "KL between the guided and the plain context",
        (
            Panel("nats per token", KLS, "zero"),
            Panel("masked tokens", (Curve("kl_masked_share", "masked", ORANGE),), "share"),
        ),
    ),
    Plot("problems", "Problems that carry a signal", (Panel("share of problems", SIGNALS, "share"),)),
    Plot(
        "loss",
        "Loss and gradient norm",
        (Panel("loss", LOSSES), Panel("gradient norm", (Curve("grad_norm", "gradient norm", GREY),), "zero")),
    ),
    Plot("warmup", "Supervised warm-up", (Panel("nats per token", WARMUP_LOSSES),), "warmup"),
)
TIMES = (
    Curve("rollout_s", "rollout", BLUE),
    Curve("score_s", "score", YELLOW),
    Curve("target_s", "target", PURPLE),
    Curve("train_s", "train", GREEN),
    Curve("sync_s", "sync", ORANGE),
)
HELD_OUT = Curve("accuracy", "plain prompt", BLUE)
HELD_OUT_GUIDED = Curve("guided_accuracy", "guided prompt", ORANGE, "--")


def new_figure(title: str, panels: int = 1, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    """An empty figure of `panels` stacked axes that share x, the later ones lower. No pyplot, so no global state."""
    ratios = [2.0] + [1.0] * (panels - 1)
    figure = Figure(figsize=(7.4, height + 1.5 * (panels - 1)), dpi=DPI, layout="constrained")
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure, list(axes)


def legend(axes: Axes) -> None:
    """The legend above the axes, where it hides no data."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2, fontsize=9)


def _finish_steps(axes: Axes, phase: str, window: int) -> None:
    what = {"warmup": "warm-up step", "train": "training step", "eval": "training step"}[phase]
    axes.set_xlabel(what if window == 1 else f"{what} (smoothed: centred mean of {window} steps)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _set_scale(axes: Axes, scale: str) -> None:
    # The axis ends just above the data, also for shares, so that a masked share of 2 % is not a flat line.
    top = 1.06 * axes.dataLim.y1
    if scale == "share":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylim(0.0, min(max(top, 0.01), 1.02))
    elif scale == "zero":
        axes.set_ylim(0.0, top if top > 0.0 else 1.0)


def _window(points: int) -> int:
    """Width of the moving mean: odd, about a twentieth of the curve; 1 for a short curve."""
    return 1 if points < SMOOTH_FROM else 2 * (points // 40) + 3


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving mean over the finite values in reach; shorter at both ends, NaN where it sees nothing finite."""
    finite = np.isfinite(values)
    ones = np.ones(window)
    reach = window // 2
    total = np.convolve(np.where(finite, values, 0.0), ones)[reach : reach + len(values)]
    count = np.convolve(finite.astype(float), ones)[reach : reach + len(values)]
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def _draw_curve(axes: Axes, curve: Curve, steps: np.ndarray, values: np.ndarray, window: int) -> None:
    marker = "o" if len(steps) < SMOOTH_FROM else None
    if window > 1:
        axes.plot(steps, values, color=curve.color, alpha=0.3, linewidth=0.8)
        values = _smooth(values, window)
    axes.plot(steps, values, curve.style, color=curve.color, label=curve.label, marker=marker, markersize=4)


def draw_curves(run: RunData, plot: Plot) -> Figure | None:
    """The curves of `plot` over the steps; a panel without data is left out, None if all are."""
    found = [
        (panel, [(curve, *series) for curve in panel.curves if len((series := run.series(plot.phase, curve.key))[0])])
        for panel in plot.panels
    ]
    found = [(panel, curves) for panel, curves in found if curves]
    if not found:
        return None
    figure, all_axes = new_figure(plot.title, len(found))
    window = max(_window(len(steps)) for _, curves in found for _, steps, _ in curves)
    for axes, (panel, curves) in zip(all_axes, found, strict=True):
        for curve, steps, values in curves:
            _draw_curve(axes, curve, steps, values, window if len(steps) >= SMOOTH_FROM else 1)
        axes.set_ylabel(panel.ylabel)
        _set_scale(axes, panel.scale)
        if len(panel.curves) > 1:
            legend(axes)
    _finish_steps(all_axes[-1], plot.phase, window)
    return figure


def draw_held_out(run: RunData) -> Figure | None:
    """Held-out accuracy with the interval that evaluation logged (accuracy_low to accuracy_high)."""
    steps, accuracy = run.series("eval", HELD_OUT.key)
    if not len(steps):
        return None
    figure, (axes,) = new_figure("Held-out accuracy")
    axes.plot(steps, accuracy, color=BLUE, marker="o", markersize=4, label=HELD_OUT.label)
    rows = run.phases["eval"]
    low, high = (np.array([_number(rows[step].get(f"accuracy_{end}")) for step in steps]) for end in ("low", "high"))
    if np.isfinite(low + high).any():
        axes.errorbar(steps, (low + high) / 2, (high - low) / 2, fmt="none", ecolor=BLUE, alpha=0.6, capsize=3)
        axes.plot([], [], color=BLUE, alpha=0.6, marker="|", linestyle="", markersize=10, label="its interval")
    guided_steps, guided = run.series("eval", HELD_OUT_GUIDED.key)
    if len(guided_steps):
        axes.plot(guided_steps, guided, "--", color=ORANGE, marker="s", markersize=4, label=HELD_OUT_GUIDED.label)
    axes.set_ylabel("share correct")
    _set_scale(axes, "share")
    legend(axes)
    _finish_steps(axes, "eval", 1)
    return figure


def draw_times(run: RunData) -> Figure | None:
    """Seconds per step, stacked by phase; with many steps each bar is the mean of several."""
    rows = run.phases.get("train", {})
    steps = np.array(sorted(step for step, row in rows.items() if any(curve.key in row for curve in TIMES)))
    if not len(steps):
        return None
    parts = {
        curve.label: np.array([np.nan_to_num(_number(rows[step].get(curve.key))) for step in steps]) for curve in TIMES
    }
    whole = np.array([np.nan_to_num(_number(rows[step].get("step_s"))) for step in steps])
    parts["other"] = np.maximum(whole - sum(parts.values()), 0.0)
    bins = np.array_split(np.arange(len(steps)), min(len(steps), TIME_BARS))
    centres = np.array([steps[chosen].mean() for chosen in bins])
    widths = [0.9 * (steps[chosen[-1]] - steps[chosen[0]] + 1) for chosen in bins]
    figure, (axes,) = new_figure("Time per step")
    bottom = np.zeros(len(bins))
    for (label, seconds), color in zip(parts.items(), [*(curve.color for curve in TIMES), "#BBBBBB"], strict=True):
        height = np.array([seconds[chosen].mean() for chosen in bins])
        axes.bar(centres, height, widths, bottom=bottom, color=color, label=label)
        bottom += height
    axes.set_ylabel("seconds")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=6, borderaxespad=0.2, fontsize=9)
    _finish_steps(axes, "train", 1)
    if len(bins) < len(steps):
        axes.set_xlabel(f"training step (each bar: mean of about {round(len(steps) / len(bins))} steps)")
    return figure


def draw_memory(run_dir: Path) -> Figure | None:
    """Memory over the last profiled step, its stages as coloured ground; None for a run without --profile."""
    path = run_dir / PROFILE_FILE
    rows = read_jsonl(path) if path.exists() else []
    if not rows or not rows[-1]["memory"]:
        return None
    row = rows[-1]
    figure, (axes,) = new_figure(f"Memory over step {row['step']}")
    colors = {curve.label: curve.color for curve in TIMES}
    for name, start, end in row["stages"]:
        axes.axvspan(start, end, color=colors.get(name, GREY), alpha=0.15, linewidth=0, label=name)
    moments, mib = np.array(row["memory"]).T
    axes.plot(moments, mib, color="black", linewidth=1.2)
    axes.set_xlabel("seconds since the step began")
    axes.set_ylabel("MiB, allocated on the GPU" if row["device"] == "cuda" else "MiB, resident in the process")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=6, borderaxespad=0.2, fontsize=9)
    return figure


# ---- one trajectory (the paper's Figure 5) -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One target completion: token texts, KL in nats (float64 [T]), masked (bool [T]), threshold or None."""

    step: int
    problem_id: str
    tokens: list[str]
    kl: np.ndarray
    masked: np.ndarray
    max_token_kl: float | None


def load_trajectory(run_dir: Path) -> Trajectory | None:
    """The latest trajectory with a masked token, or else the latest; None if the run has none."""
    path = run_dir / TRAJECTORIES_FILE
    rows = [row for row in read_jsonl(path) if row["tokens"]] if path.exists() else []
    if not rows:
        return None
    row = next((row for row in reversed(rows) if any(row["masked"])), rows[-1])
    kl = np.array([_number(value) for value in row["kl"]])
    return Trajectory(
        row["step"], row["problem_id"], row["tokens"], kl, np.array(row["masked"], bool), row["max_token_kl"]
    )


def token_label(token: str) -> str:
    """A token as an axis label: spaces and newlines visible, dollars kept from starting a formula."""
    visible = token.replace("\n", "\\n").replace("\t", "\\t").replace(" ", "\u2423").replace("$", "\\$")
    return visible if len(visible) <= 14 else visible[:13] + "\u2026"


def _draw_tokens(axes: Axes, trajectory: Trajectory, first: int, last: int) -> None:
    """KL at the positions first..last-1, the masked ones in another colour, and the threshold line."""
    positions = np.arange(first, last)
    kl, masked = trajectory.kl[first:last], trajectory.masked[first:last]
    if last - first <= TOKENS_SHOWN:
        axes.bar(positions[~masked], kl[~masked], 0.8, color=BLUE, label="kept")
        axes.bar(positions[masked], kl[masked], 0.8, color=ORANGE, hatch="////", edgecolor="white", label="masked")
    else:  # thousands of bars are slow and thinner than a pixel; lines keep their width
        width = max(700.0 / (last - first), 0.8)
        axes.vlines(positions[~masked], 0.0, kl[~masked], color=BLUE, linewidth=width, label="kept")
        axes.vlines(positions[masked], 0.0, kl[masked], color=ORANGE, linewidth=width, label="masked")
        axes.set_ylim(bottom=0.0)
    if trajectory.max_token_kl is not None:
        label = f"threshold {trajectory.max_token_kl:g}"
        axes.axhline(trajectory.max_token_kl, color="black", linestyle="--", linewidth=1, label=label)
    axes.set_xlim(first - 0.6, last - 0.4)
    axes.set_ylabel("KL (nats)")


def draw_trajectory(trajectory: Trajectory) -> Figure:
    """KL token by token; of a long trajectory all of it, and below it the stretch around the largest KL by token."""
    count = len(trajectory.tokens)
    is_long = count > TOKENS_SHOWN
    title = f"KL token by token: problem {trajectory.problem_id}, step {trajectory.step}".replace("$", "\\$")
    figure = Figure(figsize=(11.0, 6.4 if is_long else 4.0), dpi=DPI, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    all_axes = list(figure.subplots(2 if is_long else 1, 1, squeeze=False)[:, 0])
    first = 0
    if is_long:
        peak = int(np.nanargmax(trajectory.kl)) if np.isfinite(trajectory.kl).any() else 0
        first = min(max(peak - TOKENS_SHOWN // 2, 0), count - TOKENS_SHOWN)
        _draw_tokens(all_axes[0], trajectory, 0, count)
        all_axes[0].axvspan(first - 0.5, first + TOKENS_SHOWN - 0.5, color=GREY, alpha=0.15, zorder=0)
        all_axes[0].set_xlabel("position in the completion (grey: the stretch below)")
    last = min(first + TOKENS_SHOWN, count)
    _draw_tokens(all_axes[-1], trajectory, first, last)
    legend(all_axes[0])
    axes = all_axes[-1]
    axes.set_xticks(range(first, last), [token_label(token) for token in trajectory.tokens[first:last]])
    axes.tick_params(axis="x", labelrotation=90, labelsize=8)
    axes.set_xlabel("token (\u2423 is a space)")
    axes.grid(axis="x", visible=False)
    return figure


# ---- several runs --------------------------------------------------------------------------------------------------


def _compared(key: str, title: str, ylabel: str, scale: str, phase: str = "train") -> Plot:
    return Plot(f"compare_{phase}_{key}", title, (Panel(ylabel, (Curve(key, key, BLUE),), scale),), phase)


COMPARED = (
    _compared("accuracy", "Held-out accuracy", "share correct", "share", "eval"),
    _compared("accuracy_auto", "Accuracy of the autonomous rollouts", "share correct", "share"),
    _compared("entropy", "Entropy of the policy", "nats per token", "zero"),
    _compared("length_auto", "Response length of the autonomous rollouts", "tokens", "zero"),
    _compared("zero_variance_share", "Autonomous groups without a policy signal", "share of problems", "share"),
    _compared("alpha_mean", "Weight of the distillation term", "mean alpha", "zero"),
)


def group_name(run_dir: str | Path) -> str:
    """The name that the seeds of one run share: "sgpo-seed3", "sgpo_s3" and "sgpo/seed3" all give "sgpo"."""
    path = Path(run_dir).resolve()
    if re.fullmatch(r"s(eed)?[-_=]?\d+", path.name, re.IGNORECASE):
        return path.parent.name
    return re.sub(r"[-_.]s(eed)?[-_=]?\d+$", "", path.name, flags=re.IGNORECASE)


def _shared_steps(runs: Sequence[RunData], phase: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps that every run has (int64 [S]) and their values (float64 [runs, S])."""
    each = [dict(zip(*run.series(phase, key), strict=True)) for run in runs]
    steps = sorted(set.intersection(*(set(values) for values in each)))
    return np.array(steps, np.int64), np.array([[values[step] for step in steps] for values in each])


def draw_comparison(groups: dict[str, list[RunData]], plot: Plot) -> Figure | None:
    """One curve per group: the mean over its runs at the steps all of them have, in a band from minimum to maximum."""
    panel, curve = plot.panels[0], plot.panels[0].curves[0]
    found = {name: _shared_steps(runs, plot.phase, curve.key) for name, runs in groups.items()}
    found = {name: (steps, values) for name, (steps, values) in found.items() if len(steps)}
    if not found:
        return None
    window = 1 if plot.phase == "eval" else max(_window(len(steps)) for steps, _ in found.values())
    figure, (axes,) = new_figure(plot.title)
    for index, (name, (steps, values)) in enumerate(found.items()):
        color = PALETTE[index % len(PALETTE)]
        values = np.array([_smooth(row, window) for row in values])
        label = name.replace("$", "\\$") + (f" (mean, min to max of {len(values)})" if len(values) > 1 else "")
        marker = "o" if len(steps) < SMOOTH_FROM else None
        axes.plot(steps, values.mean(axis=0), color=color, label=label, marker=marker, markersize=4)
        if len(values) > 1:
            axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=color, alpha=0.2, linewidth=0)
    axes.set_ylabel(panel.ylabel)
    _set_scale(axes, panel.scale)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, fontsize=9)
    _finish_steps(axes, plot.phase, window)
    return figure


# ---- HTML ----------------------------------------------------------------------------------------------------------

CSS = """
body{font:16px/1.5 system-ui,sans-serif;color:#222;background:#fff;max-width:1040px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin:0 0 .3rem} h2{font-size:1.2rem;margin:2.2rem 0 .6rem;border-bottom:1px solid #ddd}
img{max-width:100%;display:block;margin:1rem 0} .note{color:#666}
table{border-collapse:collapse;font-size:.9rem;display:block;overflow-x:auto}
th,td{padding:.25rem .8rem;text-align:left}
th{border-bottom:2px solid #ccc} td{border-bottom:1px solid #eee;vertical-align:top} td.n{text-align:right;
font-variant-numeric:tabular-nums} pre{background:#f6f7f8;padding:.8rem;overflow-x:auto;white-space:pre-wrap;
overflow-wrap:anywhere;font-size:.85rem;margin:.3rem 0} summary{cursor:pointer}
.tag{padding:0 .45em;border-radius:.5em;background:#eceff1;font-size:.85em} .right{background:#d5efe3}
.wrong{background:#fbe0d3} .target{background:#0072b2;color:#fff} .masked{text-decoration:underline wavy #d55e00}
"""


def page(title: str, subtitle: str, sections: Iterable[tuple[str, str]]) -> str:
    body = "\n".join(f"<section><h2>{escape(heading)}</h2>\n{content}</section>" for heading, content in sections)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{CSS}</style></head>\n<body><h1>{escape(title)}</h1>\n"
        f'<p class="note">{escape(subtitle)}</p>\n{body}\n</body></html>\n'
    )


def note(sentence: str) -> str:
    return f'<p class="note">{escape(sentence)}</p>'


def _text(value: Any) -> str:
    """A table cell: numbers with six significant digits, everything else as it is."""
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        return f"<td{' class=n' if isinstance(value, int | float) else ''}>{escape(_text(value))}</td>"

    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "\n".join("<tr>" + "".join(cell(value) for value in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _image(path: Path, alt: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def _save(draw: Callable[[], Figure | None], path: Path) -> bool:
    """Draws and writes one PNG; without data an older file of that name goes, and the answer is False."""
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the page shows such text as it is
        figure = draw()
        if figure is None:
            path.unlink(missing_ok=True)
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    return True


def plot_html(draw: Callable[[], Figure | None], path: Path, title: str, missing: str) -> str:
    return _image(path, title) if _save(draw, path) else note(f"{title}: left out, {missing}.")


def _missing(phase: str, plot: Plot) -> str:
    keys = ", ".join(curve.key for panel in plot.panels for curve in panel.curves)
    return f"{METRICS_FILE} holds no number for {keys} in phase {phase}"


def _summary_section(run_dir: Path) -> str:
    path = run_dir / "summary.json"
    if not path.exists():
        return note("summary.json is not there; a run writes it when it ends.")
    try:
        summary = json.loads(path.read_bytes())
    except ValueError:
        raise SgpoError(f"{path}: not valid JSON; repair or delete this file") from None
    if not isinstance(summary, dict):
        raise SgpoError(f"{path}: expected a JSON object, got {type(summary).__name__}; repair or delete this file")
    rows = [
        (key, json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value)
        for key, value in summary.items()
    ]
    return table(("name", "value"), rows)


def _config_section(run_dir: Path) -> str:
    path = run_dir / "config.yaml"
    if not path.exists():
        return note("config.yaml is not there.")
    text = path.read_text(encoding="utf-8")
    return f"<details><summary>config.yaml, as resolved</summary><pre>{escape(text)}</pre></details>"


def _metrics_section(run: RunData) -> str:
    parts = []
    for phase, by_step in run.phases.items():
        # Some values come only now and then, so first and last are looked up for each of them.
        values: dict[str, list[Any]] = {}
        for step in sorted(by_step):
            for key, value in by_step[step].items():
                values.setdefault(key, []).append(value)
        rows = [(key, each[0], each[-1]) for key, each in values.items() if key not in ("phase", "step")]
        heading = f"{phase}: steps {min(by_step)} to {max(by_step)}"
        parts.append(f"<h3>{escape(heading)}</h3>{table(('metric', 'first', 'last'), rows)}")
    return "\n".join(parts) or note(f"{METRICS_FILE} holds no rows yet.")


def _sample_rollouts(path: Path) -> tuple[int, list[dict[str, Any]]] | None:
    """The latest step whose rollouts hold a target, or else the latest step, with its rows; None without rollouts."""
    last = with_target = None
    for step, group in groupby(iter_jsonl(path), key=lambda row: row["step"]) if path.exists() else ():
        last = (step, list(group))
        if any(row["is_target"] for row in last[1]):
            with_target = last
    return with_target or last


def _rollout_html(row: dict[str, Any]) -> str:
    verdict = "right" if row["reward"] > 0 else "wrong"
    tags = [(row["kind"], ""), (f"reward {_text(row['reward'])}", verdict)]
    tags += [(row["status"], "")] if row["status"] != "ok" else []
    tags += [("truncated", "")] if row["truncated"] else []
    tags += [("chosen target", "target")] if row["is_target"] else []
    line = " ".join(f'<span class="tag {style}">{escape(str(text))}</span>' for text, style in tags)
    is_open = " open" if row["is_target"] else ""
    return f"<details{is_open}><summary>{line}</summary><pre>{escape(row['text'])}</pre></details>"


def _rollouts_section(run_dir: Path, problems: int = 3, per_kind: int = 3) -> str:
    """A few problems of one step, those with a target first; per problem the target and some of each kind."""
    sample = _sample_rollouts(run_dir / ROLLOUTS_FILE)
    if sample is None:
        return note(f"Left out, {ROLLOUTS_FILE} holds no rollouts.")
    step, rows = sample
    by_problem: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: not row["is_target"]):  # stable: targets first, else as sampled
        by_problem.setdefault(row["problem_id"], []).append(row)
    parts = [note(f"Samples of step {step}.")]
    for problem_id, group in list(by_problem.items())[:problems]:
        parts.append(f"<h3>Problem {escape(str(problem_id))}</h3>")
        for kind in ("guided", "auto"):
            parts += [_rollout_html(row) for row in group if row["kind"] == kind][:per_kind]
    return "\n".join(parts)


def _trajectory_text(trajectory: Trajectory) -> str:
    """The completion itself, each token on a ground as strong as its KL, the masked ones underlined."""
    scale = 2.0 * (trajectory.max_token_kl or 1.0)
    spans = []
    for token, kl, masked in zip(trajectory.tokens, trajectory.kl, trajectory.masked, strict=True):
        strength = 0.0 if math.isnan(kl) else min(kl / scale, 1.0) * 0.7
        mark = ' class="masked"' if masked else ""
        spans.append(
            f'<span{mark} style="background:rgba(230,159,0,{strength:.2f})" title="KL {kl:.3f}">{escape(token)}</span>'
        )
    words = "Each token on a ground as strong as its KL (the number shows on hover); masked tokens are underlined."
    return f"{note(words)}<pre>{''.join(spans)}</pre>"


def _trajectory_section(run_dir: Path) -> str:
    trajectory = load_trajectory(run_dir)
    path = run_dir / "plots" / "trajectory.png"
    title = "KL token by token"
    if trajectory is None:
        path.unlink(missing_ok=True)
        return note(f"{title}: left out, {TRAJECTORIES_FILE} holds no trajectory.")
    _save(lambda: draw_trajectory(trajectory), path)
    return _image(path, title) + _trajectory_text(trajectory)


def write_report(run_dir: str | Path) -> Path:
    """Writes run_dir/report.html (self-contained) and run_dir/plots/*.png from what the run has logged so far.

    Raises SgpoError if run_dir holds no metrics.jsonl, or if a file of the run is damaged.
    """
    run = load_run(run_dir)
    plots = run.path / "plots"

    def curves(plot: Plot) -> str:
        path = plots / f"{plot.name}.png"
        return plot_html(lambda: draw_curves(run, plot), path, plot.title, _missing(plot.phase, plot))

    held_out = Plot("held_out", "Held-out accuracy", (Panel("", (HELD_OUT,)),), "eval")
    times = Plot("times", "Time per step", (Panel("", TIMES),))
    images = [
        curves(CURVES[0]),
        plot_html(lambda: draw_held_out(run), plots / "held_out.png", held_out.title, _missing("eval", held_out)),
        *(curves(plot) for plot in CURVES[1:]),
        plot_html(lambda: draw_times(run), plots / "times.png", times.title, _missing("train", times)),
    ]
    if _save(lambda: draw_memory(run.path), plots / "memory.png"):
        images.append(_image(plots / "memory.png", "Memory over a step"))
    name = run.path.resolve().name
    counts = ", ".join(f"{len(rows)} {phase} rows" for phase, rows in run.phases.items()) or "no rows yet"
    sections = [
        ("Run", _summary_section(run.path) + _config_section(run.path)),
        ("Curves", "\n".join(images)),
        ("One trajectory", _trajectory_section(run.path)),
        ("Rollouts", _rollouts_section(run.path)),
        ("First and last metrics", _metrics_section(run)),
    ]
    report = run.path / "report.html"
    report.write_text(page(f"SGPO run {name}", f"From {METRICS_FILE}: {counts}.", sections), encoding="utf-8")
    return report


def _comparison_rows(groups: dict[str, list[RunData]]) -> Iterable[tuple[Any, ...]]:
    for name, runs in groups.items():
        steps, values = _shared_steps(runs, "eval", HELD_OUT.key)
        if len(steps):
            last = values[:, -1]
            yield name, len(runs), int(steps[-1]), float(last.mean()), float(last.min()), float(last.max())
        else:
            yield name, len(runs), None, None, None, None


def compare_runs(run_dirs: Sequence[str | Path], out: str | Path, names: Sequence[str] | None = None) -> Path:
    """Overlays several runs: writes out/compare.html (self-contained) and out/plots/compare_*.png.

    Args:
        run_dirs: folders of runs. Runs of one name are seeds: drawn as their mean in a band from minimum to maximum.
        out: folder for the comparison; created if absent.
        names: one name per run; by default `group_name` of its folder.

    Raises SgpoError if there are no runs, if the names do not match them, or if one has no metrics.jsonl.
    """
    names = [group_name(run_dir) for run_dir in run_dirs] if names is None else names
    if not run_dirs or len(names) != len(run_dirs):
        raise SgpoError(
            f"compare: got {len(run_dirs)} runs and {len(names)} names; give one name per run, and some runs"
        )
    groups: dict[str, list[RunData]] = {}
    for name, run_dir in zip(names, run_dirs, strict=True):
        groups.setdefault(name, []).append(load_run(run_dir))

    def image(plot: Plot) -> str:
        path = Path(out) / "plots" / f"{plot.name}.png"
        missing = f"no run name has {plot.panels[0].curves[0].key} at a step that all its runs share"
        return plot_html(lambda: draw_comparison(groups, plot), path, plot.title, missing)

    header = ("run", "seeds", "last shared step", "held-out accuracy", "lowest seed", "highest seed")
    sections = [
        ("Held-out accuracy at the last step that all seeds share", table(header, _comparison_rows(groups))),
        ("Curves", "\n".join(image(plot) for plot in COMPARED)),
    ]
    Path(out).mkdir(parents=True, exist_ok=True)
    report = Path(out) / "compare.html"
    subtitle = ", ".join(f"{name} ({len(runs)})" for name, runs in groups.items())
    report.write_text(page("SGPO runs compared", subtitle, sections), encoding="utf-8")
    return report
