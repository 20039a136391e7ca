"""Golds that no completion can reach, by their text and by Math-Verify; and true answers that look odd."""

import pytest
from processes import scaled

from sgpo.rewards.golds import MAX_GOLD_CHARS, gold_faults, text_fault

PLACEHOLDERS = [
    *("proof", "Proof.", r"\text{proof}", r"\boxed{proof}", "see proof", "proof omitted", "proved", "Q.E.D.", "QED"),
    *(
        "notfound",
        "not found",
        "Not Found",
        "N/A",
        "n/a",
        r"\text{N/A}",
        "NA",
        "N.A.",
        "None",
        "none",
        "None.",
    ),
    *("null", "NaN", "unknown", "TBD", "todo", "?", "-", "--", "...", "…", "__", "[missing]", "placeholder", "omitted"),
    *("see solution", "See the solution above.", r"\text{see above}", "See figure", "refer to the explanation"),
    *("no answer", "answer not found", "not available", "not provided", "Answers may vary", "answer", "solution"),
    *("as required", "error", "ＮＵＬＬ", "(none)", "**N/A**", "Left to the reader"),
]
SOLUTIONS = [
    "3+2=<<3+2=5>>5 pens\n#### 5",
    "#### 5",
    "<<48/2=24>>24",
    "The answer is 5",
    "Therefore 5",
    "x=1, so the total is 5",
    "We have x=2. Then y is 3.",
    r"We get 2+3=5, so \boxed{5}",
    "We add.\nSo \\boxed{5}",
    "5\n6",
    "first line\r\nsecond line",
    "1" * (MAX_GOLD_CHARS + 1),
    "the number of apples " * 10,
]
TRUE_ANSWERS = [
    *(
        "5",
        "-1",
        "0.5",
        r"\$5",
        r"50\%",
        "1,000",
        r"\frac12",
        r"\pm 2",
        r"10^{-3}",
        r"3-\sqrt{2}",
        "-1-i",
        "*",
        "na",
        "nil",
    ),
    *(
        "undefined",
        r"\text{undefined}",
        r"\text{none}",
        "no solution",
        r"\text{does not exist}",
        "DNE",
        r"\text{impossible}",
        "infinity",
    ),
    *(r"\infty", r"\emptyset", r"\{\}", "true", "False", "yes", "No", "A", "(C)", r"\text{(C)}", "none of these"),
    *(r"5 \text{ p.m.}", "3 a.m.", "x = 1 or x = 2", r"\text{empty}", r"\text{St. Louis}", r"\text{neither}"),
    *(r"\text{all real numbers}", r"8 \text{ sq. units}", r"\text{Mr. Brown and Mr. Green}", "improve", "waterproof"),
    *("\\begin{pmatrix} 1 \\\\\n 2 \\end{pmatrix}", "$$\n5\n$$", r"\boxed{5}", r"$\boxed{\frac{1}{2}}$"),
    r"f(x)=a x+b, where b is an arbitrary integer, and a is an arbitrary positive integer with \mho(a)=0",
]


@pytest.mark.parametrize("gold", PLACEHOLDERS)
def test_a_word_in_place_of_an_answer(gold):
    assert text_fault(gold) == "stands for no answer"


@pytest.mark.parametrize("gold", SOLUTIONS)
def test_a_whole_solution(gold):
    assert text_fault(gold) not in (None, "stands for no answer")


@pytest.mark.parametrize("gold", TRUE_ANSWERS)
def test_a_true_answer(gold):
    assert text_fault(gold) is None


def test_math_verify_has_the_last_word():
    golds = ["5", "proof", r"\frac{\pi}{2}", "$", r"\text{east}"]
    faults = gold_faults(golds, reward="math_verify", workers=2, timeout_s=scaled(30.0))
    assert faults == {"proof": "stands for no answer", "$": "cannot be read by Math-Verify"}


def test_a_gold_that_hangs_math_verify_costs_one_time_out():
    faults = gold_faults(["9^{9^{9^{9}}}"], reward="math_verify", workers=1, timeout_s=scaled(2.0))
    assert list(faults.values()) == ["cannot be compared with itself by Math-Verify (timeout)"]


def test_other_rewards_have_other_golds():
    golds = ["proof", r"\frac{}{", "5", ""]
    assert gold_faults(golds[:3], reward="exact", workers=1, timeout_s=scaled(1.0)) == {"proof": "stands for no answer"}
    assert gold_faults(golds, reward="plugin:even", workers=1, timeout_s=scaled(1.0)) == {"": "is empty"}
