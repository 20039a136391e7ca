"""Plots of benchmark rows: python -m benchmarks.plots ROWS.jsonl [MORE.jsonl ...] --out DIR

time_tokens.png      forward + backward against tokens, one panel per case: ms on an accelerator, on the CPU multiples
                     of one token's product with the head (units x tokens)
memory_tokens.png    peak memory above the inputs against tokens
error_distance.png   relative error of the distillation gradient against the median |h_T - h_S| / |h_S|
Only rows of status ok are drawn. A plot without rows is not written.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sgpo.types import SgpoError

Row = dict[str, Any]


def load(paths: Sequence[Path]) -> list[Row]:
    """The finished rows of the files. Raises SgpoError for a file that is not there or holds something else."""
    rows = []
    for path in paths:
        try:
            found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise SgpoError(f"Cannot read benchmark rows from {path}: {error}.") from error
        rows += [row for row in found if row.get("benchmark") == "ops" and row.get("status") == "ok"]
    if not rows:
        raise SgpoError("No finished rows of benchmarks.run in these files.")
    return rows


def time_of(row: Row) -> float:
    return row["ms_p50"] if _on_gpu(row) else row["units"] * row["rows"]


def draw(
    rows: Sequence[Row],
    path: Path,
    *,
    panel: Callable[[Row], str],
    x: Callable[[Row], float | None],
    y: Callable[[Row], float | None],
    labels: tuple[str, str],
) -> Path | None:
    """One panel per value of `panel`, one line per peer, both axes logarithmic; None where there is nothing to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = [row for row in rows if x(row) and y(row)]
    panels = sorted({panel(row) for row in drawn})
    if not panels:
        return None
    figure = Figure(figsize=(6 * len(panels), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    colours = {peer: f"C{index % 10}" for index, peer in enumerate(sorted({row["peer"] for row in drawn}))}
    for axes, title in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        here = [row for row in drawn if panel(row) == title]
        for peer in sorted({row["peer"] for row in here}):
            points = sorted((x(row), y(row)) for row in here if row["peer"] == peer)
            axes.plot(*zip(*points, strict=True), marker="o", label=peer, color=colours[peer])
        axes.set(xscale="log", yscale="log", title=title, xlabel=labels[0], ylabel=labels[1])
        axes.grid(visible=True, which="both", alpha=0.3)
        axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def plot_all(rows: Sequence[Row], out: Path) -> list[Path]:
    """Writes what the rows allow; the paths written."""
    gpu = [row for row in rows if _on_gpu(row)]
    by_tokens = {"panel": _case, "x": lambda row: row["rows"]}
    unit = "ms" if gpu else "products of one token with the head"
    written = [
        draw(gpu or rows, out / "time_tokens.png", y=time_of, labels=("tokens", f"time [{unit}]"), **by_tokens),
        draw(rows, out / "memory_tokens.png", y=_memory, labels=("tokens", "peak above inputs [MiB]"), **by_tokens),
        draw(
            rows,
            out / "error_distance.png",
            panel=lambda row: f"{row['op']}, {row['shape']}, {row['rows']} rows, {row['dtype']}",
            x=lambda row: row["states_summary"].get("state_distance_p50"),
            y=lambda row: row.get("ddistill_error"),
            labels=("median |h_T - h_S| / |h_S|", "relative error of dH, distillation rows"),
        ),
    ]
    return [path for path in written if path is not None]


def _case(row: Row) -> str:
    return f"{row['op']}, {row['shape']}, {row['mix']}, {row['states']}, {row['dtype']}"


def _memory(row: Row) -> float | None:
    return row["peak_mib"]


def _on_gpu(row: Row) -> bool:
    return row["device"].startswith("cuda")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/plots"))
    options = parser.parse_args(arguments)
    try:
        for path in plot_all(load(options.rows), options.out):
            print(path)
    except SgpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
