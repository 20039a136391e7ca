"""`sgpo verify` through the command line: what it says about one answer and about a file, and about bad input."""

import json

import pytest

pytest.importorskip("math_verify")

from sgpo import cli


def said(capsys, *words):
    code = cli.main(["verify", *words])
    return code, *capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (
            (r"\frac{15}{2}", r"So \boxed{**3(5)/2**}."),
            [
                "in the last box: **3(5)/2**",
                r"gold answer, tidied: \frac{15}{2}; to sympy: 15/2",
                "answer, tidied: 3(5)/2; to sympy: (3*5)/2",
                "decided by: exact numbers",
                "result: right, reward 1",
            ],
        ),
        (
            ("CAB", "ABC"),
            [
                "the answer has no box: taken as the content of one",
                "in the last box: ABC",
                "gold answer, tidied: CAB",
                "answer, tidied: ABC",
                "decided by: words, letter by letter",
                "result: wrong, reward 0",
            ],
        ),
        (
            ("1, 2", r"-\frac12, 2"),
            [
                "the answer has no box: taken as the content of one",
                r"in the last box: -\frac12, 2",
                "gold answer, tidied: 1 | 2",
                r"answer, tidied: -\frac12 | 2",
                "decided by: list, item by item in any order: nothing left in the answer is 1",
                "result: wrong, reward 0",
            ],
        ),
        (
            ("proof", "5"),
            [
                "the answer has no box: taken as the content of one",
                "the gold answer stands for no answer: a run would refuse its row (data.bad_golds)",
                "in the last box: 5",
                "gold answer, tidied: proof; to sympy: f*o*o*p*r",
                "answer, tidied: 5; to sympy: 5",
                "decided by: Math-Verify",
                "result: wrong, reward 0",
            ],
        ),
        (
            ("-3", "<think>-3", "--reward", "exact"),
            [
                "the answer has no box: taken as the content of one",
                "the thinking never ends, so there is no answer",
                "result: wrong, reward 0, status no_answer",
            ],
        ),
        (
            ("5", "9^{9^{9^9}}", "--timeout", "1"),
            [
                "the answer has no box: taken as the content of one",
                "no result within 1.0 s",
                "result: wrong, reward 0, status timeout",
            ],
        ),
    ],
)
def test_the_steps_of_one_result(capsys, words, lines):
    code, out, _ = said(capsys, *words)
    assert code == 0
    assert out.splitlines() == lines


def test_without_require_box_the_text_is_searched(capsys):
    code, out, _ = said(capsys, "5", "It is 5.", "--no-require-box")
    assert code == 0
    assert "no box; the text after the thinking is searched: It is 5." in out
    assert out.endswith("result: right, reward 1\n")


def test_a_file_of_pairs(capsys, tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"gold": "8", "answer": "3(5)", "label": 0},
        {"gold": "15", "completion": r"\boxed{3(5)}", "label": 1},
        {"gold": "5", "completion": "no box: 5", "label": 1},
        {"gold": r"5 \text{ cm}", "answer": r"50 \text{ mm}"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = said(capsys, "--file", str(path))
    lines = out.splitlines()
    assert code == 0
    assert [line.split(" | ")[0].split(": ")[1] for line in lines[:4]] == [
        "wrong, reward 0", "right, reward 1", "wrong, reward 0, status no_answer", "right, reward 1",
    ]  # fmt: skip
    assert [line.endswith("disagrees with its label") for line in lines[:4]] == [False, False, True, False]
    assert lines[4] == "4 rows: 2 right, 2 wrong; 1 of 3 labels disagree"


def test_a_reward_of_ones_own(capsys, tmp_path, monkeypatch):
    (tmp_path / "my_verify_reward.py").write_text(
        "def fn(completion, answer, problem):\n    return len(completion) / 2\n"
    )
    monkeypatch.chdir(tmp_path)
    code, out, _ = said(capsys, "5", "abc", "--reward", "my_verify_reward:fn")
    assert (code, out) == (0, "my_verify_reward:fn returned 1.5\nresult: right, reward 1.5\n")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "has no rows"),
        ("{", ":1: not valid JSON"),
        ("[]", ':1: expected an object with "gold"'),
        ('{"gold": "5"}', ':1: expected "completion"'),
        ('{"gold": 5, "answer": "5"}', ':1: expected an object with "gold", a string'),
        ('{"gold": "5", "answer": "5", "label": "yes"}', ":1: \"label\" must be 0 or 1, got 'yes'"),
    ],
)
def test_a_bad_file_is_one_sentence(capsys, tmp_path, content, sentence):
    path = tmp_path / "pairs.jsonl"
    path.write_text(content)
    code, out, err = said(capsys, "--file", str(path))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert sentence in err


@pytest.mark.parametrize("words", [(), ("5",), ("5", "5", "--file", "x.jsonl"), ("--file", "no_such.jsonl")])
def test_what_is_missing_is_said(capsys, words):
    code, out, err = said(capsys, *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
