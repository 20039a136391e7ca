"""`sgpo study`: what it refuses, what it runs, and that its table comes from the rows alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from processes import PATIENCE_S

from sgpo.commands.study import Study, report_study
from sgpo.reporting.study_report import markdown, paired, table_rows, unequal_budgets, write_study_report
from sgpo.types import SgpoError

ROOT = Path(__file__).resolve().parents[2]
BASE = {
    "model": {"path": "builtin", "dtype": "float32"},
    "data": {"train": "builtin", "eval": "builtin", "train_limit": 64, "eval_limit": 8, "max_prompt_tokens": 64},
    "rollout": {"engine": "hf", "problems_per_step": 4, "n_auto": 4, "n_guided": 2, "max_new_tokens": 20},
    "reward": {"kind": "exact", "workers": 1},
    "optim": {"lr": 1e-3},
    "engine": {"micro_batch_tokens": 256},
    "train": {"max_steps": 2},
    "eval": {"samples": 1, "max_new_tokens": 8, "guided": False},
    "warmup": {"enabled": True, "data": "builtin", "limit": 64, "epochs": 1, "batch_size": 16, "max_tokens": 128},
}
SFT = {"algorithm.method": "sft", "rollout.n_auto": 0, "rollout.n_guided": 0}
STUDY = {
    "name": "tiny",
    "base": "base.yaml",
    "baseline": "sgpo",
    "seeds": [1],
    "max_rollouts": 30,
    "variants": {"sgpo": {}, "then": {"after": "sft"}, "sft": {"set": SFT}},
}


def write(folder: Path, **changes) -> Path:
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    (folder / "study.yaml").write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))
    return folder / "study.yaml"


def command(folder: Path, *words: str, expect: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "sgpo.cli", "study", *words],
        cwd=folder,
        text=True,
        capture_output=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"baseline": "nobody"}, "baseline 'nobody' is not among the variants (sgpo, then, sft)"),
        ({"variants": {"sgpo": {"after": "x"}}}, "after = 'x' must name a variant"),
        ({"variants": {"sgpo": {"set": {"algorithm.methd": "dapo"}}}}, "did you mean 'algorithm.method'?"),
        ({"variants": {"sgpo": {"optim.lr": 1}}}, "optim.lr is a key of the base config; write it under set"),
        ({"variants": {"sgpo": {"set": {"rollout.n_guided": 0}}}}, "variant sgpo:"),
        ({"max_rollouts": 10}, "at least one batch of rollouts (24)"),
        ({"seeds": [1, 1]}, "a seed is given twice"),
        ({"seeds": []}, "seeds"),
    ],
)
def test_a_study_that_cannot_work_is_refused_before_it_starts(tmp_path, changes, sentence):
    with pytest.raises(SgpoError, match=r".") as error:
        Study(write(tmp_path, **changes))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_the_shipped_studies_load():
    studies = [p for p in sorted((ROOT / "configs").glob("*.yaml")) if "variants" in yaml.safe_load(p.read_text())]
    assert studies
    for path in studies:
        study = Study(path)
        assert len(study.cells) == len(study.settings.seeds) * len(study.settings.variants)
        assert len({study.fingerprint(cell) for cell in study.cells}) == len(study.cells)


def test_cells_of_one_seed_share_their_warmup_and_others_do_not(tmp_path):
    study = Study(write(tmp_path, seeds=[1, 2]))
    warmups = {cell.name: study.commands(cell)[0] for cell in study.cells if cell.after is None}
    assert warmups["sgpo-seed1"] == warmups["sft-seed1"] != warmups["sgpo-seed2"]
    assert [word for word in study.commands(study.cell("then-seed2"))[0] if "model.path" in word] == [
        "--model.path=studies/tiny/runs/sft-seed2/final"
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    write(folder)
    return folder, command(folder, "study.yaml")


def test_a_study_runs_every_cell_and_writes_its_table(finished):
    folder, output = finished
    rows = [json.loads(line) for line in (folder / "studies/tiny/results.jsonl").read_text().splitlines()]
    assert [row["cell"] for row in rows] == ["sgpo-seed1", "then-seed1", "sft-seed1"]
    assert [row["rollouts"] for row in rows] == [24, 24, 0]
    assert [row["steps"] for row in rows] == [1, 1, 2]
    assert "then spent 80% to 80% of its budget of rollouts." in unequal_budgets(rows)
    assert (folder / "studies/tiny/table.md").read_text() in output
    assert "data:image/png;base64" in (folder / "studies/tiny/study.html").read_text()
    assert len(list((folder / "studies/tiny/warmups").glob("*-seed1"))) == 1


def test_a_finished_cell_is_not_run_again_and_one_that_is_gives_the_same_numbers(finished):
    folder, _ = finished
    row_path = folder / "studies/tiny/cells/sgpo-seed1.json"
    before = json.loads(row_path.read_text())
    log = folder / "studies/tiny/logs/sgpo-seed1.txt"
    size = log.stat().st_size
    command(folder, "study.yaml", "--cell", "sgpo-seed1")
    assert log.stat().st_size == size
    row_path.unlink()
    run = folder / "studies/tiny/runs/sgpo-seed1"
    model = (run / "final" / "model.safetensors").read_bytes()
    run.rename(run.with_name("aside"))
    command(folder, "study.yaml", "--cell", "sgpo-seed1")
    assert json.loads(row_path.read_text()) == before
    assert (run / "final" / "model.safetensors").read_bytes() == model


def test_other_settings_do_not_pass_for_the_old_ones(finished, monkeypatch):
    folder, _ = finished
    monkeypatch.chdir(folder)
    study = Study(Path("study.yaml"), ["--max_rollouts", "48"])
    with pytest.raises(SgpoError, match="was run with other settings"):
        study.run(study.cell("sgpo-seed1"))


def row(variant, seed, after, rollouts=100, limit=100):
    return {
        "study": "s", "variant": variant, "seed": seed, "accuracy_after": after, "guided_accuracy_after": None,
        "rollouts": rollouts, "rollout_tokens": 5.0, "steps": 2, "max_rollouts": limit,
        "curve": [[0, 0, 0.1], [2, 9, after]],
    }  # fmt: skip


def test_the_table_by_hand(tmp_path):
    rows = [row("a", s, v) for s, v in enumerate((0.5, 0.7, 0.6))] + [row("b", s, v) for s, v in ((0, 0.6), (2, 0.8))]
    assert paired(rows[3:], rows[:3]) == pytest.approx([0.1, 0.2])
    (_, a, b) = ((), *table_rows(rows, "a"))
    assert a[:4] == ("a", "3", "0.600 [0.352, 0.848]", "-")  # 0.6 -+ 4.3027 x 0.1 / sqrt 3
    assert a[4:6] == ("-", "-")
    assert b[4:6] == ("+0.150 [-0.485, +0.785]", "0.500")  # 0.15 -+ 12.706 x 0.0707 / sqrt 2; 2 of 4 signs
    page = write_study_report(rows, baseline="a", out=tmp_path)
    assert page.exists()
    assert markdown(rows, "a") == (tmp_path / "table.md").read_text().rstrip("\n")


def test_the_report_regenerates_from_rows_alone(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row("sgpo", s, 0.5)) + "\n" for s in (1, 2)))
    write(tmp_path)
    output = command(tmp_path, "study.yaml", "--report", "--results", "rows.jsonl", "--out", "again")
    assert "| sgpo | 2 | 0.500 [0.500, 0.500] |" in output
    assert (tmp_path / "again/plots/study.png").exists()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SgpoError, match="no finished cell"):
        report_study(Study(Path("study.yaml")), None, None)
