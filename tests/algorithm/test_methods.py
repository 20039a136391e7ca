"""Which sequences a step consists of, with which weights: hand-made groups, then Eq. 7 recomputed with dense torch."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from sgpo.algorithm.dapo import dapo_sequences
from sgpo.algorithm.grpo import policy_sequences
from sgpo.algorithm.hpt import hpt_sequences
from sgpo.algorithm.loss import LossSettings, SgpoLoss
from sgpo.algorithm.luffy import luffy_sequences
from sgpo.algorithm.method import all_sequences
from sgpo.algorithm.sft import sft_sequences
from sgpo.algorithm.sgpo import SgpoSettings, sgpo_sequences
from sgpo.data.builtin import make_model, vocabulary
from sgpo.engine.batching import collate_training
from sgpo.model.policy import PolicyModel
from sgpo.types import (
    Problem,
    PromptPair,
    RewardResult,
    Rollout,
    RolloutRequest,
    ScoredGroup,
    SgpoError,
    TrainSequence,
)

PLAIN, GUIDED = (10, 11), (20, 21, 22)


def rollout(kind, prompt, completion):
    request = RolloutRequest(0, kind, 0, prompt, seed=0)
    return Rollout(request, tuple(completion), (0.0,) * len(completion), truncated=False, policy_version=0)


def group(auto, guided=(), *, lengths=None, plain=PLAIN, guided_prompt=GUIDED, above=0.0):
    """Rewards per kind; guided completion i is the token 30 + i, repeated lengths[i] times (default i + 1). A reward
    above `above` is correct."""
    lengths = lengths or [i + 1 for i in range(len(guided))]
    return ScoredGroup(
        problem=Problem("p", "?", "1", strategy="s"),
        prompts=PromptPair(plain, guided_prompt),
        auto=tuple(rollout("auto", plain, [40 + i] * (i + 1)) for i in range(len(auto))),
        guided=tuple(rollout("guided", guided_prompt, [30 + i] * n) for i, n in enumerate(lengths)),
        auto_results=tuple(RewardResult(r, correct_above=above) for r in auto),
        guided_results=tuple(RewardResult(r, correct_above=above) for r in guided),
    )


class FakeScorer:
    """Every token of a completion that starts with token t has log-prob `logprobs[t]`."""

    def __init__(self, logprobs=None):
        self.logprobs = logprobs or {}
        self.calls = []

    def __call__(self, contexts):
        self.calls.append(list(contexts))
        return [[self.logprobs[completion[0]]] * len(completion) for _, completion in contexts]


def step_of(groups, settings, **options):
    """All sequences, and the guidance of each group."""
    steps = sgpo_sequences(groups, settings, **options)
    assert [step.group for step in steps] == list(groups)
    return all_sequences(steps), [step.guidance for step in steps]


def sequences_of(groups, scorer=None, problems=1, **settings):
    scorer = scorer or FakeScorer({30: -1.0, 31: -1.0, 32: -1.0, 33: -1.0})
    found, guidance = step_of(groups, SgpoSettings(**settings), problems=problems, score=scorer)
    return [s for s in found if s.policy_weight], [s for s in found if s.distill_weight], guidance, scorer


def test_policy_sequences_by_hand():
    found = policy_sequences(group([1, 0, 0, 0]), problems=5)
    assert [s.prompt_ids for s in found] == [PLAIN] * 4
    assert [s.completion_ids for s in found] == [(40,), (41, 41), (42, 42, 42), (43, 43, 43, 43)]
    assert [s.advantage for s in found] == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    assert [s.policy_weight for s in found] == pytest.approx([1 / (5 * 4 * n) for n in (1, 2, 3, 4)])
    assert all(s.distill_weight == 0 and s.teacher_prompt_ids is None and s.old_logprobs is None for s in found)


def test_policy_sequences_without_the_division():
    assert [s.advantage for s in policy_sequences(group([1, 0, 0, 0]), problems=1, normalize_std=False)] == [
        0.75, -0.25, -0.25, -0.25,
    ]  # fmt: skip


@pytest.mark.parametrize("rewards", [[0, 0, 0], [1, 1, 1], [0.1, 0.1, 0.1], [1]])
def test_a_group_of_equal_rewards_gives_no_sequence(rewards):
    assert policy_sequences(group(rewards), problems=1) == []
    policy, target, _, _ = sequences_of([group(rewards)])
    assert policy == target == []


def test_a_rollout_at_the_mean_of_its_group_is_left_out_but_counts_in_the_denominator():
    found = policy_sequences(group([0, 0.5, 1]), problems=1)
    assert [s.completion_ids[0] for s in found] == [40, 42]
    assert [s.policy_weight for s in found] == pytest.approx([1 / 3, 1 / 9])


def test_sft_weighs_every_token_of_the_batch_alike():
    demos = [TrainSequence((1,), (2, 3)), TrainSequence((1,), (4,) * 6)]
    found = sft_sequences(demos, total_tokens=8)
    assert [s.distill_weight for s in found] == [1 / 8, 1 / 8]
    assert sum(s.distill_weight * len(s.completion_ids) for s in found) == 1
    assert [s.completion_ids for s in found] == [d.completion_ids for d in demos]
    assert all(s.teacher_prompt_ids is None and s.policy_weight == 0 for s in found)


def test_the_target_is_scored_under_the_plain_prompt_and_distilled_from_the_guided_one():
    # p_auto 0, p_guided 3/4: alpha is capped at 0.8. Sums: 30 -> -3 (1 token), 31 -> -4 (2), 33 -> -2 (4 tokens).
    scorer = FakeScorer({30: -3.0, 31: -2.0, 33: -0.5})
    policy, target, guidance, _ = sequences_of([group([0, 0], [1, 1, 0, 1])], scorer, problems=3)
    assert scorer.calls == [[(PLAIN, (30,)), (PLAIN, (31, 31)), (PLAIN, (33,) * 4)]]
    assert policy == []
    (chosen,) = target
    assert (chosen.prompt_ids, chosen.teacher_prompt_ids, chosen.completion_ids) == (PLAIN, GUIDED, (33,) * 4)
    assert chosen.distill_weight == pytest.approx(0.8 / (3 * 1 * 4))
    assert chosen.policy_weight == chosen.advantage == 0
    assert guidance[0].selection_score == -2.0
    assert guidance[0].alpha == 0.8
    assert guidance[0].alpha_uncapped == pytest.approx(0.5 * 0.85 / 0.1)
    assert [r.completion_ids for r in guidance[0].teacher_completions] == [(33,) * 4]


def test_the_mean_score_can_choose_another_target_than_the_sum():
    logprobs = {30: -1.5, 31: -1.0}  # sums -1.5 and -2, means -1.5 and -1
    by_sum = sequences_of([group([0], [1, 1])], FakeScorer(logprobs), selection="sum")
    by_mean = sequences_of([group([0], [1, 1])], FakeScorer(logprobs), selection="mean")
    assert by_sum[1][0].completion_ids == (30,)
    assert by_mean[1][0].completion_ids == (31, 31)
    assert (by_sum[2][0].selection_score, by_mean[2][0].selection_score) == (-1.5, -1.0)


def test_a_tie_goes_to_the_first():
    _, target, _, _ = sequences_of([group([0], [0, 1, 1], lengths=[1, 2, 2])], FakeScorer({31: -1.0, 32: -1.0}))
    assert target[0].completion_ids == (31, 31)


def test_scoring_is_one_call_even_when_there_is_nothing_to_choose():
    contested = group([0, 0], [1, 1])
    for groups in (
        [], [group([0, 1], [0, 0])], [group([0, 0], [1, 0])], [group([1, 1], [0, 0])], [group([0])],
        [contested], [contested, contested],
    ):  # fmt: skip
        assert len(sequences_of(groups)[3].calls) == 1
    for settings in ({"distillation": None}, {"selection": "all"}, {"alpha": "fixed", "alpha_fixed": 0.0}):
        assert sequences_of([contested], **settings)[3].calls == [[]]
    assert sequences_of([group([0, 0], [1, 0])])[3].calls == [[]]


def test_scores_return_to_their_own_group():
    """Two, none, one and three correct guided completions: the flat list of scores is dealt out in order."""
    groups = [group([0], [1, 1, 0]), group([0], [0, 0]), group([0], [0, 1]), group([0], [1, 1, 1])]
    calls = []

    def score(contexts):
        calls.append(contexts)
        return [[-9.0] * 1, [-1.0] * 2, [-7.0] * 1, [-8.0] * 2, [-0.5] * 3]

    found, guidance = step_of(groups, SgpoSettings(), problems=4, score=score)
    assert [s.completion_ids for s in found] == [(31, 31), (31, 31), (32, 32, 32)]
    assert [g.selection_score for g in guidance] == [-2.0, None, None, -1.5]
    assert len(calls[0]) == 5


def test_all_correct_ones_are_learnt_in_equation_2():
    groups = [group([0, 1], [1, 1], lengths=[5, 6])]
    found, (chosen,) = step_of(groups, SgpoSettings(selection="all"), problems=1, score=FakeScorer())
    assert len(chosen.teacher_completions) == 2
    assert len([s for s in found if s.distill_weight]) == 2


def test_no_correct_guided_rollout_leaves_no_target_and_no_alpha():
    _, target, guidance, _ = sequences_of([group([0, 1], [0, 0, 0])])
    assert target == []
    assert (guidance[0].alpha, guidance[0].teacher_completions, guidance[0].selection_score) == (0.0, (), None)


def test_a_problem_without_guided_rollouts_is_plain_grpo():
    policy, target, guidance, _ = sequences_of([group([0, 1])])
    assert len(policy) == 2
    assert target == []
    assert guidance[0].teacher_completions == ()


def test_alpha_zero_gives_no_target_sequence():
    _, target, guidance, scorer = sequences_of([group([1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0, 0])])
    assert target == []
    assert guidance[0].alpha == 0.0
    assert guidance[0].alpha_uncapped == pytest.approx(0.5 * (0.25 - 1 + 0.1) / 1.1)
    assert scorer.calls == [[]]


def test_every_correct_rollout_shares_alpha_in_equation_2():
    _, target, guidance, scorer = sequences_of([group([0, 1], [1, 0, 1, 1])], problems=3, selection="all")
    alpha = 0.5 * (0.75 - 0.5 + 0.1) / 0.6
    assert [s.completion_ids[0] for s in target] == [30, 32, 33]
    assert [s.distill_weight for s in target] == pytest.approx([alpha / (3 * 3 * n) for n in (1, 3, 4)])
    assert all(s.teacher_prompt_ids == GUIDED for s in target)
    assert guidance[0].selection_score is None
    assert scorer.calls == [[]]
    assert sum(s.distill_weight * len(s.completion_ids) for s in target) == pytest.approx(alpha / 3)


@pytest.mark.parametrize("distillation", ["forward_kl", "reverse_kl", "js", "sft", None])
def test_the_kind_of_distillation(distillation):
    policy, target, guidance, _ = sequences_of([group([0, 1], [1, 1])], distillation=distillation)
    assert len(policy) == 2
    if distillation is None:
        assert target == []
        assert guidance[0].alpha == 0
        return
    assert len(target) == 1
    assert target[0].prompt_ids == PLAIN
    assert target[0].teacher_prompt_ids == (None if distillation == "sft" else GUIDED)
    assert target[0].distill_weight == pytest.approx(0.5)


def test_distillation_only():
    policy, target, _, _ = sequences_of([group([0, 1], [1, 1])], autonomous_grpo=False)
    assert policy == []
    assert len(target) == 1


def test_advantages_without_standard_deviation():
    policy, _, _, _ = sequences_of([group([0, 1])], normalize_std=False)
    assert [s.advantage for s in policy] == [-0.5, 0.5]


def test_guided_rollouts_never_enter_the_policy_loss():
    policy, _, _, _ = sequences_of([group([0, 1, 0], [1, 0, 1])])
    assert {s.completion_ids[0] for s in policy} == {40, 41, 42}
    assert [s.policy_weight * len(s.completion_ids) for s in policy] == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize(
    ("auto", "guided", "settings", "alpha"),
    [
        ([0, 0], [1, 0, 0, 0], {}, 0.8),
        ([0, 1], [1, 1], {}, 0.5),
        ([1, 1], [1, 1], {}, 1 / 22),
        ([0, 1], [1, 1], {"alpha_0": 0.3, "alpha_gamma": 0.5}, 0.3),
        ([0, 0], [1, 1], {"alpha_max": 0.65}, 0.65),
        ([1, 1], [1, 0], {"alpha": "fixed"}, 1.0),
        ([0, 0], [1, 0], {"alpha": "fixed", "alpha_fixed": 0.25}, 0.25),
        ([0, 1, 1, 1, 1, 1, 1, 1], [0, 1], {"alpha": "group_advantage"}, 1 / 3),
        ([0, 0, 0, 0, 0, 0, 0, 1], [0, 1], {"alpha": "group_advantage"}, 0.8),
        ([0, 0, 0, 0, 0, 0, 0, 1], [0, 1], {"alpha": "group_advantage", "alpha_max": 1.2}, 1.2),
        ([1, 1], [1, 1], {"alpha": "group_advantage"}, 0.0),
    ],
)
def test_alpha_of_a_group(auto, guided, settings, alpha):
    _, target, guidance, _ = sequences_of([group(auto, guided)], **settings)
    assert guidance[0].alpha == pytest.approx(alpha, rel=1e-5)
    assert sum(s.distill_weight * len(s.completion_ids) for s in target) == pytest.approx(alpha, rel=1e-5)


def test_alpha_counts_passes_and_not_reward_sums():
    _, _, guidance, _ = sequences_of([group([0, 5.0], [0.5, 0.5])])
    assert guidance[0].alpha == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("above", "target", "alpha"),
    [
        (0.0, 31, 0.5 * (1.0 - 0.75 + 0.1) / 0.85),  # the most reachable of all
        (0.25, 32, 0.5 * (2 / 4 - 0.5 + 0.1) / 0.6),  # a reward of exactly 0.25 is wrong
        (0.5, 33, 0.5 * (1 / 4 - 0.25 + 0.1) / 0.35),
        (1.0, None, 0.0),
    ],
)
def test_correct_is_a_reward_above_the_threshold(above, target, alpha):
    """In both pass rates, and in what o+ is chosen from."""
    scorer = FakeScorer({30: -9.0, 31: -0.1, 32: -1.0, 33: -2.0})
    groups = [group([0, 0.25, 0.5, 1.0], [0.25, 0.1, 0.5, 1.0], above=above)]
    _, targets, (chosen,), _ = sequences_of(groups, scorer)
    assert [s.completion_ids[0] for s in targets] == ([] if target is None else [target])
    assert chosen.alpha == pytest.approx(alpha)


@pytest.mark.parametrize("status", ["no_answer", "too_long", "timeout", "error"])
def test_what_could_not_be_judged_is_correct_for_no_threshold(status):
    assert not RewardResult(0.0, status, correct_above=-2.0).is_correct
    assert RewardResult(-1.0, correct_above=-2.0).is_correct


@pytest.mark.parametrize(
    ("selection", "rewards"), [("sum", [0.25]), ("mean", [0.25]), ("all", [1.0, 0.25])], ids=["sum", "mean", "all"]
)
def test_group_advantage_is_that_of_the_chosen_rollout_and_not_of_the_best(selection, rewards):
    auto, chosen = [0.0, 0.125, 0.0, 0.5], sum(rewards) / len(rewards)
    scorer = FakeScorer({30: -9.0, 31: -0.1})
    settings = {"alpha": "group_advantage", "alpha_max": 3.0, "selection": selection}
    _, target, (guidance,), _ = sequences_of([group(auto, [1.0, 0.25])], scorer, **settings)
    pool = torch.tensor([*auto, chosen], dtype=torch.float64)
    assert guidance.alpha == pytest.approx(float((chosen - pool.mean()) / pool.std()), rel=1e-4)
    assert len(target) == len(rewards)


@pytest.mark.parametrize(("auto", "guided"), [([0.1] * 9, [0.1]), ([1.0, 1.0], [0.25, 1.0]), ([0.5, 1.0], [1.0, 0.5])])
def test_an_o_plus_that_is_no_better_than_its_group_is_not_distilled(auto, guided):
    """Its advantage is 0 or below, also where a correct one that is less reachable has a higher reward."""
    scorer = FakeScorer({30: -9.0, 31: -0.1})
    _, target, (guidance,), _ = sequences_of([group(auto, guided)], scorer, alpha="group_advantage")
    assert target == []
    assert (guidance.alpha, guidance.teacher_completions, guidance.selection_score) == (0.0, (), None)
    assert guidance.alpha_uncapped <= 0


@pytest.mark.parametrize("kind", ["auto", "guided"])
@pytest.mark.parametrize("method", ["sgpo", "dapo", "luffy", "hpt"])
def test_a_completion_without_a_token_is_the_engines_fault(method, kind):
    empty = replace(group([1, 0], [1, 0]), **{kind: (rollout(kind, PLAIN, ()), rollout(kind, PLAIN, (5,)))})
    rest = {"problems": 1, "score": FakeScorer({5: -1.0}), "total": float}
    run = {
        "sgpo": partial(sgpo_sequences, settings=SgpoSettings()),
        "dapo": partial(dapo_sequences, max_new_tokens=8),
        "luffy": partial(luffy_sequences, max_new_tokens=8),
        "hpt": partial(hpt_sequences, max_new_tokens=8),
    }[method]
    with pytest.raises(SgpoError, match=r"engine gave problem 'p' a completion without a token"):
        run([empty], **rest)


def test_every_sequence_is_live():
    groups = [group([0, 1], [1, 1]), group([1, 1], [1, 0]), group([0, 0], [0, 0]), group([0.0, 0.5, 1.0])]
    found, _ = step_of(groups, SgpoSettings(), problems=4, score=FakeScorer({30: -1.0, 31: -2.0}))
    assert found
    assert all(s.is_live for s in found)


# Equation 7 by hand: no packing, no rows, no fused loss.

CLIPS = {"clip_low": 0.2, "clip_high": 0.28}
DELTA = 0.02


@pytest.fixture(scope="module")
def lm():
    return make_model(seed=3, hidden=32, layers=1).double().eval()


def token_logps(lm, prompt, completion):
    """[|o|, V] log-probabilities that predict the completion's tokens."""
    logits = lm(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def taken(lm, prompt, completion):
    return token_logps(lm, prompt, completion).gather(1, torch.tensor(completion)[:, None]).squeeze(1)


def step_groups():
    generator = torch.Generator().manual_seed(5)

    def ids(n):
        return torch.randint(3, len(vocabulary()), (n,), generator=generator).tolist()

    groups = []
    for auto, guided in (
        [(0, 1, 0), (1, 1, 0)],
        [(1, 1, 1), (0, 1, 0)],
        [(0, 0, 1), (0, 0, 0)],
        [(0, 0, 0), (1, 1, 1)],
    ):
        plain, guided_prompt = tuple(ids(4)), tuple(ids(9))
        groups.append(
            ScoredGroup(
                Problem("p", "?", "1"), PromptPair(plain, guided_prompt),
                auto=tuple(rollout("auto", plain, ids(2 + i)) for i in range(3)),
                guided=tuple(rollout("guided", guided_prompt, ids(6 - i)) for i in range(3)),
                auto_results=tuple(RewardResult(float(r)) for r in auto),
                guided_results=tuple(RewardResult(float(r)) for r in guided),
            )
        )  # fmt: skip
    return groups


def total_by_hand(lm, groups, sum_of_logprobs=True):
    """mean over problems of L_GRPO(q) + alpha(q) L_KD(q); counts of kept and masked tokens."""
    total, kept, masked = 0.0, 0, 0
    for g in groups:
        rewards = torch.tensor(g.auto_rewards, dtype=torch.float64)
        policy = 0.0
        if len(set(g.auto_rewards)) > 1:
            for r, reward in zip(g.auto, rewards, strict=True):
                logps = taken(lm, g.prompts.plain, r.completion_ids)
                advantage = (reward - rewards.mean()) / (rewards.std() + 1e-6)
                policy = policy - ((logps - logps.detach()).exp() * advantage).mean() / len(g.auto)
        correct = [r for r, reward in zip(g.guided, g.guided_rewards, strict=True) if reward]
        distilled = 0.0
        if correct:
            best = max(correct, key=lambda r: float(taken(lm, g.prompts.plain, r.completion_ids).detach().sum()))
            student = token_logps(lm, g.prompts.plain, best.completion_ids)
            teacher = token_logps(lm, g.prompts.guided, best.completion_ids).detach()
            divergence = (teacher.exp() * (teacher - student)).sum(-1)
            keep = divergence <= DELTA
            kept, masked = kept + int(keep.sum()), masked + int((~keep).sum())
            p_auto, p_guided = float(rewards.mean()), len(correct) / len(g.guided)
            alpha = min(max(0.5 * (p_guided - p_auto + 0.1) / (p_auto + 0.1), 0.0), 0.8)
            distilled = alpha * (divergence * keep).sum() / len(best.completion_ids)
        total = total + (policy + distilled) / len(groups)
    return total, kept, masked


def total_of_sequences(lm, sequences, micro_batches):
    model, loss = PolicyModel(lm), SgpoLoss(LossSettings(**CLIPS, max_token_kl=DELTA))
    total = 0.0
    for micro in (collate_training(part, 0, with_teacher=True) for part in micro_batches(sequences)):
        total = total + model(loss, micro)[0]
    return total


@pytest.mark.parametrize(
    "micro_batches",
    [lambda s: [s], lambda s: [[x] for x in s], lambda s: [s[1::2], [], s[::2]]],
    ids=["one", "single", "two_and_an_empty"],
)
def test_equation_7_equals_the_sum_over_the_sequences(lm, micro_batches):
    groups = step_groups()

    def score(contexts):
        with torch.no_grad():
            return [taken(lm, prompt, completion).tolist() for prompt, completion in contexts]

    sequences, guidance = step_of(groups, SgpoSettings(), problems=len(groups), score=score)
    assert len(sequences) == 6 + 2  # two mixed groups of three; of three problems with a target one has alpha 0
    assert [bool(g.teacher_completions) for g in guidance] == [True, False, False, True]
    expected, kept, masked = total_by_hand(lm, groups)
    assert min(kept, masked) > 0

    parameters = list(lm.parameters())
    found = total_of_sequences(lm, sequences, micro_batches)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6, abs=1e-9)
    for ours, truth in zip(
        torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        assert float((ours - truth).norm()) <= 1e-5 * float(truth.norm()) + 1e-12
    assert math.isfinite(float(found.detach()))
