"""Named benchmarks: the rows of the common hub copies become problems."""

import json
from pathlib import Path

import pytest

from sgpo.evaluation.benchmarks import BENCHMARKS, content_hash, load_benchmark, row_converter, spaced_list
from sgpo.types import Problem, SgpoError

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        (
            "math500",
            {"problem": "q", "solution": "s", "answer": "2", "subject": "Algebra", "level": 1, "unique_id": "t/1.json"},
            ("t/1.json", "q", "2", "s"),
        ),
        ("amc23", {"id": 7, "question": "q", "answer": "27", "url": "u"}, ("amc23/7", "q", "27", None)),
        ("amc23", {"id": 0, "problem": "q", "answer": 27.0}, ("amc23/0", "q", "27", None)),
        ("aime24", {"id": 60, "problem": "q", "answer": "033", "year": "2024"}, ("aime24/60", "q", "033", None)),
        (
            "gsm8k",
            {"question": "q", "answer": "She has <<3+2=5>>5.\n#### 1,005"},
            ("gsm8k/3", "q", "1005", None),
        ),
        (
            "olympiadbench",
            {"id": 2349, "question": "q", "solution": ["one", "two"], "final_answer": ["$221,$8$"], "context": None,
             "is_multiple_answer": True, "unit": None, "answer_type": "Numerical", "error": None},
            ("olympiadbench/2349", "q", "221, 8", "one\n\ntwo"),
        ),
        (
            "olympiadbench",
            {"id": 2, "question": "q", "solution": [], "final_answer": ["$69$,$84$"], "context": "Given.",
             "is_multiple_answer": True},
            ("olympiadbench/2", "Given.\n\nq", "69, 84", None),
        ),
        (
            "olympiadbench",
            {"id": 3, "question": "q", "final_answer": ["166"], "context": "", "is_multiple_answer": False},
            ("olympiadbench/3", "q", "166", None),
        ),
        ("mine", {"id": "a", "problem": "q", "answer": 3}, ("a", "q", "3", None)),
    ],
)  # fmt: skip
def test_rows_of_the_hub(tmp_path, name, row, expected):
    filler = [{"id": f"f{i}", "problem": f"{i}", "answer": "1"} for i in range(3)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in [*filler, row]))
    found_name, problems = load_benchmark(f"{name}={path}", None)
    problem = problems[-1]
    assert (found_name, (problem.id, problem.problem, problem.answer, problem.solution)) == (name, expected)
    assert "is_multiple_answer" not in row or problem.extra["is_multiple_answer"] == row["is_multiple_answer"]


def test_a_row_is_not_changed_in_place_and_a_bad_one_is_named(tmp_path):
    row = {"question": "q", "answer": "1"}
    row_converter("x")(0, row)
    assert row == {"question": "q", "answer": "1"}
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 1, "question": "q"}\n[1]\n{"id": 2, "answer": 0.5, "problem": "p"}')
    with pytest.raises(SgpoError) as caught:
        load_benchmark(f"amc23={path}", None)
    assert "rows.jsonl:1: 'answer' must be a string, got null" in str(caught.value)
    assert "rows.jsonl:2: expected a JSON object" in str(caught.value)
    assert "rows.jsonl:3: 'answer' must be a string, got a float" in str(caught.value)


def test_lists_are_spaced_so_that_no_comma_reads_as_thousands():
    assert spaced_list("8,221") == "8, 221"
    assert spaced_list("(1,2), (3,4)") == "(1, 2), (3, 4)"


@pytest.mark.parametrize(
    ("spec", "folder", "message"),
    [
        ("math500", None, "Set eval.benchmark_dir"),
        ("math500", "empty", "has no math500.jsonl"),
        ("olympiadbench", "empty", "has no olympiadbench.jsonl or olympiadbench_oe_to_maths_en.jsonl"),
        ("MATH-500", None, "is unknown; did you mean 'math500'"),
        ("mine=hf", None, "'mine' is unknown"),
        ("../x=y.jsonl", None, "no usable name"),
        ("mine=absent.jsonl", None, "No data file at absent.jsonl"),
    ],
)
def test_what_is_not_there_is_one_sentence(tmp_path, spec, folder, message):
    with pytest.raises(SgpoError, match=message):
        load_benchmark(spec, folder and str(tmp_path))


def test_a_configuration_of_a_hub_dataset_is_passed_on(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset",
        lambda *names, split: asked.append((*names, split)) or [{"question": "q", "answer": "#### 5", "id": 1}],
    )  # fmt: skip
    for name in BENCHMARKS:
        load_benchmark(f"{name}=hf", None)
    assert asked == [
        ("HuggingFaceH4/MATH-500", None, "test"),
        ("math-ai/amc23", None, "test"),
        ("HuggingFaceH4/aime_2024", None, "train"),
        ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train"),
        ("openai/gsm8k", "main", "test"),
    ]


def test_the_content_hash_sees_every_field_and_the_order():
    base = [Problem("a", "p", "1"), Problem("b", "q", "2")]
    others = [
        [Problem("a", "p", "1"), Problem("b", "q", "3")],
        [Problem("a", "p", "1"), Problem("b", "r", "2")],
        [Problem("a", "p", "1"), Problem("c", "q", "2")],
        [Problem("ap", "", "1"), Problem("b", "q", "2")],
        base[::-1],
        base[:1],
    ]
    assert len({content_hash(problems) for problems in [base, *others]}) == 7


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_the_real_files_load():
    counts = {name: len(load_benchmark(name, str(SHARED))[1]) for name in BENCHMARKS}
    assert counts == {"math500": 500, "amc23": 40, "aime24": 30, "olympiadbench": 675, "gsm8k": 1319}
    olympiad = load_benchmark("olympiadbench", str(SHARED))[1]
    assert sum(bool(p.extra["is_multiple_answer"]) for p in olympiad) == 94
    assert sum(bool(p.extra["unit"]) for p in olympiad) == 8
    assert next(p.answer for p in olympiad if p.id == "olymp/2349") == "221, 8"
