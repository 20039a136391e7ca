"""Advantages, alpha, o+, weights and intervals: hand-computed numbers of method.md, and what must always hold."""

import math
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sgpo.algorithm.advantages import group_advantages
from sgpo.algorithm.alpha import adaptive_alpha, group_advantage_alpha
from sgpo.algorithm.importance import gap_statistics, truncated_importance
from sgpo.algorithm.selection import most_reachable, selection_score
from sgpo.algorithm.weights import distill_token_weight, policy_token_weight
from sgpo.utils.statistics import bootstrap_interval

RATES = st.floats(0, 1)
GROUPS = st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=16)


def test_advantages_of_a_group_by_hand():
    # Mean 1/4, squared deviations 9/16 + 3 x 1/16 = 3/4, over G - 1 = 3: standard deviation 1/2.
    found = group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)


def test_advantages_without_the_division_are_only_centred():
    found = group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), normalize_std=False)
    assert found.tolist() == [0.75, -0.25, -0.25, -0.25]


def test_eps_bounds_the_division():
    # Deviations +-1/2, standard deviation 1/sqrt(2); eps = 1 is large enough to be seen.
    found = group_advantages(torch.tensor([0.0, 1.0]), eps=1.0)
    assert found.tolist() == pytest.approx([-0.5 / (math.sqrt(0.5) + 1), 0.5 / (math.sqrt(0.5) + 1)])


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3, 1e9, -7.3])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("normalize_std", [True, False])
def test_equal_rewards_give_exactly_zero(reward, size, normalize_std):
    found = group_advantages(torch.full((size,), reward), normalize_std=normalize_std)
    assert found.tolist() == [0.0] * size


def test_groups_do_not_mix():
    rewards = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 4.0]])
    together = group_advantages(rewards)
    for row, alone in zip(together, rewards, strict=True):
        assert torch.equal(row, group_advantages(alone))
    assert together[1].tolist() == [0.0, 0.0]


def test_advantages_leave_their_input_alone():
    rewards = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    group_advantages(rewards)
    assert rewards.tolist() == [1.0, 0.0, 1.0]


@given(GROUPS)
def test_advantages_are_centred_bounded_and_ordered_like_the_rewards(values):
    rewards = torch.tensor(values)
    found = group_advantages(rewards)
    size = len(values)
    assert found.isfinite().all()
    assert abs(float(found.sum())) < 1e-6 * size
    # No member of a sample of G lies further than (G - 1) / sqrt(G) standard deviations from its mean.
    assert float(found.abs().max()) <= (size - 1) / math.sqrt(size) + 1e-9
    higher, lower = rewards[:, None] > rewards[None, :], found[:, None] >= found[None, :]
    assert bool((~higher | lower).all())


@given(GROUPS, st.randoms())
def test_advantages_follow_a_permutation(values, rng):
    order = list(range(len(values)))
    rng.shuffle(order)
    rewards = torch.tensor(values)
    assert torch.allclose(group_advantages(rewards)[order], group_advantages(rewards[order]), atol=1e-9)


@pytest.mark.parametrize(
    ("p_auto", "p_guided", "alpha", "uncapped"),
    [
        (0.0, 0.25, 0.8, 1.75),
        (0.5, 1.0, 0.5, 0.5),
        (1.0, 1.0, 1 / 22, 1 / 22),
        (1.0, 0.0, 0.0, -0.9 / 2.2),
        (0.0, 0.0, 0.5, 0.5),
    ],
)
def test_the_check_values_of_equation_6(p_auto, p_guided, alpha, uncapped):
    assert adaptive_alpha(p_auto, p_guided) == (pytest.approx(alpha), pytest.approx(uncapped))


def test_alpha_with_other_knobs_by_hand():
    # 2 x (0.5 - 0.25 + 0.25) / (0.25 + 0.25) = 2, capped at 1.5.
    assert adaptive_alpha(0.25, 0.5, alpha_0=2.0, gamma=0.25, alpha_max=1.5) == (1.5, 2.0)
    assert adaptive_alpha(0.25, 0.5, alpha_0=0.0) == (0.0, 0.0)


@given(RATES, RATES, st.floats(0, 3), st.floats(1e-3, 1), st.floats(0, 3))
def test_alpha_stays_in_its_range(p_auto, p_guided, alpha_0, gamma, alpha_max):
    alpha, uncapped = adaptive_alpha(p_auto, p_guided, alpha_0=alpha_0, gamma=gamma, alpha_max=alpha_max)
    assert 0 <= alpha <= alpha_max
    assert alpha == min(max(uncapped, 0.0), alpha_max)


@given(RATES, RATES, RATES)
def test_alpha_grows_with_the_guided_and_falls_with_the_autonomous_pass_rate(fixed, one, other):
    low, high = sorted((one, other))
    assert adaptive_alpha(fixed, low) <= adaptive_alpha(fixed, high)
    assert adaptive_alpha(high, fixed) <= adaptive_alpha(low, fixed)


def test_group_advantage_alpha_by_hand():
    # Eight rewards of 1 and one of 0: mean 8/9, variance (8/81 + 64/81) / 8 = 1/9.
    alpha, uncapped = group_advantage_alpha(torch.tensor([0.0] + [1.0] * 7), 1.0)
    assert (alpha, uncapped) == (pytest.approx(1 / 3, rel=1e-5), alpha)
    # Two of nine: mean 2/9, variance (2 x 49 + 7 x 4) / 81 / 8; above the cap.
    alpha, uncapped = group_advantage_alpha(torch.tensor([1.0] + [0.0] * 7), 1.0)
    assert (alpha, uncapped) == (0.8, pytest.approx((7 / 9) / math.sqrt(126 / 81 / 8), rel=1e-5))
    assert group_advantage_alpha(torch.tensor([1.0] + [0.0] * 7), 1.0, alpha_max=9.0)[0] == uncapped


def test_group_advantage_alpha_is_zero_where_the_target_is_nothing_special():
    assert group_advantage_alpha(torch.ones(8), 1.0) == (0.0, 0.0)
    alpha, uncapped = group_advantage_alpha(torch.tensor([1.0, 1.0]), 0.5)
    assert alpha == 0.0 > uncapped


@pytest.mark.parametrize(
    ("logprobs", "by_sum", "by_mean"),
    [
        ([[-3.0], [-1.0, -1.0]], 1, 1),
        ([[-1.5], [-1.0, -1.0]], 0, 1),  # the sum prefers the short answer, the mean the likely tokens
        ([[-1.0, -2.0, -3.0], [-7.0]], 0, 0),
        ([[-5.0]], 0, 0),
        ([[-2.0], [-2.0]], 0, 0),
        ([[-3.0], [-1.0, -1.0], [-2.0], [-1.0, -1.0, -1.0]], 1, 1),
    ],
)
def test_the_reachable_target_and_ties(logprobs, by_sum, by_mean):
    assert most_reachable(logprobs) == most_reachable(logprobs, score="sum") == by_sum
    assert most_reachable(logprobs, score="mean") == by_mean


def test_target_score_by_hand():
    assert selection_score([-1.0, -2.0, -3.0]) == -6.0
    assert selection_score([-1.0, -2.0, -3.0], score="mean") == -2.0


@given(st.lists(st.lists(st.floats(-20, 0), min_size=1, max_size=6), min_size=1, max_size=6))
def test_no_completion_scores_above_the_reachable_target(logprobs):
    for score in ("sum", "mean"):
        best = most_reachable(logprobs, score=score)
        assert all(
            selection_score(row, score=score) <= selection_score(logprobs[best], score=score) for row in logprobs
        )


def test_token_weights_of_a_step_are_means_of_means():
    """Global denominators: with ragged lengths and group sizes, a loss of 1 per token is a loss of 1 per step."""
    rng = random.Random(0)
    problems = 7
    policy, target, mean_alpha = 0.0, 0.0, 0.0
    for _ in range(problems):
        lengths = [rng.randint(1, 900) for _ in range(rng.randint(2, 9))]
        policy += sum(
            length * policy_token_weight(problems=problems, group_size=len(lengths), length=length)
            for length in lengths
        )
        alpha, kept = rng.random(), lengths[: rng.randint(1, len(lengths))]
        mean_alpha += alpha / problems
        target += sum(
            length * distill_token_weight(alpha=alpha, problems=problems, completions=len(kept), length=length)
            for length in kept
        )
    assert policy == pytest.approx(1.0, rel=1e-12)
    assert target == pytest.approx(mean_alpha, rel=1e-12)


def test_token_weights_by_hand():
    assert policy_token_weight(problems=2, group_size=4, length=10) == float(Fraction(1, 80))
    assert distill_token_weight(alpha=0.8, problems=2, completions=1, length=10) == pytest.approx(0.04)
    assert distill_token_weight(alpha=0.8, problems=2, completions=4, length=10) == pytest.approx(0.01)


def test_the_bootstrap_interval_of_a_known_distribution():
    values = [0.0, 1.0] * 200
    low, high = bootstrap_interval(values)
    half = 1.96 * 0.5 / math.sqrt(len(values))
    assert (low, high) == (pytest.approx(0.5 - half, abs=0.006), pytest.approx(0.5 + half, abs=0.006))


def test_the_bootstrap_interval_is_deterministic_and_seeded():
    rng = random.Random(0)
    values = [rng.random() for _ in range(50)]
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)


def test_the_bootstrap_interval_grows_with_its_level_and_shrinks_with_the_data():
    rng = random.Random(1)
    values = [rng.random() for _ in range(80)]
    narrow, wide = bootstrap_interval(values, level=0.5), bootstrap_interval(values, level=0.99)
    assert wide[0] < narrow[0] < sum(values) / 80 < narrow[1] < wide[1]
    low, high = bootstrap_interval(values * 16)
    assert high - low < 0.5 * (wide[1] - wide[0])


@pytest.mark.parametrize("value", [0.0, 0.25, 1.0])
def test_equal_values_give_an_interval_of_no_width(value):
    assert bootstrap_interval([value] * 9) == (value, value)
    assert bootstrap_interval([value]) == (value, value)


def test_the_bootstrap_does_not_depend_on_its_blocks():
    """More values than fit into one block at once: still the asked number of resamples, and a sane interval."""
    values = [float(i % 4 == 0) for i in range(3000)]
    low, high = bootstrap_interval(values, resamples=3000)
    half = 1.96 * math.sqrt(0.25 * 0.75 / 3000)
    assert (low, high) == (pytest.approx(0.25 - half, abs=0.002), pytest.approx(0.25 + half, abs=0.002))


def test_the_bootstrap_interval_covers_the_truth_as_often_as_it_says():
    rng = random.Random(2)
    runs, truth, covered = 300, 0.4, 0
    for _ in range(runs):
        sample = [float(rng.random() < truth) for _ in range(60)]
        low, high = bootstrap_interval(sample, resamples=600)
        covered += low <= truth <= high
    assert 0.90 <= covered / runs <= 0.98


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_the_bootstrap_interval_stays_within_the_values(values):
    low, high = bootstrap_interval(values, resamples=200)
    assert min(values) - 1e-12 <= low <= high <= max(values) + 1e-12


def test_importance_weights_by_hand():
    policy, sampler = [math.log(0.5), math.log(0.2), math.log(0.9)], [math.log(0.25), math.log(0.4), math.log(0.9)]
    assert truncated_importance(policy, sampler, cap=10.0) == pytest.approx([2.0, 0.5, 1.0])
    assert truncated_importance(policy, sampler, cap=1.5) == pytest.approx([1.5, 0.5, 1.0])
    assert truncated_importance(policy, sampler, cap=10.0, level="sequence") == pytest.approx([1.0] * 3)
    assert truncated_importance(policy[:1], sampler[:1], cap=1.5, level="sequence") == pytest.approx([1.5])
    assert truncated_importance([0.0], [-1e4], cap=3.0) == [3.0]  # no overflow
    assert truncated_importance([-1e4], [0.0], cap=3.0) == [0.0]
    assert truncated_importance([], [], cap=3.0) == []
    with pytest.raises(ValueError):
        truncated_importance([0.0], [], cap=3.0)


def test_the_k3_gap_estimates_the_divergence_of_sampler_and_trainer():
    """Its expectation under mu is KL(mu || pi); every term is at least 0."""
    mu, pi = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.4, 0.4, 0.2]).double()
    values = [gap_statistics([float(p.log())], [float(m.log())])[2] for p, m in zip(pi, mu, strict=True)]
    assert min(values) >= 0
    expected = sum(float(m) * value for m, value in zip(mu, values, strict=True))
    assert expected == pytest.approx(float((mu * (mu / pi).log()).sum()), abs=1e-12)
    total, largest, _ = gap_statistics([-1.0, -2.0], [-1.5, -1.8])
    assert (total, largest) == (pytest.approx(0.7), pytest.approx(0.5))
    assert gap_statistics([], []) == (0, 0.0, 0)
