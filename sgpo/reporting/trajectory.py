"""One teacher completion, token by token, with its KL: the paper's Figure 5, as a plot and as text."""

from __future__ import annotations

import math
from html import escape

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sgpo.reporting.figures import BLUE, DPI, GREY, ORANGE, legend, token_label
from sgpo.reporting.html_parts import note
from sgpo.reporting.run_data import Trajectory

TOKENS_SHOWN = 60


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


def trajectory_text(trajectory: Trajectory) -> str:
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
