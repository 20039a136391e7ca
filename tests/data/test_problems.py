"""Loading problems: what is accepted, and that every bad row is named by file and line."""

import json
from pathlib import Path

import pytest

from sgpo.data.problems import MAX_LISTED, check_disjoint, load_problems
from sgpo.types import ChatTurn, Problem, SgpoError

SHARED = Path(__file__).parents[2].parent / "shared" / "data"

GOOD = {"id": "a", "problem": "What is 1 + 1?", "answer": "2"}


def write(path: Path, *rows: object) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def error_of(source: str, **options: int) -> str:
    with pytest.raises(SgpoError) as caught:
        load_problems(source, **options)
    return str(caught.value)


@pytest.fixture
def local_datasets(tmp_path, monkeypatch):
    """The datasets package, offline and with its cache under tmp_path."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True, raising=False)
    return datasets


def test_all_fields_are_read(tmp_path):
    turns = [{"role": "user", "content": "1+2?"}, {"role": "assistant", "content": "3"}]
    row = {**GOOD, "strategy": "Add.", "solution": "1+1=2", "guidance_turns": turns, "level": 3}
    assert load_problems(write(tmp_path / "p.jsonl", row)) == [
        Problem(
            id="a",
            problem="What is 1 + 1?",
            answer="2",
            strategy="Add.",
            guidance_turns=(ChatTurn("user", "1+2?"), ChatTurn("assistant", "3")),
            solution="1+1=2",
            extra={"level": 3},
        )
    ]


def test_blank_lines_null_options_and_integer_answers_are_accepted(tmp_path):
    row = {**GOOD, "answer": -7, "strategy": None, "guidance_turns": [], "solution": None}
    (problem,) = load_problems(write(tmp_path / "p.jsonl", "", row, "   ", ""))
    assert problem == Problem("a", "What is 1 + 1?", "-7")
    assert not problem.has_guidance


def test_text_is_kept_exactly(tmp_path):
    text = " Let \\frac{1}{2} — é\u2028x "
    (problem,) = load_problems(write(tmp_path / "p.jsonl", json.dumps({**GOOD, "problem": text}, ensure_ascii=False)))
    assert problem.problem == text


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ('{"id": "a", ', "not valid JSON"),
        ("[1, 2]", "expected a JSON object, got a list"),
        ('{"answer": ' + "9" * 5000 + "}", "not valid JSON"),
        ({"id": "a", "problem": "q"}, "missing key 'answer'"),
        ({**GOOD, "problem": "  "}, "'problem' is empty"),
        ({**GOOD, "id": 3}, "'id' must be a string, got an integer"),
        ({**GOOD, "answer": 0.5}, "'answer' must be a string, got a float"),
        ({**GOOD, "answer": True}, "'answer' must be a string, got a boolean"),
        ({**GOOD, "answer": None}, "'answer' must be a string, got null"),
        ({**GOOD, "problem": "\ud800"}, "'problem' holds half of a surrogate pair"),
        ({**GOOD, "strategy": ["x"]}, "'strategy' must be a string, got a list"),
        ({**GOOD, "solution": ""}, "'solution' is empty"),
        ({**GOOD, "guidance_turns": "x"}, "'guidance_turns' must be a list of chat turns"),
        ({**GOOD, "guidance_turns": [{"role": "user", "content": "x"}]}, "must end with an assistant turn"),
        ({**GOOD, "guidance_turns": [{"role": "user"}] * 2}, "guidance turn 0 must be an object with the keys role"),
        (
            {**GOOD, "guidance_turns": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "x"}]},
            "guidance turn 0 must have the role 'user'",
        ),
        (
            {**GOOD, "guidance_turns": [{"role": "user", "content": ""}, {"role": "assistant", "content": "x"}]},
            "guidance turn 0: 'content' is empty",
        ),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, expected):
    source = write(tmp_path / "p.jsonl", {**GOOD, "id": "first"}, "", row)
    message = error_of(source)
    assert f"{source}:3: " in message
    assert expected in message


def test_every_bad_row_is_in_one_error(tmp_path):
    source = write(tmp_path / "p.jsonl", "nonsense", GOOD, {"id": "", "answer": "1"})
    message = error_of(source)
    assert "3 faults" in message
    assert f"{source}:1: not valid JSON" in message
    assert f"{source}:3: 'id' is empty" in message
    assert f"{source}:3: missing key 'problem'" in message
    assert f"{source}:2" not in message


def test_long_lists_of_bad_rows_are_counted(tmp_path):
    message = error_of(write(tmp_path / "p.jsonl", *["nonsense"] * (MAX_LISTED + 5)))
    assert message.count("not valid JSON") == MAX_LISTED
    assert "and 5 more" in message


def test_duplicate_ids_name_both_lines(tmp_path):
    source = write(tmp_path / "p.jsonl", GOOD, {**GOOD, "id": "b"}, GOOD)
    assert f"{source}:3: duplicate id 'a', first used at {source}:1" in error_of(source)


def test_invalid_utf8_names_the_line_and_the_rest_is_checked(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\xff\xfe\n{}\n")
    message = error_of(str(path))
    assert f"{path}:2: not UTF-8" in message
    assert f"{path}:3: missing key 'id'" in message


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_and_missing_files(tmp_path, content):
    assert "holds no problems" in error_of(write(tmp_path / "p.jsonl", content))
    assert "No data file at" in error_of(str(tmp_path / "absent.jsonl"))


def test_limit_reads_only_the_first_rows(tmp_path):
    source = write(tmp_path / "p.jsonl", GOOD, "", {**GOOD, "id": "b"}, "nonsense")
    assert [problem.id for problem in load_problems(source, limit=2)] == ["a", "b"]
    assert f"{source}:4" in error_of(source, limit=3)
    assert "at least 1" in error_of(source, limit=0)


def test_check_disjoint_lists_shared_problems():
    train = [Problem("t1", "What is  Two plus\ntwo?", "4"), Problem("t2", "x + 1", "1")]
    check_disjoint(train, [Problem("e0", "x - 1", "1")])
    with pytest.raises(SgpoError, match=r"'e1' is training 't1'") as caught:
        check_disjoint(train, [Problem("e1", "what is two plus two?", "4"), Problem("e2", "x - 1", "1")])
    assert "e2" not in str(caught.value)


def test_saved_dataset_folder(tmp_path, local_datasets):
    turns = [{"role": "user", "content": "1+2?"}, {"role": "assistant", "content": "3"}]
    rows = [{**GOOD, "guidance_turns": turns, "level": 1}, {**GOOD, "id": "b", "guidance_turns": None, "level": 2}]
    table = local_datasets.Dataset.from_list(rows)
    table.save_to_disk(str(tmp_path / "plain"))
    local_datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "splits"))
    for name in ("plain", "splits"):
        first, second = load_problems(str(tmp_path / name))
        assert first.guidance_turns == (ChatTurn("user", "1+2?"), ChatTurn("assistant", "3"))
        assert (second.id, second.guidance_turns, second.extra) == ("b", (), {"level": 2})


def test_parquet_json_and_hf_prefix(tmp_path, local_datasets):
    folder = tmp_path / "files"
    folder.mkdir()
    rows = [{**GOOD, "id": name} for name in "abc"]
    local_datasets.Dataset.from_list(rows).to_parquet(str(folder / "train.parquet"))
    (tmp_path / "p.json").write_text(json.dumps(rows), encoding="utf-8")
    for source in (str(folder / "train.parquet"), str(tmp_path / "p.json"), f"hf:{folder}", f"hf:{folder}:train"):
        assert [problem.id for problem in load_problems(source, limit=2)] == ["a", "b"]
    assert "cannot load split 'nowhere'" in error_of(f"hf:{folder}:nowhere")


def test_bad_dataset_rows_are_named(tmp_path, local_datasets):
    local_datasets.Dataset.from_list([GOOD, {**GOOD, "answer": None}]).save_to_disk(str(tmp_path / "d"))
    assert f"{tmp_path / 'd'} row 2: 'answer' must be a string, got null" in error_of(str(tmp_path / "d"))
    (tmp_path / "empty").mkdir()
    assert "cannot load" in error_of(str(tmp_path / "empty"))


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_real_files_load_and_the_empty_golds_are_found():
    assert len(load_problems(str(SHARED / "gsm8k_test.jsonl"))) == 1319
    assert len(load_problems(str(SHARED / "math500.jsonl"))) == 500
    message = error_of(str(SHARED / "math_train_full.jsonl"))
    assert "2 faults" in message
    assert message.count("'answer' is empty") == 2
