"""Effects of strategies: exact tests and expectations against enumeration, bands, differences by hand."""

from itertools import pairwise, permutations

import pytest

from sgpo.analysis.effects import Estimate, bands, difference, estimate, fisher_p_value, help_and_harm


def test_fisher_p_value_of_the_lady_tasting_tea():
    # 3 of 4 against 1 of 4: splits of 4 over 4 + 4 have 1, 16, 36, 16, 1 of 70; 0, 1, 3, 4 are as unlikely.
    assert fisher_p_value(3, 4, 1, 4) == pytest.approx((1 + 16 + 16 + 1) / 70)
    assert fisher_p_value(4, 4, 0, 4) == pytest.approx(2 / 70)
    assert fisher_p_value(2, 4, 2, 4) == pytest.approx(1.0)


def test_fisher_p_value_with_unequal_sizes_is_that_of_all_permutations():
    outcomes = [True, True, False, False, False, True]  # 2 of 2 against 1 of 4
    observed = 2 / 2 - 1 / 4
    firsts = [sum(p[:2]) for p in permutations(outcomes)]
    weight = {a: firsts.count(a) / len(firsts) for a in set(firsts)}
    expected = sum(w for a, w in weight.items() if w <= weight[2] + 1e-12)
    assert observed > 0
    assert fisher_p_value(2, 2, 1, 4) == pytest.approx(expected)


def test_help_and_harm_counts_signs_tests_and_what_chance_would_give():
    def of(correct: int, count: int = 6) -> list[bool]:
        return [k < correct for k in range(count)]

    without = {0: of(0), 1: of(5), 2: of(3), 3: of(0), 4: of(2)}
    guided = {0: of(6), 1: of(4), 2: of(3), 3: of(0)}  # problem 4 has no partner
    found = help_and_harm("own", guided, without, level=0.05)
    assert (found.problems, found.higher, found.lower, found.equal) == (4, 1, 1, 2)
    assert (found.helps, found.hurts) == (1, 0)
    # Exchangeable completions: P(higher) = (1 - P(equal)) / 2, P(equal) = C(6, c/2)^2 / C(12, c) for even c, else 0.
    equal = [400 / 924, 0.0, 400 / 924, 1.0]
    assert found.higher_by_chance == pytest.approx(sum((1 - p) / 2 for p in equal))
    assert found.lower_by_chance == pytest.approx(found.higher_by_chance)
    # Clear at 5 % with 6 of 12 correct: 6:0 (1/924) and 5:1 (36/924, two-sided p = 74/924 > 0.05 is not clear).
    assert found.helps_by_chance == pytest.approx(2 / 924)


def test_help_is_told_by_rate_where_the_arms_differ_in_size():
    found = help_and_harm("own", {0: [True, True, False, False]}, {0: [True]}, level=0.05)
    assert (found.higher, found.lower) == (0, 1)


def test_a_difference_is_taken_over_the_problems_of_both_arms():
    arms = {
        "own": {0: [True, True], 1: [True, False], 2: [True, True]},
        "none": {0: [False, True], 1: [False, False], 3: [True, True]},
    }
    found = difference("own", "none", arms)
    assert found.difference.problems == 2
    assert found.difference.mean == pytest.approx(0.5)
    assert found.p_value == pytest.approx(0.5)  # both signs alike: 2 of 4


def test_an_estimate_is_honest_about_too_few_problems():
    assert estimate([]) == Estimate(None, None, None, 0)
    assert (estimate([0.5]).mean, estimate([0.5]).low) == (0.5, None)
    many = estimate([0.0, 1.0] * 50)
    assert many.low is not None
    assert many.high is not None
    assert 0.38 < many.low < 0.5 < many.high < 0.62


def test_bands_keep_equal_values_together_and_average_per_problem():
    values = [3.0, 1.0, 1.0, 2.0, 1.0, 4.0]
    effects = [1.0, 0.0, 0.5, 1.0, 0.4, 0.0]
    found = bands(values, effects, [0, 0, 1, 0, 1, 2], 2)
    assert [(band.low, band.high, band.items) for band in found] == [(1.0, 1.0, 3), (2.0, 4.0, 3)]
    assert found[0].effect.mean == pytest.approx((0.0 + 0.45) / 2)
    assert found[1].effect.mean == pytest.approx((1.0 + 0.0) / 2)
    assert bands([], [], [], 3) == []


def test_every_item_falls_into_one_band():
    values = [float(i * i % 17) for i in range(40)]
    found = bands(values, values, list(range(40)), 4)
    assert sum(band.items for band in found) == 40
    assert all(a.high < b.low for a, b in pairwise(found))
