"""The curves of a run over its steps, as in the paper's Figures 3 and 4, and where its time and memory went."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from sgpo.reporting.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, YELLOW, legend, new_figure
from sgpo.reporting.run_data import RunData, number_of
from sgpo.reporting.run_files import PROFILE_FILE, read_jsonl
from sgpo.types import WORDS

SMOOTH_FROM = 20  # shorter curves are drawn as they are
TIME_BARS = 60


@dataclass(frozen=True, slots=True)
class Curve:
    """One metric: its key in metrics.jsonl, its label and how it is drawn."""

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
    """Panels under one title, of one phase; `name` is that of the file."""

    name: str
    title: str
    panels: tuple[Panel, ...]
    phase: str = "train"


def _both_kinds(stem: str) -> tuple[Curve, Curve]:
    return Curve(f"{stem}_auto", WORDS["auto"], BLUE), Curve(f"{stem}_guided", WORDS["guided"], ORANGE)


ALPHAS = (Curve("alpha_mean", "after the cap", BLUE), Curve("alpha_uncapped_mean", "before the cap", GREY, "--"))


KLS = (Curve("kl_mean", "all tokens, before the mask", GREY, "--"), Curve("kl_kept_mean", "after the mask", BLUE))


SIGNALS = (
    Curve("zero_variance_share", "rewards without strategy all alike (no policy signal)", ORANGE),
    Curve("target_share", "with a teacher completion (a correct one with strategy)", BLUE),
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
        "KL between the contexts with and without strategy",
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
    Curve("target_s", "select", PURPLE),
    Curve("train_s", "train", GREEN),
    Curve("sync_s", "sync", ORANGE),
)
HELD_OUT = Curve("accuracy", "plain prompt", BLUE)


HELD_OUT_GUIDED = Curve("guided_accuracy", "guided prompt", ORANGE, "--")


def label_steps(axes: Axes, phase: str, window: int) -> None:
    """Names the x axis, and how far its curves are smoothed."""
    what = {"warmup": "warm-up step", "train": "training step", "eval": "training step"}[phase]
    axes.set_xlabel(what if window == 1 else f"{what} (smoothed: centred mean of {window} steps)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def set_scale(axes: Axes, scale: str) -> None:
    """The y axis as `Panel.scale` asks for it."""
    # The axis ends just above the data, also for shares, so that a masked share of 2 % is not a flat line.
    top = 1.06 * axes.dataLim.y1
    if scale == "share":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylim(0.0, min(max(top, 0.01), 1.02))
    elif scale == "zero":
        axes.set_ylim(0.0, top if top > 0.0 else 1.0)


def smoothing_window(points: int) -> int:
    """Width of the moving mean: odd, about a twentieth of the curve; 1 for a short curve."""
    return 1 if points < SMOOTH_FROM else 2 * (points // 40) + 3


def smooth(values: np.ndarray, window: int) -> np.ndarray:
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
        values = smooth(values, window)
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
    window = max(smoothing_window(len(steps)) for _, curves in found for _, steps, _ in curves)
    for axes, (panel, curves) in zip(all_axes, found, strict=True):
        for curve, steps, values in curves:
            _draw_curve(axes, curve, steps, values, window if len(steps) >= SMOOTH_FROM else 1)
        axes.set_ylabel(panel.ylabel)
        set_scale(axes, panel.scale)
        if len(panel.curves) > 1:
            legend(axes)
    label_steps(all_axes[-1], plot.phase, window)
    return figure


def draw_held_out(run: RunData) -> Figure | None:
    """Held-out accuracy with the interval that evaluation logged (accuracy_low to accuracy_high)."""
    steps, accuracy = run.series("eval", HELD_OUT.key)
    if not len(steps):
        return None
    figure, (axes,) = new_figure("Held-out accuracy")
    axes.plot(steps, accuracy, color=BLUE, marker="o", markersize=4, label=HELD_OUT.label)
    rows = run.phases["eval"]
    low, high = (np.array([number_of(rows[step].get(f"accuracy_{end}")) for step in steps]) for end in ("low", "high"))
    if np.isfinite(low + high).any():
        axes.errorbar(steps, (low + high) / 2, (high - low) / 2, fmt="none", ecolor=BLUE, alpha=0.6, capsize=3)
        axes.plot([], [], color=BLUE, alpha=0.6, marker="|", linestyle="", markersize=10, label="its interval")
    guided_steps, guided = run.series("eval", HELD_OUT_GUIDED.key)
    if len(guided_steps):
        axes.plot(guided_steps, guided, "--", color=ORANGE, marker="s", markersize=4, label=HELD_OUT_GUIDED.label)
    axes.set_ylabel("share correct")
    set_scale(axes, "share")
    legend(axes)
    label_steps(axes, "eval", 1)
    return figure


def draw_times(run: RunData) -> Figure | None:
    """Seconds per step, stacked by phase; with many steps each bar is the mean of several."""
    rows = run.phases.get("train", {})
    steps = np.array(sorted(step for step, row in rows.items() if any(curve.key in row for curve in TIMES)))
    if not len(steps):
        return None
    parts = {
        curve.label: np.array([np.nan_to_num(number_of(rows[step].get(curve.key))) for step in steps])
        for curve in TIMES
    }
    whole = np.array([np.nan_to_num(number_of(rows[step].get("step_s"))) for step in steps])
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
    label_steps(axes, "train", 1)
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
