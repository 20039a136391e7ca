"""Evaluation problems that are in the training data."""

from sgpo.evaluation.contamination import find_contamination, without_spacing
from sgpo.types import Problem

LONG = (
    "A train leaves the station at noon and travels north at sixty miles per hour while a second train leaves the same "
    "station at one and travels south at forty miles per hour. How far apart are they at four?"
)


def found(train, evaluation, **options):
    rows = [[Problem(f"{kind}{i}", text, "1") for i, text in enumerate(texts)] for kind, texts in
            (("t", train), ("e", evaluation))]  # fmt: skip
    return [(m.id, m.train_id, m.how) for m in find_contamination(rows[0], rows[1], **options)]


def test_the_three_ways():
    train = ["other", r"Find $\frac{1}{2}+x$.", LONG]
    reworded = LONG.replace("How far apart are they at four?", "What is their distance then?")
    assert found(train, [LONG, r"find \dfrac{1}{2}\, + x", reworded, "unrelated"]) == [
        ("e0", "t2", "exact"),
        ("e1", "t1", "normalised"),
        ("e2", "t2", "overlap"),
    ]


def test_notation_that_does_not_matter():
    same = [
        r"$\left( 3, \frac{\pi}{2} \right)$",
        r"(3,\tfrac{\pi}{2})",
        r"( 3,~ \dfrac {\pi} {2} )  ",
        "（3,\\frac{\\pi}{2}）",
    ]
    assert len({without_spacing(text) for text in same}) == 1
    assert without_spacing(r"\leftarrow x") != without_spacing("arrow x")
    assert without_spacing("x + 1") != without_spacing("x - 1")


def test_a_common_phrase_is_no_contamination():
    phrase = "the value can be written as m over n where m and n are relatively prime positive integers find m plus n"
    train = [f"Alice rolls a die until she has seen each side at least twice in a row and stops {phrase}"]
    other = [f"A circle of radius nine meets a line through the centre of its square and the area is k {phrase}"]
    assert found(train, other) == []
    assert found(train, other, min_overlap=0.1) == [("e0", "t0", "overlap")]


def test_the_share_is_of_one_training_problem():
    """Half of the text in one training problem and half in another do not add up."""
    words = LONG.split()
    halves = [" ".join(words[:24]), " ".join(words[-24:])]
    assert found(halves, [LONG], min_overlap=0.6) == []
    assert found([LONG], halves, min_overlap=1.0) == [("e0", "t0", "overlap"), ("e1", "t0", "overlap")]


def test_numbers_count():
    changed = (
        LONG.replace("sixty", "70").replace("forty", "30").replace("four", "5").replace("one", "2").replace("noon", "9")
    )
    assert found([LONG], [changed]) == []


def test_the_earliest_training_problem_is_named_and_short_texts_are_compared_as_a_whole():
    assert found(["x = 1?", "x = 1?"], ["x = 1?", "X=1"]) == [("e0", "t0", "exact"), ("e1", "t0", "normalised")]
    assert found([], ["x"]) == []
