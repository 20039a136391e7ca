"""Results of the built-in rewards, and loading a reward by name; all in this process."""

import json
from pathlib import Path

import pytest

pytest.importorskip("math_verify")

from sgpo.rewards.registry import load_reward
from sgpo.rewards.verifier import gold_is_verifiable, verify_answer
from sgpo.types import RewardResult, SgpoError

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"


@pytest.mark.parametrize(
    ("completion", "gold", "reward"),
    [
        (r"\boxed{42}", "42", 1),
        (r"\boxed{042}", "42", 1),
        (r"\boxed{41}", "42", 0),
        (r"\boxed{0.5}", r"\frac{1}{2}", 1),
        (r"\boxed{\sqrt{117}}", r"3\sqrt{13}", 1),
        (r"\boxed{3}", r"3\sqrt{13}", 0),
        (r"\boxed{8221}", "8,221", 1),
        (r"\boxed{(1, 2)}", "(1,2)", 1),
        (r"\boxed{(1, 2]}", "(1,2)", 0),
        (r"\boxed{2, 1}", "1,2", 1),
        (r"\boxed{1} or \boxed{2}", "1,2", 0),
        (r"\boxed{1} or \boxed{2}", "2", 1),
        (r"\boxed{$\frac12$}", r"$\frac{1}{2}$", 1),
        (r"\boxed{x=5}", "5", 1),
        (r"\boxed{\text{East}}", r"\text{east}", 1),
        (r"\boxed{C}", "(C)", 1),
        (r"\boxed{16\text{ eggs}}", "16", 1),
        (r"\boxed{1+x}", "x+1", 1),
        (r"\boxed{blah blah 5}", "5", 0),
        (r"\boxed{\frac{}{ 5}", "5", 0),
        (r"<think>\boxed{5}</think> \boxed{6}", "5", 0),
    ],
)
def test_results_of_math_verify(completion, gold, reward):
    assert verify_answer(completion, gold).reward == reward


@pytest.mark.parametrize("completion", ["", "it is 5", "\\boxed{}", r"<think>\boxed{5}", r"<think>\boxed{5}</think> 5"])
def test_without_a_box_there_is_no_answer(completion):
    assert verify_answer(completion, "5") == RewardResult(0.0, "no_answer")


def test_without_require_box_math_verify_searches_the_text_after_the_thinking():
    assert verify_answer("<think>is it 6?</think> The answer is 5.", "5", require_box=False) == RewardResult(1.0)
    assert verify_answer("The answer is 6.", "5", require_box=False) == RewardResult(0.0)
    assert verify_answer("I cannot tell", "5", require_box=False) == RewardResult(0.0, "no_answer")
    assert verify_answer("<think>5", "5", require_box=False) == RewardResult(0.0, "no_answer")


@pytest.mark.parametrize("gold", ["", "  ", "$"])
def test_a_gold_answer_without_content_is_reported(gold):
    assert not gold_is_verifiable(gold)
    with pytest.raises(SgpoError, match="cannot read the gold answer"):
        verify_answer(r"\boxed{5}", gold)


@pytest.mark.parametrize("name", ["math500", "gsm8k_test", "amc23", "aime24"])
def test_gold_answers_of_the_benchmarks_verify(name):
    path = DATA / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"no {path.name} in ../shared/data")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    sample = rows[:: max(1, len(rows) // 60)]
    assert [row["answer"] for row in sample if not gold_is_verifiable(row["answer"])] == []


def test_exact_compares_strings():
    reward = load_reward("exact")
    assert reward(r"so \boxed{ 4 2 }", "42", "") == RewardResult(1.0)
    assert reward(r"\boxed{42.0}", "42", "") == RewardResult(0.0)
    assert reward("42", "42", "") == RewardResult(0.0, "no_answer")


def test_a_reward_of_ones_own_is_found_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "my_length_reward.py").write_text(
        "def fn(completion, answer, problem):\n    return len(completion) - 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in __import__("sys").path if entry])
    assert load_reward("my_length_reward:fn")("abcde", "", "") == RewardResult(2.0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mathverify", "is unknown: expected 'math_verify' or 'exact'"),
        ("json:", "is unknown"),
        (":loads", "is unknown"),
        ("no_such_module_of_mine:fn", "cannot be imported .*no_such_module_of_mine"),
        ("json:no_such_function", "json has no no_such_function"),
        ("math:pi", "math has pi = float"),
    ],
)
def test_a_wrong_name_is_one_sentence(spec, message):
    with pytest.raises(SgpoError, match=message):
        load_reward(spec)


@pytest.mark.parametrize("value", ["'5'", "None", "float('nan')", "float('inf')", "1j"])
def test_a_reward_that_is_no_finite_number_is_refused(value, tmp_path, monkeypatch):
    (tmp_path / "my_bad_reward.py").write_text(f"def fn(completion, answer, problem):\n    return {value}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "my_bad_reward", raising=False)
    with pytest.raises(SgpoError, match=r"'my_bad_reward:fn' returned .*: expected a finite number"):
        load_reward("my_bad_reward:fn")("", "", "")
