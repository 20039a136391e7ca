"""How alike strategies are: by their words or by given vectors, in clusters, and against types that were stated.

Everything is deterministic; ties go to the lower index. Memory is P x P for P strategies.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Sequence

import torch

MOST_CLUSTERS = 40  # the search for the best silhouette goes no further
_WORD = re.compile(r"\\?[^\W\d_]+|\d+|[^\w\s]")


def tfidf_vectors(texts: Sequence[str]) -> torch.Tensor:
    """One float32 row [P, W] per text, its words weighted by (1 + ln count) (1 + ln((1 + P) / (1 + texts with it))).

    Words are runs of letters, numbers, and single other signs, whatever their case.
    """
    counts = [Counter(word.casefold() for word in _WORD.findall(text)) for text in texts]
    documents = Counter(word for count in counts for word in count)
    column = {word: i for i, word in enumerate(documents)}
    vectors = torch.zeros(len(texts), max(len(column), 1))
    for row, count in enumerate(counts):
        for word, times in count.items():
            vectors[row, column[word]] = 1.0 + torch.log(torch.tensor(float(times)))
    present = torch.tensor([float(documents[word]) for word in column] or [0.0])
    return vectors * (1.0 + torch.log((1.0 + len(texts)) / (1.0 + present)))


def cosine_similarity(vectors: torch.Tensor) -> torch.Tensor:
    """[P, P] float64 in [-1, 1], 1 on the diagonal; to nine digits, so that equal rows get exactly 1.

    A row of zeros is like no other.
    """
    unit = torch.nn.functional.normalize(vectors.double(), dim=1)
    return (unit @ unit.T).round(decimals=9).clamp(-1.0, 1.0).fill_diagonal_(1.0)


def average_linkage(distance: torch.Tensor) -> list[tuple[int, int]]:
    """The P - 1 merges of agglomerative clustering by mean distance, from the closest pair on.

    A merge is a pair of members, one of each cluster. Nearest-neighbour chains: P steps over rows of length P.
    """
    d = distance.double().clone().fill_diagonal_(torch.inf)
    size, height = torch.ones(len(d), dtype=torch.float64), [0.0] * len(d)
    merges: list[tuple[float, int, int]] = []
    active = list(range(len(d)))
    chain: list[int] = []
    while len(active) > 1:
        if not chain:
            chain.append(active[0])
        nearest = int(d[chain[-1]].argmin())
        if len(chain) == 1 or d[chain[-1], nearest] < d[chain[-1], chain[-2]]:
            chain.append(nearest)
            continue
        a, b = sorted((chain.pop(), chain.pop()))
        height[a] = max(float(d[a, b]), height[a], height[b])  # rounding must not put a merge before its parts
        merges.append((height[a], a, b))
        joined = (size[a] * d[a] + size[b] * d[b]) / (size[a] + size[b])
        size[a] += size[b]
        d[a], d[:, a] = joined, joined
        d[a, a], d[b], d[:, b] = torch.inf, torch.inf, torch.inf
        active.remove(b)
    return [(a, b) for _, a, b in sorted(merges, key=lambda merge: merge[0])]


def cut(merges: Sequence[tuple[int, int]], count: int, clusters: int) -> list[int]:
    """Labels 0, 1, ... of `count` points after the first count - clusters merges, in order of first appearance."""
    parent = list(range(count))

    def root(point: int) -> int:
        while parent[point] != point:
            parent[point] = parent[parent[point]]
            point = parent[point]
        return point

    for a, b in merges[: max(count - clusters, 0)]:
        parent[root(b)] = root(a)
    names: dict[int, int] = {}
    return [names.setdefault(root(point), len(names)) for point in range(count)]


def silhouette(distance: torch.Tensor, labels: Sequence[int]) -> float:
    """Mean over points of (b - a) / max(a, b): a the mean distance within the own cluster, b to the next one.

    1 for tight and separate clusters; a point alone in its cluster counts 0. Needs two clusters.
    """
    label = torch.tensor(labels)
    member = torch.nn.functional.one_hot(label).double()
    size = member.sum(0)
    total = distance.double() @ member
    own = size[label]
    within = total.gather(1, label[:, None])[:, 0] / (own - 1).clamp(min=1)
    others = (total / size).masked_fill(member.bool(), torch.inf).amin(1)
    values = (others - within) / torch.maximum(others, within).clamp(min=1e-300)
    return float(torch.where(own > 1, values, 0.0).mean())


def cluster(similarity: torch.Tensor, clusters: int | None = None) -> tuple[list[int], float | None]:
    """(labels, silhouette): average linkage on 1 - similarity, cut into `clusters` or where the silhouette is best.

    All strategies alike, or fewer than three: one cluster without a silhouette.
    """
    count = len(similarity)
    distance = 1.0 - similarity
    merges = average_linkage(distance)
    if clusters is not None:
        labels = cut(merges, count, clusters)
        return labels, silhouette(distance, labels) if len(set(labels)) > 1 else None
    if count < 3 or not bool((distance > 1e-9).any()):
        return [0] * count, None
    cuts = [cut(merges, count, k) for k in range(2, min(MOST_CLUSTERS, count - 1) + 1)]
    scores = [silhouette(distance, labels) for labels in cuts]
    best = max(range(len(cuts)), key=lambda k: (round(scores[k], 9), -k))
    return cuts[best], scores[best]


def medoid(similarity: torch.Tensor, members: Sequence[int]) -> int:
    """The member that is on average most similar to all members."""
    chosen = torch.tensor(members)
    return members[int(similarity[chosen][:, chosen].sum(1).argmax())]


def adjusted_rand_index(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """Agreement of two partitions of the same points: 1 for equal ones, 0 on average by chance.

    (sum C(n_ij, 2) - E) / (M - E) with E = A B / C(n, 2), M = (A + B) / 2, A = sum C(a_i, 2), B = sum C(b_j, 2)
    (Hubert and Arabie 1985). Partitions that are both trivial in the same way are equal: 1.
    """

    def pairs(labels: Sequence[Hashable]) -> int:
        return sum(n * (n - 1) // 2 for n in Counter(labels).values())

    together, a, b = pairs(list(zip(first, second, strict=True))), pairs(first), pairs(second)
    all_pairs = len(first) * (len(first) - 1) // 2
    expected = a * b / all_pairs if all_pairs else 0.0
    most = (a + b) / 2
    return 1.0 if most == expected else (together - expected) / (most - expected)
