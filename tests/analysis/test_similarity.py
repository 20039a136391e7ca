"""Similarity and clusters of strategies against hand-computed numbers and brute force."""

import math
from itertools import combinations

import pytest
import torch

from sgpo.analysis.similarity import (
    adjusted_rand_index,
    average_linkage,
    cluster,
    cosine_similarity,
    cut,
    medoid,
    silhouette,
    tfidf_vectors,
)
from sgpo.data import builtin


def test_tfidf_by_hand():
    vectors = tfidf_vectors(["Add the add", "the gap"])
    rare, shared = 1 + math.log(3 / 2), 1.0
    # columns in order of appearance: add, the, gap
    expected = [[(1 + math.log(2)) * rare, shared, 0.0], [0.0, shared, rare]]
    torch.testing.assert_close(vectors, torch.tensor(expected))


def test_words_of_formulas_count_one_by_one():
    a, b, c = tfidf_vectors(["\\frac{x}{12}", "\\frac { x } { 12 }", "\\frac{x}{13}"])
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_equal_rows_are_exactly_alike_and_zero_rows_are_like_nothing():
    vectors = torch.tensor([[0.1, 0.3, 0.7], [0.1, 0.3, 0.7], [0.2, 0.6, 1.4], [0.0, 0.0, 0.0]])
    similarity = cosine_similarity(vectors)
    assert torch.equal(similarity[:3, :3], torch.ones(3, 3, dtype=torch.float64))
    assert similarity[3].tolist() == [0, 0, 0, 1]


def _brute_force(distance: torch.Tensor, clusters: int) -> list[set[int]]:
    """Joins the two clusters of the smallest mean distance, again and again."""
    groups = [{i} for i in range(len(distance))]
    while len(groups) > clusters:
        pairs = list(combinations(range(len(groups)), 2))
        means = [torch.stack([distance[i, j] for i in groups[a] for j in groups[b]]).mean() for a, b in pairs]
        a, b = pairs[int(torch.stack(means).argmin())]
        groups[a] |= groups.pop(b)
    return sorted(groups, key=min)


@pytest.mark.parametrize("seed", range(4))
def test_average_linkage_is_that_of_the_definition(seed):
    points = torch.rand(14, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    distance = torch.cdist(points, points)
    merges = average_linkage(distance)
    assert len(merges) == 13
    for clusters in (1, 2, 3, 6, 14):
        labels = cut(merges, 14, clusters)
        found = [{i for i, label in enumerate(labels) if label == k} for k in range(clusters)]
        assert found == _brute_force(distance, clusters)


def test_silhouette_by_hand():
    # On a line at 0, 1 and 5: a = 1, 1; b = 5, 4; the point alone counts 0.
    distance = torch.tensor([[0.0, 1, 5], [1, 0, 4], [5, 4, 0]])
    assert silhouette(distance, [0, 0, 1]) == pytest.approx((4 / 5 + 3 / 4 + 0) / 3)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([0, 0, 1, 1], [5, 5, 9, 9], 1.0),
        # n_ij = 2, 1, 1: together 1, A = 2, B = 1, of 6 pairs: (1 - 2/6) / (1.5 - 2/6)
        ([0, 0, 1, 1], [0, 0, 1, 2], (1 - 2 / 6) / (1.5 - 2 / 6)),
        ([0, 0, 1, 1], [0, 1, 0, 1], (0 - 4 / 6) / (2 - 4 / 6)),
        ([0, 0, 0], [0, 0, 0], 1.0),
        (["a", "b"], [0, 0], 0.0),
    ],
)
def test_adjusted_rand_index_by_hand(first, second, expected):
    assert adjusted_rand_index(first, second) == pytest.approx(expected)


def test_adjusted_rand_index_is_0_on_average_by_chance():
    generator = torch.Generator().manual_seed(0)
    fixed = [i % 3 for i in range(30)]
    mixed = [[fixed[i] for i in torch.randperm(30, generator=generator)] for _ in range(400)]
    values = torch.tensor([adjusted_rand_index(fixed, labels) for labels in mixed])
    assert abs(values.mean()) < 3 * values.std() / 20


def test_strategies_of_the_builtin_task_fall_into_their_sixteen_families():
    problems = builtin.make_problems("eval", seed=0, count=64)
    similarity = cosine_similarity(tfidf_vectors([problem.strategy or "" for problem in problems]))
    labels, score = cluster(similarity)
    assert len(set(labels)) == 16
    assert score == pytest.approx(1.0)
    assert adjusted_rand_index(labels, [problem.extra["family"] for problem in problems]) == 1.0


def test_clusters_can_be_asked_for_and_equal_strategies_are_one_cluster():
    line = torch.tensor([0.0, 0.1, 0.5, 0.9])
    similarity = 1 - (line[:, None] - line).abs().double()
    assert cluster(similarity, 2)[0] == [0, 0, 1, 1]
    assert cluster(similarity, 9)[0] == [0, 1, 2, 3]
    assert cluster(torch.ones(5, 5, dtype=torch.float64)) == ([0] * 5, None)


def test_the_medoid_is_most_similar_to_all():
    line = torch.tensor([0.0, 0.4, 0.5, 1.0, 0.1])
    assert medoid(1 - (line[:, None] - line).abs(), [0, 2, 3]) == 2
