"""The report of a run: PNG plots in the manner of the paper's Figures 3 to 5 and one self-contained HTML page.

What a run did not log is left out with a sentence that says so; only a folder without metrics is an error.
"""

from __future__ import annotations

import json
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from sgpo.reporting.curves import (
    CURVES,
    HELD_OUT,
    TIMES,
    Panel,
    Plot,
    draw_curves,
    draw_held_out,
    draw_memory,
    draw_times,
)
from sgpo.reporting.figures import save_figure
from sgpo.reporting.html_parts import cell_text, image, note, page, plot_html, table
from sgpo.reporting.run_data import RunData, load_run, load_trajectory
from sgpo.reporting.run_files import METRICS_FILE, ROLLOUTS_FILE, TRAJECTORIES_FILE, iter_jsonl
from sgpo.reporting.trajectory import draw_trajectory, trajectory_text
from sgpo.types import WORDS, SgpoError


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
    """The latest step with a teacher completion, or else the latest, with its rows; None without rollouts."""
    last = with_target = None
    for step, group in groupby(iter_jsonl(path), key=lambda row: row["step"]) if path.exists() else ():
        last = (step, list(group))
        if any(row["is_target"] for row in last[1]):
            with_target = last
    return with_target or last


def _rollout_html(row: dict[str, Any]) -> str:
    outcome = "right" if row.get("correct", row["reward"] > 0) else "wrong"
    tags = [(WORDS.get(row["kind"], row["kind"]), ""), (f"reward {cell_text(row['reward'])}", outcome)]
    tags += [(row["status"], "")] if row["status"] != "ok" else []
    tags += [("truncated", "")] if row["truncated"] else []
    tags += [("teacher completion", "target")] if row["is_target"] else []
    line = " ".join(f'<span class="tag {style}">{escape(str(text))}</span>' for text, style in tags)
    is_open = " open" if row["is_target"] else ""
    return f"<details{is_open}><summary>{line}</summary><pre>{escape(row['text'])}</pre></details>"


def _rollouts_section(run_dir: Path, problems: int = 3, per_kind: int = 3) -> str:
    """A few problems of one step, those with a teacher completion first; per problem that and some of each kind."""
    sample = _sample_rollouts(run_dir / ROLLOUTS_FILE)
    if sample is None:
        return note(f"Left out, {ROLLOUTS_FILE} holds no rollouts.")
    step, rows = sample
    by_problem: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: not row["is_target"]):  # stable: teacher completions first, else as sampled
        by_problem.setdefault(row["problem_id"], []).append(row)
    parts = [note(f"Samples of step {step}.")]
    for problem_id, group in list(by_problem.items())[:problems]:
        parts.append(f"<h3>Problem {escape(str(problem_id))}</h3>")
        for kind in ("guided", "auto"):
            parts += [_rollout_html(row) for row in group if row["kind"] == kind][:per_kind]
    return "\n".join(parts)


def _trajectory_section(run_dir: Path) -> str:
    trajectory = load_trajectory(run_dir)
    path = run_dir / "plots" / "trajectory.png"
    title = "KL token by token"
    if trajectory is None:
        path.unlink(missing_ok=True)
        return note(f"{title}: left out, {TRAJECTORIES_FILE} holds no trajectory.")
    save_figure(lambda: draw_trajectory(trajectory), path)
    return image(path, title) + trajectory_text(trajectory)


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
    if save_figure(lambda: draw_memory(run.path), plots / "memory.png"):
        images.append(image(plots / "memory.png", "Memory over a step"))
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
