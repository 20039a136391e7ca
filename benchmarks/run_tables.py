"""Raw rows of finished runs, and the README tables and docs/families.md made from them.

python -m benchmarks.run_tables                               rewrites these tables from results/
python -m benchmarks.run_tables --collect NAME RUN [RUN ...]  first replaces results/NAME.jsonl by these runs' summaries
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import families_page
from sgpo.reporting.study_report import markdown
from sgpo.utils.statistics import bootstrap_interval

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def collect(name: str, runs: Sequence[Path]) -> None:
    """One row per run: its summary, and the versions and machine it ran on."""
    rows = []
    for run in runs:
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
        del environment["commit"]  # the summary has it
        rows.append(json.dumps({**summary, "environment": environment}))
    (RESULTS / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def load(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def quickstart_table() -> str:
    """Per method: every seed's accuracy, and the mean gain with a bootstrap interval over seeds."""
    by_method: dict[str, list[dict[str, Any]]] = {}
    for row in load("quickstart"):
        by_method.setdefault(row["method"], []).append(row)
    lines = [
        "| method | seeds | before | with strategy, before | after, seed by seed | mean gain [95 % over seeds] |",
        "|---|---|---|---|---|---|",
    ]
    for method, rows in sorted(by_method.items(), reverse=True):
        rows.sort(key=lambda row: row["seed"])
        gains = [row["accuracy_after"] - row["accuracy_before"] for row in rows]
        low, high = bootstrap_interval(gains)
        after = ", ".join(f"{row['accuracy_after']:.2f}" for row in rows)
        lines.append(
            f"| {method.upper()} | {len(rows)} | {_mean(rows, 'accuracy_before'):.3f} | "
            f"{_mean(rows, 'guided_accuracy_before'):.3f} | {after} | "
            f"{sum(gains) / len(gains):+.3f} [{low:+.3f}, {high:+.3f}] |"
        )
    return "\n".join(lines)


def real_table() -> str:
    lines = [
        "| run | steps | accuracy before | after | with guidance, before | after |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{row['run']}` | {row['steps']} | {_with_interval(row, 'before')} | {_with_interval(row, 'after')} | "
        f"{row['guided_accuracy_before']:.3f} | {row['guided_accuracy_after']:.3f} |"
        for row in load("real")
    ]
    return "\n".join(lines)


def kernels_table() -> str:
    """The op sgpo, case by case: ratios to ours-torch of the same run, errors against fp64."""
    lines = [
        "| rows, hidden states | implementation | time / ours | products per row | forward | peak MiB "
        "| dH error, policy | distillation | dW error |",
        "|" + "---|" * 9,
    ]
    for case, rows in _sgpo_cases(load("kernels")).items():
        base = next(row["ms_p50"] for row in rows if row["peer"] == "ours-torch")
        for row in rows:
            forward = f"{row['forward_units']:.2f}" if row.get("forward_units") else "-"
            errors = " | ".join(f"{row[f'{name}_error']:.1e}" for name in ("dpolicy", "ddistill", "dhead"))
            lines.append(
                f"| {case} | `{row['peer']}` | {row['ms_p50'] / base:.2f} | {row['units']:.2f} | {forward} | "
                f"{row['peak_mib']:.0f} | {errors} |"
            )
    return "\n".join(lines)


def _sgpo_cases(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Finished rows of the op sgpo by case; the sweep over the number of rows has fewer peers and is left out."""
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["op"] == "sgpo" and row["status"] == "ok":
            states = "SmolLM2-135M" if row["states"].startswith("real:") else row["states"]
            where = f"{row['policy_rows']} + {row['distill_rows']}, H {row['hidden']}, V {row['vocab']}, {states}"
            cases.setdefault(where, []).append(row)
    return {case: found for case, found in cases.items() if len({row["peer"] for row in found}) > 4}


def gpu_table() -> str:
    """The ops on an H100 at the 7B head, by the newest commit measured (rows stand newest first)."""
    rows = [row for row in load("gpu_h100") if row.get("benchmark") == "ops"]
    lines = [
        "| op, rows, hidden states | implementation | ms | products per row | floor | peak MiB "
        "| dH error, policy | distillation | dW error |",
        "|" + "---|" * 9,
    ]
    for row in rows:
        if row["commit"] != rows[0]["commit"] or "ms_p50" not in row:
            continue
        errors = " | ".join(
            f"{row[f'{name}_error']:.1e}" if row.get(f"{name}_error") is not None else "-"
            for name in ("dpolicy", "ddistill", "dhead")
        )
        lines.append(
            f"| {row['op']}, {row['policy_rows']} + {row['distill_rows']}, {row['states']} | `{row['peer']}` | "
            f"{row['ms_p50']:.1f} | {row['units']:.2f} | {row['floor_units']:.2f} | {row['peak_mib']:.0f} | {errors} |"
        )
    return "\n".join(lines)


def rollouts_table() -> str:
    """Two tables: the engines beside ours, and the parts of a weight sync."""
    rows = [row for row in load("rollouts") if row["status"] == "ok"]
    lines = [
        "| model, requests x new tokens | engine | tokens/s, ours / it [p10, p90] | by CPU time | equal completions |",
        "|" + "---|" * 5,
    ]
    for row in rows:
        if row["part"] == "throughput" and row["peer"] != "ours":
            low, middle, high = (row[f"ours_over_peer_{key}"] for key in ("p10", "p50", "p90"))
            lines.append(
                f"| {row['model']}, {row['requests']} x {row['max_new_tokens']} | `{row['peer']}` | {middle:.2f} "
                f"[{low:.2f}, {high:.2f}] | {row['ours_over_peer_cpu_p50']:.2f} | {row['equal_share']:.2f} |"
            )
    lines += ["", "| weights, MiB | engine | sync / plain copy | checksums, both sides | load | probe | peak, MiB |"]
    lines.append("|" + "---|" * 7)
    for row in rows:
        if row["part"] == "sync":
            parts = (2 * row["checksum_ms_min"], row["load_ms"], row["probe_ms"])
            shares = " | ".join(f"{part / row['copy_ms_min']:.1f}" for part in parts)
            lines.append(
                f"| {row['bytes'] / 2**20:.0f} | {row['placement']} | {row['sync_over_copy']:.1f} | {shares} | "
                f"{'-' if row['extra_mib'] is None else format(row['extra_mib'], '.0f')} |"
            )
    return "\n".join(lines)


def rewrite_readme(tables: dict[str, str]) -> None:
    """Puts each table between its markers <!-- NAME --> and <!-- /NAME -->."""
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    for name, table in tables.items():
        block = f"<!-- {name} -->\n{table}\n<!-- /{name} -->"
        text, count = re.subn(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, b=block: b, text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"README.md: expected the markers of {name} once, found {count}")
    path.write_text(text, encoding="utf-8")


def _mean(rows: Sequence[dict[str, Any]], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def _with_interval(row: dict[str, Any], moment: str) -> str:
    low, high = row[f"accuracy_{moment}_interval"]
    return f"{row[f'accuracy_{moment}']:.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", metavar="NAME")
    parser.add_argument("runs", nargs="*", type=Path)
    arguments = parser.parse_args()
    if arguments.collect:
        collect(arguments.collect, arguments.runs)
    makers = {
        "quickstart": quickstart_table,
        "real": real_table,
        "kernels": kernels_table,
        "gpu_h100": gpu_table,
        "rollouts": rollouts_table,
        "study": lambda: markdown(load("study"), "grpo"),
    }
    (ROOT / "docs" / "families.md").write_text(families_page.page(load("families")), encoding="utf-8")
    rewrite_readme({name: make() for name, make in makers.items() if (RESULTS / f"{name}.jsonl").exists()})


if __name__ == "__main__":
    main()
