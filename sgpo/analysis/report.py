"""report.html of `sgpo strategies analyze`: plots and tables of analysis.json, in the manner of a run's report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from sgpo.reporting.figures import BLUE, GREEN, GREY, ORANGE, legend, new_figure, token_label
from sgpo.reporting.html_parts import note, page, plot_html, table

Json = dict[str, Any]

ARM_NAMES = {
    "none": "no strategy",
    "own": "its own",
    "same_type": "another problem's, same type",
    "other_type": "another problem's, other type",
    "placeholder": "empty, same length",
}
_LABEL_CHARS = 28
_EXAMPLES = 12


def write_analysis_report(output: Path, result: Json) -> Path:
    """Writes output/report.html (self-contained) and output/plots/*.png."""
    plots = output / "plots"

    def image(draw: Callable[[Json], Figure | None], title: str, missing: str) -> str:
        return plot_html(lambda: draw(result), plots / f"{draw.__name__.removeprefix('draw_')}.png", title, missing)

    no_partner = "no problem has a partner"
    no_types = "fewer than two types, or analyze.matrix_draws is 0"
    no_kl = "no guided rollout is correct, or analyze.kl_rollouts is 0"
    sections = [
        ("Transfer", _setting(result) + image(draw_arms, "Pass rates", "no samples") + _arms_table(result)),
        ("Differences", image(draw_contrasts, "Paired differences", no_partner) + _contrasts_table(result)),
        ("Type by type", image(draw_matrix, "Transfer matrix", no_types) + _types_table(result)),
        ("Help and harm", image(draw_help, "Problem by problem", no_partner) + _help_table(result)),
        ("Similarity", image(draw_similarity, "Gain by similarity", no_partner) + _clusters_section(result)),
        ("Quality of the strategies", image(draw_quality, "Gain by quality", "no samples") + _quality_table(result)),
        (
            "Guided against plain, token by token",
            image(draw_kl, "Token KL along the solution", no_kl) + _kl_section(result),
        ),
    ]
    report = output / "report.html"
    subtitle = (
        f"{result['model']}: {result['problems']} problems, {len(result['types'])} types. Numbers: analysis.json."
    )
    report.write_text(page("Are strategies reusable?", subtitle, sections), encoding="utf-8")
    return report


# ---- plots ---------------------------------------------------------------------------------------------------------


def draw_arms(result: Json) -> Figure | None:
    """Pass rate of each arm, with its interval."""
    arms = [arm for arm in result["arms"] if arm["rate"]["mean"] is not None]
    return _points(
        "Pass rate by whose strategy it is",
        [ARM_NAMES[arm["arm"]] for arm in arms],
        [arm["rate"] for arm in arms],
        "share correct, 95 % interval over problems",
        zero=False,
    )


def draw_contrasts(result: Json) -> Figure | None:
    """Differences between pairs of arms, with their intervals."""
    contrasts = [row for row in result["contrasts"] if row["difference"]["mean"] is not None]
    return _points(
        "Paired differences of pass rates",
        [f"{ARM_NAMES[row['first']]}\nless {ARM_NAMES[row['second']]}" for row in contrasts],
        [row["difference"] for row in contrasts],
        "difference, 95 % interval over problems",
        zero=True,
    )


def draw_matrix(result: Json) -> Figure | None:
    """Pass rates by type of the strategy and type of the problem."""
    names = sorted({cell["problem_type"] for cell in result["matrix"]})
    if not names:
        return None
    values = np.full((len(names), len(names)), np.nan)
    for cell in result["matrix"]:
        if cell["rate"]["mean"] is not None:
            values[names.index(cell["strategy_type"]), names.index(cell["problem_type"])] = cell["rate"]["mean"]
    figure, (axes,) = new_figure(
        "Pass rate: strategies of one type on problems of another", height=2.4 + 0.45 * len(names)
    )
    shown = axes.imshow(values, cmap="cividis", vmin=0.0, vmax=max(float(np.nanmax(values)), 0.01), aspect="auto")
    ticks = range(len(names))
    axes.set_xticks(ticks, [_short(name) for name in names], rotation=30, ha="right", fontsize=8)
    axes.set_yticks(ticks, [_short(name) for name in names], fontsize=8)
    axes.set_xlabel("type of the problem")
    axes.set_ylabel("type of the strategy")
    axes.grid(visible=False)
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            dark = value < 0.6 * np.nanmax(values)
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color="w" if dark else "k")
    figure.colorbar(shown, ax=axes, format=PercentFormatter(1.0))
    return figure


def draw_help(result: Json) -> Figure | None:
    """Problems that each kind of guidance helps, hurts or leaves alone."""
    rows = result["help_and_harm"]
    if not rows:
        return None
    figure, (axes,) = new_figure("Problems that do better or worse than without a strategy")
    places = np.arange(len(rows))
    shares = [("higher", BLUE, -0.2), ("lower", ORANGE, 0.2)]
    for key, color, shift in shares:
        counts = np.array([row[key] / max(row["problems"], 1) for row in rows])
        chance = np.array([row[f"{key}_by_chance"] / max(row["problems"], 1) for row in rows])
        axes.barh(places + shift, counts, 0.36, color=color, label=f"{key} pass rate")
        axes.plot(chance, places + shift, "|", color="black", markersize=16, markeredgewidth=2)
    axes.plot([], [], "|", color="black", markersize=10, markeredgewidth=2, linestyle="", label="expected by chance")
    axes.set_yticks(places, [ARM_NAMES[row["arm"]] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("share of problems")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    legend(axes)
    return figure


def draw_similarity(result: Json) -> Figure | None:
    """Gain against the similarity of the strategy to the problem's own."""
    return _bands("Gain from a foreign strategy", [("similarity to the own strategy", result["similarity_bands"])])


def draw_quality(result: Json) -> Figure | None:
    """Gain against the quality of the strategy."""
    quality = result["quality"]
    return _bands(
        "Gain from the own strategy",
        [("score of the strategy", quality["by_score"]), ("tokens of the strategy", quality["by_length"])],
    )


def draw_kl(result: Json) -> Figure | None:
    """Where along a solution the two contexts disagree."""
    kl = result["token_kl"]
    if kl is None:
        return None
    figure = Figure(figsize=(7.4, 5.6), dpi=130, layout="constrained")
    figure.suptitle("KL between guided and plain context", x=0.01, ha="left", fontsize=12, fontweight="bold")
    parts = ((kl["by_decile"], "position in the solution"), (kl["by_step"], "step of the solution"))
    for axes, (rows, label) in zip(figure.subplots(2, 1), parts, strict=True):
        places = np.arange(len(rows))
        _intervals(axes, places, [row["kl"] for row in rows], BLUE, "mean KL, 95 % interval over problems")
        axes.set_xticks(places, [row["name"] for row in rows], fontsize=8)
        axes.set_xlabel(label)
        axes.set_ylabel("nats per token")
        axes.set_ylim(bottom=0.0)
        share = axes.twinx()
        share.plot(places, [row["above_share"] for row in rows], "--", color=GREY)
        share.yaxis.set_major_formatter(PercentFormatter(1.0))
        share.set_ylim(bottom=0.0)
        share.set_ylabel("tokens above\nthe limit")
        share.grid(visible=False)
        axes.plot([], [], "--", color=GREY, label=f"share above {kl['max_token_kl']:g}")
        legend(axes)
    return figure


def _points(title: str, names: Sequence[str], estimates: Sequence[Json], label: str, *, zero: bool) -> Figure | None:
    """One row per name: a mean and its interval."""
    if not names:
        return None
    figure, (axes,) = new_figure(title, height=1.3 + 0.45 * len(names))
    places = np.arange(len(names))
    means = np.array([row["mean"] for row in estimates])
    low, high = (np.array([_or(row[end], row["mean"]) for row in estimates]) for end in ("low", "high"))
    axes.errorbar(means, places, xerr=[means - low, high - means], fmt="o", color=BLUE, capsize=3)
    if zero:
        axes.axvline(0.0, color="black", linewidth=1)
    else:
        axes.set_xlim(0.0, min(max(1.08 * float(high.max()), 0.02), 1.02))
    axes.set_yticks(places, names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel(label)
    return figure


def _bands(title: str, found: Sequence[tuple[str, list[Json]]]) -> Figure | None:
    found = [(label, bands) for label, bands in found if bands]
    if not found:
        return None
    figure = Figure(figsize=(7.4, 3.0 * len(found) + 0.5), dpi=130, layout="constrained")
    figure.suptitle(f"{title}, over no strategy", x=0.01, ha="left", fontsize=12, fontweight="bold")
    for axes, (label, bands) in zip(figure.subplots(len(found), 1, squeeze=False)[:, 0], found, strict=True):
        places = np.arange(len(bands))
        _intervals(axes, places, [band["effect"] for band in bands], GREEN, "mean gain, 95 % interval over problems")
        axes.axhline(0.0, color="black", linewidth=1)
        axes.set_xticks(places, [f"{_range(band)}\n{band['items']} items" for band in bands], fontsize=8)
        axes.set_xlabel(label)
        axes.set_ylabel("gain in pass rate")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


def _intervals(axes: Axes, places: np.ndarray, estimates: Sequence[Json], color: str, label: str) -> None:
    means = np.array([row["mean"] for row in estimates])
    low, high = (np.array([_or(row[end], row["mean"]) for row in estimates]) for end in ("low", "high"))
    axes.errorbar(places, means, yerr=[means - low, high - means], fmt="o-", color=color, capsize=3, label=label)


# ---- tables --------------------------------------------------------------------------------------------------------


def _setting(result: Json) -> str:
    settings, excess = result["settings"], result["placeholder_excess_tokens"]
    rollout, chosen = settings["rollout"], settings["analyze"]
    exact = excess["exact"] == result["problems"]
    return note(
        f"Model {result['model']}; {chosen['samples']} completions per problem and arm at temperature "
        f"{rollout['temperature']:g}, top-p {rollout['top_p']:g}, up to {rollout['max_new_tokens']} tokens. A foreign "
        f"strategy comes from up to {chosen['partners']} other problems in turn. Types: {chosen['types']}. "
        "Placeholders "
        + (
            "have exactly the tokens of the own strategy."
            if exact
            else f"have exactly the tokens of the own strategy for {excess['exact']} of {result['problems']} problems, "
            f"else {excess['least']:+d} to {excess['most']:+d}."
        )
        + (f" {len(result['without_guidance'])} problems have no strategy." if result["without_guidance"] else "")
    )


def _arms_table(result: Json) -> str:
    header = (
        "strategy", "pass rate", "95 % interval", "problems", "without partner", "same text as own", "prompt tokens",
        "tokens", "truncated", "no answer", "failed to score",
    )  # fmt: skip
    rows = [
        (
            ARM_NAMES[arm["arm"]], *_cells(arm["rate"]), arm["rate"]["problems"], arm["excluded_problems"],
            *(arm.get(key) for key in ("identical_guidance", "prompt_tokens", "tokens", "truncated", "no_answer")),
            arm.get("failed_verdicts"),
        )
        for arm in result["arms"]
    ]  # fmt: skip
    return table(header, rows)


def _contrasts_table(result: Json) -> str:
    rows = [
        (
            f"{ARM_NAMES[row['first']]} less {ARM_NAMES[row['second']]}",
            *_cells(row["difference"]),
            row["difference"]["problems"],
            row["p_value"],
        )
        for row in result["contrasts"]
    ]
    words = note("p: random signs of the differences, problem by problem, two-sided, not corrected for their number.")
    return table(("difference", "mean", "95 % interval", "problems", "p"), rows) + words


def _types_table(result: Json) -> str:
    header = ("type of the problem", "problems", *ARM_NAMES.values())
    rows = [
        (row["type"], row["problems"], *(_rate(row[arm]) for arm in ARM_NAMES))
        for row in sorted(result["types"], key=lambda row: -row["problems"])[:40]
    ]
    draws = result["settings"]["analyze"]["matrix_draws"]
    return note(f"A cell of the matrix holds {draws} completions; its interval is in analysis.json.") + table(
        header, rows
    )


def _help_table(result: Json) -> str:
    rows = result["help_and_harm"]
    if not rows:
        return ""

    def pair(row: Json, key: str) -> str:
        return f"{row[key]} ({row[f'{key}_by_chance']:.1f})"

    header = ("strategy", "problems", "higher", "lower", "equal", "helps", "hurts")
    cells = [
        (
            ARM_NAMES[row["arm"]], row["problems"], pair(row, "higher"), pair(row, "lower"), row["equal"],
            pair(row, "helps"), pair(row, "hurts"),
        )
        for row in rows
    ]  # fmt: skip
    words = (
        "In brackets: what to expect if the strategy changed nothing, given how many completions of each problem are "
        f"correct in all. Helps, hurts: Fisher's exact test of the problem's own completions, p up to "
        f"{rows[0]['level']:g}."
    )
    return table(header, cells) + note(words)


def _clusters_section(result: Json) -> str:
    found = result["clusters"]
    rows = [
        ("texts that differ", found["different_texts"]),
        ("with a near-duplicate", found["with_near_duplicate"]),
        ("mean similarity", found["mean_similarity"]),
        ("clusters", len(found["groups"])),
        ("silhouette", found["silhouette"]),
        ("adjusted Rand index, clusters against types", found["adjusted_rand_index"]),
    ]
    groups = sorted(found["groups"], key=lambda group: -group["problems"])[:_EXAMPLES]
    examples = "\n".join(
        f"<details><summary>cluster {group['cluster']}: {group['problems']} problems, "
        f"{escape(str(group['most_frequent_type']))}</summary><pre>{escape(group['example'])}</pre></details>"
        for group in groups
    )
    return table((f"strategies ({found['method']})", "value"), rows) + examples


def _quality_table(result: Json) -> str:
    quality = result["quality"]
    rows = [
        (f"{what} {_range(band)}", band["items"], *_cells(band["effect"]))
        for what, key in (("score", "by_score"), ("tokens", "by_length"))
        for band in quality[key]
    ]
    rows += [(name, row["problems"], *_cells(row)) for name, row in quality["by_leak"].items() if row["problems"]]
    key = result["settings"]["analyze"]["score_key"]
    missing = "" if quality["by_score"] else note(f"By score: left out, no row has a number under {key}.")
    return table(("strategies", "problems", "gain over none", "95 % interval"), rows) + missing


def _kl_section(result: Json) -> str:
    kl = result["token_kl"]
    if kl is None:
        return ""
    rows = [
        ("correct guided rollouts", kl["rollouts"]),
        ("problems", kl["problems"]),
        ("tokens", kl["tokens"]),
        ("mean KL per token, nats", kl["mean"]),
        ("mean KL, tokens above the limit counted as 0", kl["mean_after_mask"]),
        (f"share of tokens above {kl['max_token_kl']:g}", kl["above_share"]),
        ("median", kl["median"]),
        ("90 %", kl["p90"]),
        ("99 %", kl["p99"]),
        ("largest", kl["max"]),
        ("steps per rollout", kl["steps_per_rollout"]),
    ]
    tokens = [(token_label(row["text"]), row["count"], row["mean"], row["share_of_all"]) for row in kl["top_tokens"]]
    return (
        table(("", "value"), rows)
        + "<h3>Tokens with the highest mean KL</h3>"
        + table(("token", "times", "mean KL", "share of all KL"), tokens)
    )


# ---- words ---------------------------------------------------------------------------------------------------------


def _cells(estimate: Json) -> Iterable[Any]:
    interval = None if estimate["low"] is None else f"[{estimate['low']:.3f}, {estimate['high']:.3f}]"
    return estimate["mean"], interval


def _rate(estimate: Json) -> str:
    if estimate["mean"] is None:
        return "-"
    interval = "" if estimate["low"] is None else f" [{estimate['low']:.2f}, {estimate['high']:.2f}]"
    return f"{estimate['mean']:.3f}{interval}"


def _range(band: Json) -> str:
    low, high = f"{band['low']:.3g}", f"{band['high']:.3g}"
    return low if low == high else f"{low} to {high}"


def _short(name: str) -> str:
    shown = name if len(name) <= _LABEL_CHARS else name[: _LABEL_CHARS - 1] + "\u2026"
    return shown.replace("$", "\\$")


def _or(value: float | None, other: float) -> float:
    return other if value is None else value
