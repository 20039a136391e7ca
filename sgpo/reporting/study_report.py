"""The table and the curves of a study, from its rows alone: what the finished cells gave."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sgpo.reporting.figures import PALETTE, new_figure
from sgpo.reporting.html_parts import note, page, plot_html, table
from sgpo.utils.statistics import permutation_p_value, t_interval

HEADER = (
    "variant",
    "seeds",
    "accuracy after, mean [95 % over seeds]",
    "with strategy",
    "difference to {baseline} [95 %], paired by seed",
    "p",
    "rollouts",
    "sampled tokens",
    "steps",
)
PER_PANEL = 5  # curves that can be told apart


def by_variant(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each variant, in the order in which the variants come."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["variant"], []).append(row)
    return groups


def paired(rows: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]]) -> list[float]:
    """Differences in final accuracy over the seeds that both have."""
    of_baseline = {row["seed"]: row["accuracy_after"] for row in baseline}
    return [row["accuracy_after"] - of_baseline[row["seed"]] for row in rows if row["seed"] in of_baseline]


def table_rows(rows: Sequence[dict[str, Any]], baseline: str) -> list[tuple[str, ...]]:
    """One line per variant: t intervals over seeds, sign-flip permutation test of the paired differences."""
    groups = by_variant(rows)
    lines = []
    for name, cells in groups.items():
        differences = paired(cells, groups.get(baseline, [])) if name != baseline else []
        lines.append(
            (
                name,
                str(len(cells)),
                _with_interval([cell["accuracy_after"] for cell in cells]),
                _mean([cell["guided_accuracy_after"] for cell in cells], "{:.3f}"),
                _with_interval(differences, "{:+.3f}") if differences else "-",
                f"{permutation_p_value(differences):.3f}" if differences else "-",
                _mean([cell["rollouts"] for cell in cells], "{:.0f}"),
                _mean([cell["rollout_tokens"] for cell in cells], "{:.0f}"),
                _mean([cell["steps"] for cell in cells], "{:.0f}"),
            )
        )
    return lines


def markdown(rows: Sequence[dict[str, Any]], baseline: str) -> str:
    """The rows as a Markdown table."""
    header = [name.format(baseline=baseline) for name in HEADER]
    lines = [header, ["---"] * len(header), *table_rows(rows, baseline)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def unequal_budgets(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences on cells that spent more than their budget, or less than 95 % of it."""
    said = []
    for name, cells in by_variant(rows).items():
        shares = [cell["rollouts"] / cell["max_rollouts"] for cell in cells if cell["max_rollouts"]]
        if any(share > 1 or share < 0.95 for share in shares):
            said.append(f"{name} spent {min(shares):.0%} to {max(shares):.0%} of its budget of rollouts.")
        elif not shares:
            said.append(f"{name} has no budget: {_mean([cell['rollouts'] for cell in cells], '{:.0f}')} rollouts.")
    return said


def draw_curves(rows: Sequence[dict[str, Any]]) -> Figure | None:
    """Held-out accuracy against rollouts spent: mean over seeds in a band from minimum to maximum.

    A cell that samples nothing is drawn as a dashed line at its last accuracy.
    """
    groups = by_variant(rows)
    panels = math.ceil(len(groups) / PER_PANEL)
    figure, axes_list = new_figure("Held-out accuracy, mean over seeds (band: lowest to highest)", panels, 3.2)
    for index, (name, cells) in enumerate(groups.items()):
        axes, color = axes_list[index // PER_PANEL], PALETTE[index % PER_PANEL]
        if not any(cell["rollouts"] for cell in cells):
            final = sum(cell["accuracy_after"] for cell in cells) / len(cells)
            axes.axhline(final, color=color, linestyle="--", label=f"{name} (no rollouts)")
            continue
        points = min(len(cell["curve"]) for cell in cells)
        spent = [sum(cell["curve"][i][1] for cell in cells) / len(cells) for i in range(points)]
        values = [[cell["curve"][i][2] for cell in cells] for i in range(points)]
        axes.plot(spent, [sum(v) / len(v) for v in values], color=color, label=name, marker="o", markersize=3)
        axes.fill_between(spent, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.15, lw=0)
    for axes in axes_list:
        axes.set_ylim(-0.03, 1.03)
        axes.set_ylabel("accuracy")
        axes.legend(loc="lower right", fontsize=8)
    axes_list[-1].set_xlabel("rollouts")
    return figure


def write_study_report(rows: Sequence[dict[str, Any]], *, baseline: str, out: Path) -> Path:
    """Writes study.html, study.csv, table.md and plots/study.png into `out`; returns the page."""
    out.mkdir(parents=True, exist_ok=True)
    header = [name.format(baseline=baseline) for name in HEADER]
    lines = table_rows(rows, baseline)
    (out / "table.md").write_text(markdown(rows, baseline) + "\n", encoding="utf-8")
    with (out / "study.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        columns = [key for key in rows[0] if not isinstance(rows[0][key], dict | list)]
        writer.writerow(columns)
        writer.writerows([[row[key] for key in columns] for row in rows])
    least = min(len(cells) for cells in by_variant(rows).values())
    notes = [
        f"Student intervals over seeds. p: sign-flip permutation test over {least} or more pairs, which cannot go "
        f"below {2 / 2**least:.3g} with {least}.",
        *unequal_budgets(rows),
    ]
    sections = [
        ("Final accuracy on held-out problems", table(header, lines) + "".join(map(note, notes))),
        ("Curves", plot_html(lambda: draw_curves(rows), out / "plots" / "study.png", "accuracy", "no evaluation")),
    ]
    path = out / "study.html"
    name = rows[0]["study"]
    path.write_text(page(f"SGPO study {name}", f"{len(rows)} cells.", sections), encoding="utf-8")
    return path


def _mean(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return form.format(sum(known) / len(known)) if known else "-"


def _with_interval(values: Sequence[float], form: str = "{:.3f}") -> str:
    low, high = t_interval(values)
    mean = form.format(sum(values) / len(values))
    return f"{mean} [{form.format(low)}, {form.format(high)}]" if math.isfinite(low) else mean
