"""Results against labels: hand-written answers, gold answers of the benchmarks, wrong answers near the right one."""

import itertools
import os
import re
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("math_verify")

from sgpo.evaluation.benchmarks import BENCHMARKS, load_benchmark
from sgpo.rewards.items import answer_readings, gold_items
from sgpo.rewards.notation import tidy
from sgpo.rewards.quantities import has_variables
from sgpo.rewards.verifier import verify_answer

LABELLED = ("labelled.txt", "labelled_kinds.txt")
SHARED = Path(__file__).parents[2].parent / "shared" / "data"
FULL = os.environ.get("SGPO_ALL_GOLDS") == "1"  # every gold answer instead of a sample; see the README

# Gold answers that cannot verify, by id, with the reason. None at present.
UNVERIFIABLE_GOLDS: dict[str, str] = {}


def labelled():
    """(gold, answer as written in the file, whole response, label)."""
    gold = ""
    texts = [Path(__file__).with_name(name).read_text(encoding="utf-8") for name in LABELLED]
    for line in "\n".join(texts).split("\n"):
        if not line.strip() or line.startswith("#"):
            continue
        if not line.startswith("  "):
            gold = line
            continue
        sign, answer = line[2], line[4:]
        raw = re.fullmatch(r"raw ?(.*)", answer)
        response = raw[1].replace(r"\n", "\n") if raw else rf"So the answer is $\boxed{{{answer}}}$."
        yield gold, answer, response, {"+": 1.0, "-": 0.0}[sign]


def reward(response, gold):
    """As the pool counts it: what Math-Verify cannot compare is worth 0."""
    try:
        return verify_answer(response, gold).reward
    except (ValueError, TypeError, AttributeError, NotImplementedError):
        return 0.0


def sampled(rows, count):
    return rows if FULL else rows[:: max(1, len(rows) // count)]


def test_labelled_answers():
    rows = list(labelled())
    assert len(rows) > 2250
    assert min(Counter(label for *_, label in rows).values()) > 900
    wrong = [(gold, answer) for gold, answer, response, label in sampled(rows, 600) if reward(response, gold) != label]
    assert wrong == []


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize("name", BENCHMARKS)
def test_gold_against_gold_of_the_benchmarks(name):
    _, problems = load_benchmark(name, str(SHARED))
    several = [p for p in problems if p.extra.get("is_multiple_answer") or p.extra.get("unit")]
    for problem in [*sampled(problems, 40), *sampled(several, 40)]:
        gold = problem.answer
        response = f"<think>First \\boxed{{0}}?</think>\n\nThus the answer is\n$$\\boxed{{{gold}}}$$\n"
        assert (reward(response, gold) == 1) == (problem.id not in UNVERIFIABLE_GOLDS), problem.id


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_benchmarks_golds_written_otherwise_and_wrongly(name):
    """Right: other brackets, fractions, spaces, order, unit. Wrong: a digit, an item more or less, a point's order."""
    _, problems = load_benchmark(name, str(SHARED))
    missed = []
    with_unit = [problem for problem in problems if problem.extra.get("unit")]
    for problem in [*sampled(problems, 20), *with_unit]:
        for label, answers in zip((1.0, 0.0), variants(problem), strict=True):
            missed += [
                (problem.id, answer) for answer in answers if reward(rf"\boxed{{{answer}}}", problem.answer) != label
            ]
    assert missed == []


def variants(problem):
    gold = problem.answer
    items = gold_items(gold) if problem.extra.get("is_multiple_answer") else [gold]
    right = [gold + ".", f"${gold}$", f"{{{gold}}}", gold.replace(r"\frac", r"\dfrac"), gold.replace(",", ", ")]
    if r"\left" not in gold:
        right.append(gold.replace("(", r"\left(").replace(")", r"\right)"))
    wrong = []
    if len(items) > 1:
        right += [", ".join(items[::-1]), r" \text{ and } ".join(items), r"\{" + ", ".join(items) + r"\}"]
        wrong += [", ".join(items[1:]), ", ".join([*items, "77"])]
    elif unit := problem.extra.get("unit"):
        unit = unit.strip("$").replace("%", r"\%")
        right += [rf"{gold} \text{{ {unit}}}", rf"{gold}\,\mathrm{{{unit}}}", rf"{gold}~{unit}"]
    if (digits := list(re.finditer(r"\d", gold))) and r"\mbox" not in gold:
        first = digits[0]
        wrong.append(gold[: first.start()] + str((int(first[0]) + 1) % 10) + gold[first.end() :])
    if (point := re.fullmatch(r"\(([^(),]*),([^(),]*)\)", gold)) and point[1].strip() != point[2].strip():
        wrong.append(f"({point[2]},{point[1]})")
    return right, wrong


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_the_gold_of_another_problem_is_wrong():
    """Neighbours in alphabetical order are the likeliest to be confused."""
    answers = {p.answer for name in BENCHMARKS for p in load_benchmark(name, str(SHARED))[1]}
    golds = sorted({re.sub(r"\s?\\%|\^\\circ", "", answer) for answer in answers})  # 8 and 8 \% may be one
    pairs = [pair for pair in itertools.pairwise(golds) if not (pair[0].isdigit() and pair[1].isdigit())]
    same = [pair for pair in sampled(pairs, 80) if reward(rf"\boxed{{{pair[1]}}}", pair[0])]
    assert [pair for pair in same if sorted(gold_items(pair[0])) != sorted(gold_items(pair[1]))] == []


@pytest.mark.parametrize(
    ("answer", "readings"),
    [
        ("5", [["5"]]),
        ("8,221", [["8", "221"], ["8221"]]),
        ("8, 221", [["8", "221"]]),
        ("2,400, 1,350", [["2", "400", "1", "350"], ["2400", "1350"]]),
        (r"1 \text{ and } 2", [["1", "2"]]),
        (r"1, 2, \text{ or } 3", [["1", "2", "3"]]),
        (r"x \in \{1, 2\}", [["1", "2"]]),
        (r"\left\{1; 2\right\}", [["1", "2"]]),
        ("(1,2), [3,4)", [["(1,2)", "[3,4)"]]),
        (r"1\,000", [[r"1\,000"]]),
        (r"\pm 2", [["+ 2", "- 2"]]),
        (r"1 \mp 2", [["1 - 2", "1 + 2"]]),
        (
            r"(\pm 1, \pm 2)",
            [["(+ 1, + 2)", "(- 1, - 2)"], ["(+ 1, + 2)", "(+ 1, - 2)", "(- 1, + 2)", "(- 1, - 2)"]],
        ),
    ],
)
def test_readings_of_an_answer(answer, readings):
    assert list(answer_readings(answer)) == readings


@pytest.mark.parametrize(
    ("gold", "items"),
    [
        ("8,221", ["8221"]),
        ("221,8", ["221", "8"]),
        ("27,54,108,135", ["27", "54", "108", "135"]),
        ("1,234,567", ["1234567"]),
        (r"11,\! 111,\! 111", ["11111111"]),
        ("(1,2)", ["(1,2)"]),
        (r"\{1\pm\sqrt{5},-2\}", [r"1+\sqrt{5}", r"1-\sqrt{5}", "-2"]),
    ],
)
def test_items_of_a_gold_answer(gold, items):
    assert gold_items(tidy(gold)) == items


def test_tidy():
    assert tidy(r"0.1\overline{6}") == r"\frac{15}{90}"
    assert tidy(r"1{,}000") == tidy(r"1\,000") == "1000"
    assert tidy(r"{ {90°} }") == r"90^{\circ}"
    assert tidy(r"{1} + {2}") == r"{1} + {2}"
    assert tidy(r"\{ \}") == r"\emptyset"
    assert [has_variables(text) for text in ("2ab", "6m", "5 m", r"5\text{ cm}", r"\frac{\pi}{2}", "x=5")] == [
        True, True, False, False, False, True,
    ]  # fmt: skip
