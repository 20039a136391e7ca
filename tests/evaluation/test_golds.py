"""Bad answers and duplicates, before a run: named by file and row, refused or left out."""

import json

import pytest

from sgpo import cli
from sgpo.builders.task import load_task
from sgpo.config import Config
from sgpo.data.problems import load_problems
from sgpo.evaluation.golds import check_problems, duplicates
from sgpo.model.loading import load_tokenizer
from sgpo.types import Problem, SgpoError
from sgpo.utils.config_file import checked


def config(**data):
    raw = {"model": {"path": "m"}, "data": {"train": "t", **data}, "reward": {"kind": "exact"}}
    return checked(Config, {**raw, "rollout": {"engine": "hf"}}, "test")


@pytest.fixture
def problems(tmp_path):
    answers = ["1", "proof", "2", ""]
    rows = [json.dumps({"id": f"p{i}", "problem": f"q{i}", "answer": answer}) for i, answer in enumerate(answers)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return load_problems(str(path), empty_answers=True)


def test_bad_golds_are_named_by_file_and_row_and_refused(problems):
    with pytest.raises(SgpoError) as caught:
        check_problems(config(), "rows", problems, print)
    head, *rows = str(caught.value).splitlines()
    assert head == (
        "rows: 2 of 4 problems have an answer that no completion can reach; correct or remove these rows, or set "
        "data.bad_golds to drop:"
    )
    assert [row.partition("rows.jsonl:")[2] for row in rows] == [
        "2 ('p1'): the answer 'proof' stands for no answer",
        "4 ('p3'): the answer '' is empty",
    ]


def test_bad_golds_are_left_out_and_listed(problems):
    lines = []
    kept, dropped = check_problems(config(bad_golds="drop"), "rows", problems, lines.append)
    assert [p.id for p in kept] == ["p0", "p2"]
    assert [(d.id, d.answer, d.reason) for d in dropped] == [
        ("p1", "proof", "stands for no answer"),
        ("p3", "", "is empty"),
    ]
    assert len(lines) == 1
    assert "2 of 4 problems" in lines[0]
    assert "rows.jsonl:4" in lines[0]


def test_a_file_of_nothing_but_bad_golds_is_refused(problems):
    with pytest.raises(SgpoError, match="2 of 2 problems"):
        check_problems(config(bad_golds="drop"), "rows", problems[1::2], print)


def test_duplicates_are_counted_and_contradictions_named():
    def rows(*pairs):
        return [Problem(f"p{i}", text, answer, place=f"f:{i}") for i, (text, answer) in enumerate(pairs)]

    assert duplicates("f", rows(("a", "1"), ("b", "1"))) == ""
    assert duplicates("f", rows(("a b", "1"), ("A  b", "$1$"), ("c", "2"))) == (
        "f: 1 of 3 problems repeat the text of another"
    )
    assert duplicates("f", rows(("a", "2"), ("a", "2"), ("a", "3"), ("b", "1"), ("b", "1"))).splitlines() == [
        "f: 3 of 5 problems repeat the text of another; 1 of these texts have different answers:",
        "  f:0 '2', f:1 '2', f:2 '3'",
    ]


def test_what_a_run_leaves_out_stands_in_its_folder(builtin_folder, problems, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    raw = {
        "model": {"path": str(builtin_folder)},
        "data": {"train": "builtin", "eval": "rows.jsonl", "bad_golds": "drop"},
        "rollout": {"engine": "hf"},
        "reward": {"kind": "exact"},
    }
    run = checked(Config, raw, "test")
    run.run.dir.mkdir(parents=True)
    task = load_task(run, load_tokenizer(builtin_folder), split="eval")
    assert [p.id for p in task.problems] == ["p0", "p2"]
    assert "rows.jsonl: 2 of 4 problems have an answer that no completion can reach and are left out" in (
        capsys.readouterr().out
    )
    dropped = json.loads((run.run.dir / "dropped_eval.json").read_text())
    assert [(row["id"], row["place"]) for row in dropped] == [("p1", "rows.jsonl:2"), ("p3", "rows.jsonl:4")]


def test_the_command_refuses_a_benchmark_of_worked_solutions(builtin_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    row = {"question": "farm : 3 8 2 5 . how many boxes ?", "answer": "3+2=<<3+2=5>>5\n#### 10"}
    (tmp_path / "hub.jsonl").write_text(json.dumps(row) + "\n")
    words = ["eval", f"--model.path={builtin_folder}", "--rollout.engine=hf", "--eval.benchmarks=mine=hub.jsonl"]
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert "mine: 1 of 1 problems have an answer that no completion can reach" in error
    assert "hub.jsonl:1" in error
