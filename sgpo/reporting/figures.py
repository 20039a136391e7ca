"""How every plot looks: palette, style, an empty figure, a legend that hides no data."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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


def token_label(token: str) -> str:
    """A token as an axis label: spaces and newlines visible, dollars kept from starting a formula."""
    visible = token.replace("\n", "\\n").replace("\t", "\\t").replace(" ", "\u2423").replace("$", "\\$")
    return visible if len(visible) <= 14 else visible[:13] + "\u2026"


def save_figure(draw: Callable[[], Figure | None], path: Path) -> bool:
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
