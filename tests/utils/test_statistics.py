"""Intervals and tests beyond the plain bootstrap: exact values, tables, and how often they are right."""

import math
import random

import pytest

from sgpo.utils.statistics import (
    bootstrap_interval,
    nested_bootstrap_interval,
    pass_at_k,
    permutation_p_value,
    t_interval,
)


def test_the_nested_interval_of_noiseless_samples_is_that_of_the_problems():
    values = [float(i % 3 == 0) for i in range(40)]
    nested = nested_bootstrap_interval([[v] * 4 for v in values], resamples=4000)
    plain = bootstrap_interval(values, resamples=4000)
    assert nested == pytest.approx(plain, abs=0.03)


def test_the_nested_interval_holds_the_noise_of_the_samples_too():
    one_problem = [[1.0, 0.0] * 8]
    assert bootstrap_interval([0.5]) == (0.5, 0.5)
    low, high = nested_bootstrap_interval(one_problem)
    half = 1.96 * math.sqrt(0.25 / 16)  # a binomial of 16 samples
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.05)


def test_rows_of_different_length_weigh_the_same():
    low, high = nested_bootstrap_interval([[1.0], [0.0] * 9])
    assert (low, high) == (0.0, 1.0)
    assert nested_bootstrap_interval([[1.0] * 3, [1.0]]) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1, 2, 3, 4, 5], 2 / 32),
        ([1, 1, 1, -1], 10 / 16),  # |sum of signs| >= 2: all but the six balanced ones
        ([0.0, 0.0], 1.0),
        ([], 1.0),
        ([0.3], 1.0),
    ],
)
def test_exact_permutation_p_values(differences, p):
    assert permutation_p_value(differences) == pytest.approx(p)


def test_a_sampled_permutation_p_value_agrees_with_the_exact_one():
    rng = random.Random(0)
    data = [rng.gauss(0.4, 1) for _ in range(16)]
    exact = permutation_p_value(data)
    sampled = permutation_p_value([*data, 1e-9])  # 17 differences: signs are drawn
    assert sampled == pytest.approx(exact, abs=0.02)


def test_under_no_difference_the_permutation_test_is_right_as_often_as_it_says():
    rng = random.Random(1)
    p_values = [permutation_p_value([rng.gauss(0, 1) for _ in range(10)]) for _ in range(400)]
    assert 0.02 < sum(p <= 0.05 for p in p_values) / 400 < 0.08


def test_pass_at_k_by_hand():
    assert pass_at_k(0, 8, 4) == 0.0
    assert pass_at_k(2, 8, 1) == 0.25
    assert pass_at_k(2, 8, 4) == pytest.approx(1 - 15 / 70)
    assert pass_at_k(5, 8, 4) == 1.0
    with pytest.raises(ValueError, match="at least 9 samples"):
        pass_at_k(1, 8, 9)


@pytest.mark.parametrize(("runs", "quantile"), [(2, 12.706205), (3, 4.302653), (5, 2.776445), (31, 2.042272)])
def test_the_t_interval_uses_the_quantiles_of_the_tables(runs, quantile):
    values = [float(i % 2) for i in range(runs)]
    mean = sum(values) / runs
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (runs - 1))
    low, high = t_interval(values)
    assert high - mean == pytest.approx(quantile * deviation / math.sqrt(runs), rel=1e-5)
    assert mean - low == pytest.approx(high - mean)


def test_one_run_has_no_interval():
    assert t_interval([0.7]) == (-math.inf, math.inf)
