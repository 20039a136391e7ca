"""Which problems a step takes, which completions it asks for, and how they are sorted back into groups."""

import random
from dataclasses import replace

import pytest

from sgpo.data.epochs import epoch_order, problems_of_step
from sgpo.train.rollout_batch import build_requests, check_version, scored_groups
from sgpo.types import Problem, PromptPair, RewardResult, Rollout, SgpoError, TaskData


@pytest.fixture
def task():
    return TaskData(
        [Problem(f"id-{i}", f"what is {i}?", str(i), strategy="s" if i != 2 else None) for i in range(4)],
        [PromptPair((1, i), (1, 9, i) if i != 2 else None) for i in range(4)],
    )


@pytest.fixture
def as_rank(monkeypatch):
    def become(rank, size):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(size))

    become(0, 1)
    return become


def rollout(request, version=0):
    return Rollout(request, (5,), (0.0,), truncated=False, policy_version=version)


def test_an_epoch_visits_every_problem_once(as_rank):
    steps = [problems_of_step(12, per_step=4, seed=1, step=step) for step in range(3)]
    assert sorted(i for step in steps for i in step) == list(range(12))


def test_an_incomplete_last_step_is_dropped(as_rank):
    steps = [problems_of_step(11, per_step=4, seed=1, step=step) for step in range(4)]
    assert [len(step) for step in steps] == [4] * 4
    assert len({*steps[0], *steps[1]}) == 8  # one epoch
    assert len({*steps[2], *steps[3]}) == 8
    assert list(epoch_order(11, seed=1, epoch=0))[:8] == steps[0] + steps[1]


def test_every_epoch_has_its_own_order_that_the_seed_decides(as_rank):
    first, second = (problems_of_step(50, per_step=50, seed=1, step=step) for step in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second)
    assert first == problems_of_step(50, per_step=50, seed=1, step=0)
    assert first != problems_of_step(50, per_step=50, seed=2, step=0)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_ranks_share_the_problems_of_a_step(as_rank, size):
    alone = problems_of_step(40, per_step=8, seed=3, step=2)
    shares = []
    for rank in range(size):
        as_rank(rank, size)
        shares.append(problems_of_step(40, per_step=8, seed=3, step=2))
    assert {len(share) for share in shares} == {8 // size}
    assert sorted(i for share in shares for i in share) == sorted(alone)


def test_requests_of_a_step(task):
    requests = build_requests(task, [3, 0], n_auto=3, n_guided=2, seed=7, step=1)
    assert [(r.problem_index, r.kind, r.sample_index) for r in requests] == [
        (3, "auto", 0), (3, "auto", 1), (3, "auto", 2), (3, "guided", 0), (3, "guided", 1),
        (0, "auto", 0), (0, "auto", 1), (0, "auto", 2), (0, "guided", 0), (0, "guided", 1),
    ]  # fmt: skip
    assert {r.prompt_ids for r in requests[:3]} == {(1, 3)}
    assert {r.prompt_ids for r in requests[3:5]} == {(1, 9, 3)}


def test_a_problem_without_guidance_gets_autonomous_rollouts_only(task):
    assert {r.kind for r in build_requests(task, [2], n_auto=2, n_guided=2, seed=7, step=1)} == {"auto"}
    assert {r.kind for r in build_requests(task, [0], n_auto=2, n_guided=0, seed=7, step=1)} == {"auto"}


def test_every_completion_of_a_run_has_its_own_seed(task):
    seeds = [
        request.seed
        for step in range(20)
        for request in build_requests(task, range(4), n_auto=4, n_guided=3, seed=7, step=step)
    ]
    assert len(set(seeds)) == len(seeds) == 20 * (4 * 4 + 3 * 3)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_seed_does_not_depend_on_the_company(task):
    """Neither on the other problems of the rank nor on the size of the groups."""
    together = build_requests(task, [1, 0, 3], n_auto=4, n_guided=2, seed=7, step=5)
    alone = build_requests(task, [0], n_auto=2, n_guided=1, seed=7, step=5)
    wanted = {(r.kind, r.sample_index): r.seed for r in together if r.problem_index == 0}
    assert all(wanted[r.kind, r.sample_index] == r.seed for r in alone)
    assert {r.seed for r in build_requests(task, [0], n_auto=2, n_guided=1, seed=8, step=5)}.isdisjoint(wanted.values())


def test_a_seed_belongs_to_the_problem_and_not_to_its_place_in_the_file(task):
    moved = TaskData(task.problems[::-1], task.prompts[::-1])
    one = build_requests(task, [3], n_auto=2, n_guided=2, seed=7, step=5)
    other = build_requests(moved, [0], n_auto=2, n_guided=2, seed=7, step=5)
    assert [(r.kind, r.prompt_ids, r.seed) for r in one] == [(r.kind, r.prompt_ids, r.seed) for r in other]


def test_stale_weights_are_refused(task):
    requests = build_requests(task, [0], n_auto=2, n_guided=0, seed=0, step=0)
    check_version([rollout(r, version=3) for r in requests], 3)
    check_version([], 3)
    with pytest.raises(SgpoError, match="weights of step 2 where step 3 was expected"):
        check_version([rollout(requests[0], version=3), rollout(requests[1], version=2)], 3)
    with pytest.raises(SgpoError, match="step 4"):
        check_version([rollout(requests[0], version=4)], 3)


def test_groups_hold_their_own_rollouts_and_results_in_order(task):
    indices = [3, 2, 0]
    rollouts = [rollout(r) for r in build_requests(task, indices, n_auto=3, n_guided=2, seed=0, step=0)]
    calls = []

    def score(scored):
        calls.append(len(scored))
        return [RewardResult(100.0 * r.request.problem_index + r.request.sample_index, r.request.kind) for r in scored]

    groups = scored_groups(task, indices, rollouts, score)
    assert calls == [3 * 3 + 2 * 2]
    assert [g.problem.id for g in groups] == ["id-3", "id-2", "id-0"]
    assert [g.prompts for g in groups] == [task.prompts[i] for i in indices]
    for group, index in zip(groups, indices, strict=True):
        assert group.auto_rewards == [100.0 * index + k for k in range(3)]
        assert group.guided_rewards == ([] if index == 2 else [100.0 * index + k for k in range(2)])
        assert {r.request.problem_index for r in group.auto + group.guided} == {index}
        assert {v.status for v in group.auto_results} == {"auto"}
        assert [r.request.sample_index for r in group.auto] == [0, 1, 2]


def test_a_demonstration_goes_with_its_problem(task):
    taught = replace(task, demo_ids=[(i, 9) for i in range(4)])
    assert [group.demo_ids for group in scored_groups(taught, [2, 0], [], lambda _: [])] == [(2, 9), (0, 9)]
    assert scored_groups(task, [2], [], lambda _: [])[0].demo_ids == ()


def test_a_result_stays_with_its_rollout_in_any_order(task):
    rollouts = [rollout(r) for r in build_requests(task, [0, 1, 3], n_auto=3, n_guided=2, seed=0, step=0)]
    random.Random(0).shuffle(rollouts)
    groups = scored_groups(
        task, [0, 1, 3], rollouts, lambda found: [RewardResult(r.request.seed / 2**63) for r in found]
    )
    for group in groups:
        assert group.auto_rewards == [r.request.seed / 2**63 for r in group.auto]
        assert group.guided_rewards == [r.request.seed / 2**63 for r in group.guided]


def test_a_lost_result_is_no_silent_zero(task):
    rollouts = [rollout(r) for r in build_requests(task, [0], n_auto=2, n_guided=0, seed=0, step=0)]
    with pytest.raises(ValueError):
        scored_groups(task, [0], rollouts, lambda found: [RewardResult(1.0)])
