"""Finding the final answer in a completion."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgpo.rewards.answers import after_thinking, bare_answer, condense, last_boxed, normalised


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {  7 }", "7"),
        (r"\fbox{east}", "east"),
        (r"\boxed{x = \fbox{5}}", "5"),
        (r"\boxed 5", "5"),
        (r"answer $\boxed 12.$ Done", "12"),
        (r"$\boxed \frac{1}{2}$", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"a \\ \boxed{3}", "3"),
        (r"a \\\boxed{3}", "3"),
        (r"a \\boxed{3}", "3"),
        (r"stray } and { then \boxed{4}", "4"),
        (r"\boxed{5} and then cut off \boxed{\frac{1}{", "5"),
        (r"\boxed{8} goes in \boxed{}", "8"),
        (r"\boxed{open \boxed{6}", "6"),
        (r"\boxed{", None),
        (r"\boxed{}", None),
        (r"\boxed{ }", None),
        (r"\boxed{5\ }", "5"),
        (r"\boxed 5\, and", "5"),
        (r"\boxed \boxed{9}", "9"),
        (r"\boxed x\boxed{9}", "9"),
        (r"\boxedtext{5}", None),
        ("no box: 5", None),
        ("", None),
    ],
)
def test_last_boxed(text, expected):
    assert last_boxed(text) == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("no thinking", "no thinking"),
        ("<think>hm</think> yes", " yes"),
        ("opened by the prompt</think>yes", "yes"),
        ("<think>a</think>b<think>c</think>d", "d"),
        ("<think>never ends", None),
        ("<think>a</think>b<think>again", None),
        ("[THINK]a[/THINK]b", "b"),
        ("<|begin_of_thought|>a<|end_of_thought|>b", "b"),
        ("</think>", ""),
    ],
)
def test_after_thinking(completion, expected):
    assert after_thinking(completion) == expected


def test_condense_keeps_only_the_last_box_after_the_thinking():
    assert condense(r"<think>\boxed{1}</think>\boxed{2}, no: \boxed{3}") == r"\boxed{3}"
    assert condense(r"<think>\boxed{1}</think>none") == ""
    assert condense(r"<think>\boxed{1}") == ""
    assert condense("<think>x</think>it is 5", require_box=False) == "it is 5"
    assert condense(r"it is 5, \boxed{6}", require_box=False) == r"\boxed{6}"


pieces = st.lists(
    st.sampled_from(
        ["\\boxed{", "\\boxed ", "\\fbox{", "{", "}", "\\", "\\{", "$", " ", "5", "<think>", "</think>", "x."]
    ),
    max_size=25,
).map("".join)


@settings(max_examples=500, deadline=None)
@given(pieces, st.booleans())
def test_condensing_twice_changes_nothing(completion, require_box):
    once = condense(completion, require_box)
    assert condense(once, require_box) == once


@settings(deadline=None)
@given(pieces)
def test_a_box_put_last_is_found(prefix):
    assert last_boxed(prefix + " \\boxed{42}") == "42"


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 100_000,
        "\\boxed{" * 50_000 + "}" * 50_000,
        "\\boxed{" + "{" * 100_000 + "}" * 100_000 + "}",
        "\\boxed " * 100_000,
        "\\boxed" + " " * 500_000,
        "\\boxed a{" * 60_000,
        "\\" * 500_000,
        "{" * 500_000,
        "<think></think>" * 30_000,
    ],
    ids=["open", "nested", "braces", "bare", "spaces", "bare brace", "backslashes", "open braces", "thinking"],
)
def test_time_is_linear(text):
    start = time.process_time()
    condense(text)
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize(
    ("gold", "expected"),
    [
        (" 5 ", "5"),
        ("$5$", "5"),
        ("$$5$$", "5"),
        (r"\(5\)", "5"),
        (r"\[5\]", "5"),
        (r"\boxed{5}", "5"),
        (r"$\boxed{5}$", "5"),
        ("$1$ and $2$", "$1$ and $2$"),
        (r"\$5", r"\$5"),
        ("$", "$"),
        ("$$", "$$"),
        ("", ""),
    ],
)
def test_bare_answer(gold, expected):
    assert bare_answer(gold) == expected


def test_normalised_ignores_white_space_delimiters_and_full_stop():
    assert normalised(r"$ \frac {1}{2}. $") == normalised(r"\frac{1}{2}") == r"\frac{1}{2}"
    assert normalised("1 2") != normalised("1 3")
