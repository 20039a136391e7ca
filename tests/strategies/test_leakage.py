"""The leak check on hand-written strategies, and what must hold for any number and any harmless text."""

import json
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from processes import scaled

from sgpo.strategies import mathtext
from sgpo.strategies.formulas import formula_comparer
from sgpo.strategies.leakage import MAX_FORMULAS, Solution, find_leaks
from sgpo.strategies.settings import LeakConfig

SHARED = Path(__file__).parents[2].parent / "shared" / "data"

BAND = (
    "A rectangular band formation is a formation with $m$ band members in each of $r$ rows. A band has less than 100 "
    "members and in a rectangular formation two members are left over. If he increases the number of members in each "
    "row by 1 and reduces the number of rows by 2, all fit exactly. What is the largest number of members?",
    r"We have \( N = mr + 2 \) and \( N = (m+1)(r-2) \). Setting these equal gives \( r = 2m + 4 \), so "
    r"\( N = 2(m+1)^2 \). The largest is \( 2 \times 7^2 = 98 \) with \( m = 6 \) and \( r = 16 \). \boxed{98}",
    "98",
)
PIECES = (
    r"Let \[f(x) = \left\{ \begin{array}{cl} ax+3, &\text{ if }x>2, \\ x-5 &\text{ if } -2 \le x \le 2, \\ "
    r"2x-b &\text{ if } x <-2. \end{array} \right.\]Find $a+b$ if the function is continuous.",
    r"At \(x = 2\): \(2a + 3 = -3\), so \(a = -3\). At \(x = -2\): \(-4 - b = -7\), so \(b = 3\). "
    r"Then \(a + b = 0\). \boxed{0}",
    "0",
)
DEGREE = (
    r"What is the degree of the polynomial $(4 +5x^3 +100 +2\pi x^4 + \sqrt{10}x^4 +9)$?",
    r"Constants: \(4 + 100 + 9 = 113\). So it is \(113 + 5x^3 + (2\pi + \sqrt{10})x^4\). \boxed{4}",
    "4",
)
CEILING = (
    r"Evaluate $\left\lceil3\left(6-\frac12\right)\right\rceil$.",
    r"First \(6 - \frac{1}{2} = 5.5\), then \(3 \times 5.5 = 16.5\), and the ceiling is 17. \boxed{17}",
    "17",
)
DAYS = (
    r"Sam is hired for a 20-day period. On days that he works, he earns $\$$60. For each day that he does not work, "
    r"$\$$30 is subtracted. At the end he received $\$$660. How many days did he not work?",
    "Let x be the days worked: 60x - 30(20 - x) = 660, so 90x = 1260 and x = 14. He did not work 6 days.",
    "6",
)
TRIANGLE = (
    r"A right triangle has legs $5$ and $12$. What is $\frac{r}{R}$, inradius over circumradius?",
    r"The hypotenuse is 13, so $R = \frac{13}{2}$ and $r = 2$. The ratio is $\frac{4}{13}$.",
    r"\frac{4}{13}",
)
ROOTS = (
    "Simplify the square root of 75 plus the square root of 12.",
    r"$\sqrt{75} = 5\sqrt{3}$ and $\sqrt{12} = 2\sqrt{3}$, together $7\sqrt{3}$.",
    r"$7\sqrt{3}$",
)
PARITY = (
    r"Is $f(x) = x^2 + 3$ an even function, an odd function, or neither?",
    r"$f(-x) = (-x)^2 + 3 = f(x)$, so it is even.",
    r"\text{even}",
)
RUNNER = ("Who was fastest, the winner of race A, B or C?", "Speeds are 7.5, 8.25 and 6.9, so B. \\boxed{B}", "B")
NEGATIVE = ("Solve $x + 8 = 3$.", "Subtracting gives $x = 3 - 8 = -5$.", "-5")
PERCENT = ("A coat of 80 dollars is 25% off. What does it cost?", "Off are 0.25 * 80 = 20, so it costs 60.", "60")
DIFFERENCE = (
    "Define $p = \\sum 1/k^2$, $q = \\sum 1/k^3$. Express the double sum.",
    "It telescopes to $p - q$.",
    "p - q",
)

LEAKS = [
    (BAND, "The largest total is 98.", "answer"),
    (BAND, "The total is ninety-eight.", "answer"),
    (BAND, "Check that ９８ members fit.", "answer"),
    (BAND, "98. is what you should find", "answer"),
    (BAND, "Find that there are 6 members per row.", "number"),
    (BAND, "Arrange them in sixteen rows.", "number"),
    (BAND, "Express one variable by the other: r = 2m + 4.", "formula"),
    (BAND, r"Substitute $r=2 m+4$ into the total.", "formula"),
    (BAND, r"Note that the rows number $2(m + 2)$.", "formula"),
    (BAND, r"The total becomes \(2(m+1)^2\).", "formula"),
    (BAND, r"The total becomes $2m^2 + 2m + 2m + 2$.", "formula"),
    (BAND, "Write N = mr + 2 first.", "formula"),
    (BAND, "Maximize 2*49 over integers.", "answer"),
    (PIECES, "Solve to get a = -3.", "number"),
    (PIECES, "The sum of the two is zero.", "answer"),
    (PIECES, "Solve for the parameter, which is −3.", "number"),
    (PIECES, "Solve to get b = 3.", "formula"),
    (PIECES, r"Equate: $2a+3$ with the other side.", "formula"),
    (PIECES, "Equate 3 + 2a with the other side.", "formula"),
    (DEGREE, "The highest exponent is 4.", "answer"),
    (DEGREE, "Notice that it is four.", "answer"),
    (DEGREE, "Add the constants to 113.", "number"),
    (DEGREE, "Add the constants to one hundred thirteen.", "number"),
    (DEGREE, r"Collect $(2\pi + \sqrt{10})x^4$.", "formula"),
    (CEILING, "Round 16.5 up.", "number"),
    (CEILING, r"Round $\frac{33}{2}$ up.", "number"),
    (CEILING, r"Round $33/2$ up.", "number"),
    (CEILING, "Round it up to 17", "answer"),
    (CEILING, r"Subtract to get $\frac{11}{2}$.", "number"),
    (CEILING, r"Multiply $3 \cdot 5.5$.", "number"),
    (DAYS, "He is absent for six days.", "answer"),
    (DAYS, "Set up 60x - 30(20 - x) = 660.", "formula"),
    (DAYS, "Simplify until 90x stands alone.", "formula"),
    (DAYS, "He works fourteen days.", "number"),
    (DAYS, r"Equate \(30(20-x)\) with the loss.", "formula"),
    (TRIANGLE, r"The ratio is $\frac4{13}$.", "answer"),
    (TRIANGLE, "The ratio is 4/13.", "answer"),
    (TRIANGLE, r"The ratio is $\frac{8}{26}$.", "answer"),
    (TRIANGLE, "The longest side is 13.", "number"),
    (TRIANGLE, "The smaller radius is 2.", "number"),
    (("Is it 1/3 or 1/2?", "It is 1/3.", "1/3"), "It comes to 1/3.", "answer"),
    (("Is it 1/3 or 1/2?", "It is 1/3.", "1/3"), r"It comes to $\frac13$.", "answer"),
    (ROOTS, r"The sum is $7\sqrt3$.", "answer"),
    (ROOTS, r"Write the second as $2\sqrt{3}$.", "formula"),
    (ROOTS, r"The sum is $\sqrt{147}$.", "answer"),
    (PARITY, "Therefore the function is even.", "answer"),
    (RUNNER, "The answer is B.", "answer"),
    (RUNNER, "Compare with the speed 8.25 of the winner.", "number"),
    (NEGATIVE, "Subtract, which gives -5.", "answer"),
    (NEGATIVE, "Subtract, which gives minus five.", "answer"),
    (NEGATIVE, "The distance is five.", "number"),
    (PERCENT, "It costs 60 dollars.", "answer"),
    (PERCENT, "Take 20 off.", "number"),
    (DIFFERENCE, "Express it as $p-q$.", "answer"),
    (DIFFERENCE, "Express it as $-(q - p)$.", "answer"),
]
CLEAN = [
    (BAND, "Set up two equations for the total and eliminate one unknown."),
    (BAND, "Write two simultaneous linear equations, one for each formation."),
    (BAND, "1. Translate both formations.\n2. Eliminate a variable.\n3. Maximize under the bound of 100."),
    (BAND, "Step 1: Translate.\nStep 2: Solve the system from step 1."),
    (BAND, "Compare $m$ and $r$; remember that two members are left over, and the rows are reduced by 2."),
    (BAND, "Use the formula $c^2 = a^2 + b^2$ if a right angle appears, and equation (1) otherwise."),
    (BAND, "First find one of the unknowns, then the second one."),
    (BAND, "Distinguish three separate cases by the sign."),
    (PIECES, "Only $x = 2$ and $x = -2$ can break continuity; compare $ax+3$ with $x-5$ there."),
    (PIECES, "Match the one-sided limits of neighbouring pieces at both boundaries, then solve each equation."),
    (DEGREE, r"Compare the exponents in $5x^3$ and $2\pi x^4$, and see that their coefficients do not cancel."),
    (DEGREE, "Combine like terms and look for the highest power whose coefficient does not vanish."),
    (CEILING, r"Evaluate $6-\frac12$ first, multiply by 3, then round up to the next integer."),
    (CEILING, "Work from the innermost bracket outwards, and apply the ceiling at the end."),
    (DAYS, "Express the pay for all 20 days through the days worked, with 60 earned and 30 lost, and equate to 660."),
    (DAYS, "Multiply by 2 and divide by 2 again to clear the denominators."),
    (TRIANGLE, "Half of the hypotenuse is the circumradius; the angles of a triangle sum to 180 degrees."),
    (TRIANGLE, "With legs 5 and 12, apply the Pythagorean theorem to find the longest side."),
    (ROOTS, "Split off the largest square factor of 75 and of 12, and add like radicals."),
    (PARITY, "Replace $x$ by $-x$ and check whether the function is even, odd or neither."),
    (PARITY, "Recall what makes a function even or odd; the $x^2$ term is not affected by a sign."),
    (RUNNER, "Compute the speeds of A, B and C and compare them; a faster runner has a higher speed."),
    (NEGATIVE, "Isolate x in x+8 on one side."),
    (NEGATIVE, "Undo the addition of 8 on both sides; equal to 0 is not what is asked."),
    (PERCENT, "Find 25% of 80, or a quarter of it, and subtract; 100 percent is the whole."),
    (PERCENT, "Multiply by 0.75, the share that is left."),  # from elsewhere: the solution does not hold it
    (DIFFERENCE, "Sum along the diagonals and relate the result to $p$ and $q$."),
]


@pytest.fixture(scope="module")
def equal():
    with formula_comparer(LeakConfig(workers=1, timeout_s=scaled(30))) as compare:
        yield compare


def never(pairs):
    raise AssertionError(f"asked to compare {pairs}")


def nothing(pairs):
    return [False] * len(pairs)


@pytest.mark.parametrize(("row", "text", "kind"), LEAKS, ids=[text for _, text, _ in LEAKS])
def test_leaks_are_found(equal, row, text, kind):
    found = find_leaks(text, Solution(*row), equal)
    assert kind in {leak.kind for leak in found}


@pytest.mark.parametrize(("row", "text"), CLEAN, ids=[text for _, text in CLEAN])
def test_clean_strategies_pass(equal, row, text):
    assert find_leaks(text, Solution(*row), equal) == []


@pytest.mark.parametrize(
    ("row", "text"),
    [(BAND, r"The rows number $2(m + 2)$."), (ROOTS, r"The sum is $\sqrt{147}$."), (PIECES, "Equate 3 + 2a.")],
)
def test_some_leaks_are_seen_by_math_verify_alone(row, text):
    assert find_leaks(text, Solution(*row), nothing) == []


def test_a_comparison_without_end_rejects():
    bomb = "The value is $9^{9^{9^{9^{9}}}}$."
    with formula_comparer(LeakConfig(workers=1, timeout_s=scaled(5))) as soon:
        assert {leak.kind for leak in find_leaks(bomb, Solution(*CEILING), soon)} == {"undecided"}
    unsure = find_leaks(r"The rows number $2(m + 2)$.", Solution(*BAND), lambda pairs: [None] * len(pairs))
    assert {leak.kind for leak in unsure} == {"undecided"}


def test_a_page_of_formulas_is_a_computation():
    text = "\n".join(f"then ${chr(97 + i % 26)} + {i} q$ and" for i in range(MAX_FORMULAS + 1))
    assert [leak.kind for leak in find_leaks(text, Solution(*BAND), never)] == ["computation"]


NUMBERS = st.integers(3, 10**9).filter(lambda n: n not in (90, 100, 180, 360))
FORMS = st.sampled_from(
    ["take {}", "so it is {}.", "${}$ rows", r"\({}\)", "x = {}", "about {} of them", "({})", "-{}", "{}x", "**{}**"]
)


@settings(max_examples=200, deadline=None)
@given(number=NUMBERS, form=FORMS, as_answer=st.booleans())
def test_any_number_of_the_solution_is_found_however_it_stands(number, form, as_answer):
    solution = Solution("How many?", f"We get 7 * {number} = {7 * number}.", str(number) if as_answer else "yes")
    found = find_leaks(form.format(number), solution, nothing)
    assert found
    assert (found[0].kind == "answer") == (as_answer and not form.startswith("-"))


@settings(max_examples=200, deadline=None)
@given(number=NUMBERS, form=FORMS)
def test_a_number_of_the_problem_never_leaks_unless_it_is_the_answer(number, form):
    assume("x" not in form)  # as part of a formula it may be one of the solution
    problem = f"There are {number} of them. How many pairs?"
    strategy = form.format(number)
    assert find_leaks(strategy, Solution(problem, f"{number} / 2 is the result.", "half as many"), nothing) == []
    assert find_leaks(strategy.replace("-", ""), Solution(problem, "All of them.", str(number)), nothing) != []


PROSE = (
    "compare the exponents of each term and find which one first second dominates; write equations, use symmetry to "
    "reduce cases - then conclude. Isolate a variable (I mean any) by its definition: it is on both sides!"
)
HARMLESS = st.sampled_from(PROSE.split())


@settings(max_examples=200, deadline=None)
@given(words=st.lists(HARMLESS, max_size=40))
def test_prose_without_numbers_is_clean_whatever_the_solution(words):
    for row in (BAND, PIECES, DAYS, ROOTS):
        assert find_leaks(" ".join(words), Solution(*row), never) == []


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=200), answer=st.text(min_size=1, max_size=20))
def test_hostile_text_neither_raises_nor_asks_without_end(text, answer):
    asked = []

    def count(pairs):
        asked.extend(pairs)
        return [False] * len(pairs)

    find_leaks(text, Solution(answer, text[::-1], answer), count)
    assert len(asked) < 5000


MARKS = st.sampled_from(
    [*"0123456789.,/^_{}()[]=<>-+*$\\|%!¦ \n", "\\frac", "\\sqrt", "x", "ab", "one", "hundred", "²"]
)


@settings(max_examples=300, deadline=None)
@given(marks=st.lists(MARKS, max_size=60))
def test_broken_formulas_are_read_without_an_error(marks):
    text = "".join(marks)
    assert all(value >= 0 for n in mathtext.numerals(mathtext.plain(text)) for value in n.values)
    find_leaks(text, Solution(text, text, text or "1"), nothing)


@pytest.mark.parametrize(
    "text", ["1" * 100_000, "(" * 100_000, "\\frac" * 20_000, "x + " * 25_000, "one hundred " * 9_000]
)
def test_long_texts_take_no_time_worth_naming(text):
    started = time.process_time()
    find_leaks(text[:6000], Solution(text, text, "7"), nothing)
    assert time.process_time() - started < 20


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1,250.5", {"2501/2"}),
        (r"1{,}000", {"1000"}),
        ("25%", {"25", "1/4"}),
        ("½", {"1/2", "1", "2"}),
        (r"\frac12", {"1/2", "1", "2"}),
        ("x^2 + a_1", set()),
        ("x² + 3", {"3"}),
        ("2^{10}", {"2", "10"}),
        (r"\$5 for 60x", {"5", "60"}),
        ("1/0", {"1", "0"}),
        ("the 20-day period", {"20"}),
    ],
)
def test_numerals(text, values):
    found = {str(value) for n in mathtext.numerals(mathtext.plain(text)) for value in n.values}
    assert found == values


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("twenty-five", [25]),
        ("one hundred and twenty three", [123]),
        ("two thousand", [2000]),
        ("a dozen", [12]),
        ("someone often phones the second tenant", []),
        ("Two hundred", [200]),
    ],
)
def test_number_words(text, values):
    assert [set(n.values) for n in mathtext.number_words(text)] == [{Fraction(value)} for value in values]


@pytest.mark.skipif(not (SHARED / "traces_r1_rasbt.jsonl").is_file(), reason="needs ../shared/data")
def test_the_final_parts_of_real_responses_leak_line_by_line():
    lines = (SHARED / "traces_r1_rasbt.jsonl").read_text(encoding="utf-8").strip().split("\n")
    for row in map(json.loads, lines):
        solution = Solution(row["problem"], row["response"], row["answer"])
        final = row["response"].rsplit("</think>", 1)[-1].strip().splitlines()
        kinds = [{leak.kind for leak in find_leaks(line, solution, nothing)} for line in final]
        assert "answer" in kinds[-1] | kinds[-2], final[-2:]
        assert any("formula" in found or "number" in found for found in kinds), row["id"]
