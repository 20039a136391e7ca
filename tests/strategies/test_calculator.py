"""Strategies from calculator marks: readable steps, and nothing that looks like a number."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sgpo.strategies.calculator import attach_strategies, leaks, strategy_from_calculator_trace
from sgpo.types import Problem

SHARED = Path(__file__).parents[2].parent / "shared" / "data"

CLIPS = Problem(
    "clips",
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
    "How many clips did Natalia sell altogether in April and May?",
    "72",
    solution="Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
    "Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.",
)


def problem(solution: str, text: str = "", answer: str = "999") -> Problem:
    return Problem("p", text or "A question?", answer, solution=solution)


def steps(solution: str, text: str = "") -> list[str]:
    strategy = strategy_from_calculator_trace(solution, text)
    assert strategy is not None
    return [line.removeprefix("- ") for line in strategy.splitlines() if line.startswith("- ")]


def test_three_parts_and_one_step_per_mark():
    strategy = strategy_from_calculator_trace(CLIPS.solution or "", CLIPS.problem)
    assert strategy is not None
    lines = strategy.splitlines()
    assert lines[0] == "Problem type: a multi-step arithmetic word problem about fractions."
    assert lines[1].startswith("Strategy: ")
    assert "division and addition" in lines[1]
    assert lines[2:] == [
        "Steps:",
        "- First, divide the given amount by the fitting factor to find how many clips Natalia sold in May.",
        "- Finally, add the given amount and the number of clips just found to find "
        "how many clips Natalia sold altogether in April and May.",
    ]


@pytest.mark.parametrize(
    ("solution", "expected"),
    [
        (
            "If he babysits for 2 hours at $7 per hour, he will earn 2*7 = $<<2*7=14>>14",
            "Multiply the number of hours by the amount of money per hour to find how much money he will earn.",
        ),
        (
            "There were 80 cans and 20 boxes, so there are 80-20 = <<80-20=60>>60 more cans than boxes.",
            "Subtract the number of boxes from the number of cans to find how many more cans there are than boxes.",
        ),
        (
            "His total number of grades is 9 because 3 + 4 + 2 = <<3+4+2=9>>9",
            "Add the given amounts to find his total number of grades.",
        ),
        (
            "First find the difference in wages: $40/hour - $30/hour = $<<40-30=10>>10/hour",
            "Take the difference between the amounts of money per hour to find the difference in wages.",
        ),
        (
            "20% of 60 pears are ripe. So 60*20/100 = <<60*20/100=12>>12 pears are ripe.",
            "Take the given percentage of the number of pears to find how many pears are ripe.",
        ),
        (
            "Tom's dog is 24/4 = <<24/4=6>>6 years old currently.",
            "Divide the given amount by the fitting factor to find how old Tom's dog is currently.",
        ),
    ],
)
def test_single_steps_read_as_sentences(solution, expected):
    # The numbers are given in the solution alone here, except the last one's divisor.
    text = "Tom is 24." if "dog" in solution else ""
    assert steps(solution, text) == [expected]


def test_mixed_expressions_and_marks_without_an_operation():
    assert steps("It costs 3*4+5*6 = <<3*4+5*6=42>>42 dollars.")[0].startswith("Multiply first, then add the parts up")
    assert steps("They need (8-2)/3 = <<(8-2)/3=2>>2 bags.")[0].startswith("Subtract first, then divide")
    assert steps("So, x = <<7=7>>7 goats.")[0].startswith("Work out the next quantity")
    assert steps("They have <<2^3=8>>8 goats.")[0].startswith("Work out the next quantity")
    assert steps("They have <<2**3=8>>8 goats.")[0].startswith("Work out the next quantity")
    assert steps("They have <<(2+=8>>8 goats.")[0].startswith("Work out the next quantity")
    assert steps("They have <<-(2+1)*3=-9>>-9 goats.")[0].startswith("Add first, then multiply")


def test_no_mark_gives_none():
    assert strategy_from_calculator_trace("We add 2 and 3 to get 5.") is None
    assert strategy_from_calculator_trace("") is None


def test_repeated_calls_agree():
    assert len({strategy_from_calculator_trace(CLIPS.solution or "", CLIPS.problem) for _ in range(3)}) == 1


@pytest.mark.parametrize(
    "solution",
    [
        "The last two students bought 1+1=<<1+1=2>>2 pencils each for twelve days.",
        "Half of the 6-year-old children got 3*$1.50 = $<<3*1.5=4.5>>4.50 for twenty-five of the 30% off toys.",
        "Three-fifths of 3 dozen eggs is 36*3/5 = <<36*3/5=21.6>>21.6 eggs for one hour, twice a third day.",
        "The ½ price was 5*.30 = $<<5*.30=1.5>>1.50 per half pound for 2,000 people on the 4th floor.",
    ],
)
def test_nothing_like_a_number_survives(solution):
    strategy = strategy_from_calculator_trace(solution, solution.partition("=")[0])
    assert strategy is not None
    assert leaks(strategy, problem(solution)) == []


TOKENS = "she sold 3 half twelve $5 <<3*4=12>>12 <<2+-(1)/4=9>>$9 of is because 1/2 30% the = dogs . a-4"
WORDS = st.sampled_from(TOKENS.split())


@settings(max_examples=300, deadline=None)
@example(words=[], expression="0/...")
@given(words=st.lists(WORDS, max_size=25), expression=st.text("0123456789+-*/(). ", max_size=12))
def test_any_text_gives_a_strategy_without_numbers(words, expression):
    solution = f"{' '.join(words)} <<{expression}=7>>7 cats"
    strategy = strategy_from_calculator_trace(solution, " ".join(words[:5]))
    assert strategy is not None
    assert leaks(strategy, problem(solution)) == []


@pytest.mark.parametrize(
    ("strategy", "found"),
    [
        ("Add the pages.", []),
        ("Add 12 pages.", ["12"]),
        ("Add 1,250.5 now", ["1,250.5"]),
        ("Take Twelve away, twenty-five too.", ["Twelve", "twenty", "five"]),
        ("Take half, then a third.", ["half", "third"]),
        ("Take ¾ of it.", ["¾"]),
        ("Often someone phones the second tenant first.", []),
        ("The result is x + y.", ["x + y"]),
    ],
)
def test_leaks(strategy, found):
    assert leaks(strategy, problem("", answer="x + y")) == found


def test_attach_fills_only_what_is_absent_and_counts():
    kept = replace(CLIPS, id="kept", strategy="my own")
    unmarked = problem("No marks here.")
    bare = Problem("bare", "A question?", "1")
    leaky = replace(CLIPS, id="leaky", answer="natalia")
    filled, report = attach_strategies([CLIPS, kept, unmarked, bare, leaky])
    assert [item.id for item in filled] == ["clips", "kept", "p", "bare", "leaky"]
    assert replace(filled[0], strategy=None) == CLIPS
    assert filled[0].strategy == strategy_from_calculator_trace(CLIPS.solution or "", CLIPS.problem)
    assert [item.strategy for item in filled[1:]] == ["my own", None, None, None]
    assert (report.total, report.already_present, report.extracted, report.without_mark) == (5, 1, 1, 2)
    assert report.leaked == (("leaky", ("natalia",)),)


@pytest.mark.skipif(not (SHARED / "gsm8k_train.jsonl").is_file(), reason="needs ../shared/data")
def test_the_whole_gsm8k_training_set():
    lines = (
        (SHARED / "gsm8k_train.jsonl").read_text(encoding="utf-8").strip().split("\n")
    )  # not splitlines: U+2028 is text
    rows = [json.loads(line) for line in lines]
    problems = [Problem(row["id"], row["problem"], row["answer"], solution=row["solution"]) for row in rows]
    filled, report = attach_strategies(problems)
    marked = [item for item in problems if "<<" in (item.solution or "")]
    assert report.total == len(filled) == 7473
    assert report.leaked == ()
    # 95 solutions have no mark at all, so 99% can only be asked of the others.
    assert report.extracted >= 0.99 * len(marked)
    assert report.without_mark == len(problems) - len(marked) == 95
    bullets = [line for item in filled if item.strategy for line in item.strategy.splitlines() if line.startswith("- ")]
    assert sum(" to find " in line for line in bullets) >= 0.95 * len(bullets)
