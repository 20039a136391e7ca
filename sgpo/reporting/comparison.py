"""Several runs on one page; runs of one name are seeds, drawn as their mean in a band."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sgpo.reporting.curves import (
    HELD_OUT,
    SMOOTH_FROM,
    Curve,
    Panel,
    Plot,
    label_steps,
    set_scale,
    smooth,
    smoothing_window,
)
from sgpo.reporting.figures import BLUE, PALETTE, new_figure
from sgpo.reporting.html_parts import page, plot_html, table
from sgpo.reporting.run_data import RunData, load_run
from sgpo.types import SgpoError


def _compared(key: str, title: str, ylabel: str, scale: str, phase: str = "train") -> Plot:
    return Plot(f"compare_{phase}_{key}", title, (Panel(ylabel, (Curve(key, key, BLUE),), scale),), phase)


COMPARED = (
    _compared("accuracy", "Held-out accuracy", "share correct", "share", "eval"),
    _compared("accuracy_auto", "Accuracy without strategy", "share correct", "share"),
    _compared("entropy", "Entropy of the policy", "nats per token", "zero"),
    _compared("length_auto", "Response length without strategy", "tokens", "zero"),
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
    window = 1 if plot.phase == "eval" else max(smoothing_window(len(steps)) for steps, _ in found.values())
    figure, (axes,) = new_figure(plot.title)
    for index, (name, (steps, values)) in enumerate(found.items()):
        color = PALETTE[index % len(PALETTE)]
        values = np.array([smooth(row, window) for row in values])
        label = name.replace("$", "\\$") + (f" (mean, min to max of {len(values)})" if len(values) > 1 else "")
        marker = "o" if len(steps) < SMOOTH_FROM else None
        axes.plot(steps, values.mean(axis=0), color=color, label=label, marker=marker, markersize=4)
        if len(values) > 1:
            axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=color, alpha=0.2, linewidth=0)
    axes.set_ylabel(panel.ylabel)
    set_scale(axes, panel.scale)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, fontsize=9)
    label_steps(axes, plot.phase, window)
    return figure


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
