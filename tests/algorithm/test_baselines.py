"""Each baseline's loss and gradient on a tiny batch, recomputed from its paper's formula with dense logits.

Methods and objective are bound by the config, as the trainer binds them; the formulas here share nothing with ours.
"""

import pytest
import torch

from sgpo.algorithm.dapo import dapo_sequences, is_informative, overlong_penalty
from sgpo.algorithm.method import all_sequences
from sgpo.builders.loss import training_loss, training_method
from sgpo.config import Config
from sgpo.data.builtin import make_model, vocabulary
from sgpo.engine.batching import collate_training
from sgpo.model.policy import PolicyModel
from sgpo.types import Problem, PromptPair, RewardResult, Rollout, RolloutRequest, ScoredGroup

LIMIT = 8  # rollout.max_new_tokens
REWARDS = ((0, 1, 0), (1, 1, 1), (0, 0, 0), (1, 0, 1))


@pytest.fixture(scope="module")
def lm():
    return make_model(seed=3, hidden=32, layers=1).double().eval()


@pytest.fixture(scope="module")
def groups():
    generator = torch.Generator().manual_seed(7)

    def ids(n):
        return tuple(torch.randint(3, len(vocabulary()), (n,), generator=generator).tolist())

    def rollout(prompt, k, length):
        request = RolloutRequest(0, "auto", k, prompt, seed=0)
        return Rollout(request, ids(length), (0.0,) * length, truncated=False, policy_version=0)

    found = []
    for rewards in REWARDS:
        prompt = ids(4)
        found.append(
            ScoredGroup(
                Problem("p", "?", "1"),
                PromptPair(prompt, None),
                auto=tuple(rollout(prompt, k, (3, 5, 8)[k]) for k in range(3)),
                guided=(),
                auto_results=tuple(RewardResult(float(r)) for r in rewards),
                guided_results=(),
                demo_ids=ids(6),
            )
        )
    return found


def config_of(method, **algorithm):
    rollout = {"engine": "hf", "problems_per_step": 4, "n_auto": 3, "n_guided": 0, "max_new_tokens": LIMIT}
    if method == "sft":
        rollout["n_auto"] = 0
    return Config.model_validate(
        {"model": {"path": "builtin"}, "data": {"train": "builtin"}, "rollout": rollout,
         "algorithm": {"method": method, **algorithm}}
    )  # fmt: skip


def distributions(lm, prompt, completion):
    logits = lm(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def logps(lm, prompt, completion):
    return distributions(lm, prompt, completion).gather(1, torch.tensor(completion)[:, None])[:, 0]


def rho(values):
    return (values - values.detach()).exp()


def luffy(lm, groups):
    total = 0.0
    for g in groups:
        rewards = [*g.auto_rewards, 1.0]
        mean = sum(rewards) / 4
        for rollout, reward in zip(g.auto, g.auto_rewards, strict=True):
            if reward == mean:  # no entropy bonus on rows without an advantage
                continue
            logp = distributions(lm, g.prompts.plain, rollout.completion_ids)
            entropy = -(logp.exp() * logp).sum(-1)
            taken = logps(lm, g.prompts.plain, rollout.completion_ids)
            total = total - ((reward - mean) * rho(taken) + 0.001 * entropy).sum() / (4 * 4 * LIMIT)
        p = logps(lm, g.prompts.plain, g.demo_ids).exp()
        total = total - (1.0 - mean) * (p / (p + 0.1)).sum() / (4 * 4 * LIMIT)
    return total


def hpt(lm, groups):
    total = 0.0
    for g in groups:
        if sum(g.auto_rewards) == 0:
            total = total - logps(lm, g.prompts.plain, g.demo_ids).mean() / 4
            continue
        mean = sum(g.auto_rewards) / 3
        for rollout, reward in zip(g.auto, g.auto_rewards, strict=True):
            taken = logps(lm, g.prompts.plain, rollout.completion_ids)
            total = total - (reward - mean) * rho(taken).sum() / (4 * 3 * LIMIT)
    return total


def dapo(lm, groups):
    kept = [g for g in groups if 0 < sum(g.auto_rewards) < 3]
    tokens = sum(len(r.completion_ids) for g in kept for r in g.auto)
    total = 0.0
    for g in kept:
        # The zone is the last 0.2 of 8 tokens: a completion of 8 is at its end and pays 1.
        rewards = torch.tensor([g.auto_rewards[0], g.auto_rewards[1], g.auto_rewards[2] - 1], dtype=torch.float64)
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        for rollout, advantage in zip(g.auto, advantages, strict=True):
            total = total - advantage * rho(logps(lm, g.prompts.plain, rollout.completion_ids)).sum() / tokens
    return total


def sft(lm, groups):
    tokens = sum(len(g.demo_ids) for g in groups)
    return -sum(logps(lm, g.prompts.plain, g.demo_ids).sum() for g in groups) / tokens


def grpo(lm, groups):
    total = 0.0
    for g in groups:
        rewards = torch.tensor(g.auto_rewards, dtype=torch.float64)
        if rewards.std() == 0:
            continue
        for rollout, advantage in zip(g.auto, (rewards - rewards.mean()) / (rewards.std() + 1e-6), strict=True):
            total = total - advantage * rho(logps(lm, g.prompts.plain, rollout.completion_ids)).mean() / (4 * 3)
    return total


def step_of(config, groups, lm):
    steps = training_method(config)(groups, problems=len(groups), score=lambda contexts: [], total=lambda value: value)
    assert [step.group for step in steps] == list(groups)
    sequences = all_sequences(steps)
    loss, total = training_loss(config), 0.0
    for part in (sequences[::2], sequences[1::2]):
        micro = collate_training(part, 0, with_teacher=False)
        total = total + PolicyModel(lm)(loss, micro)[0]
    return total


@pytest.mark.parametrize("method", [luffy, hpt, dapo, sft, grpo], ids=lambda f: f.__name__)
def test_a_baseline_by_hand(lm, groups, method):
    expected, found = method(lm, groups), step_of(config_of(method.__name__), groups, lm)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6, abs=1e-9)
    parameters = list(lm.parameters())
    for ours, truth in zip(
        torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        assert float(truth.norm()) > 0
        assert float((ours - truth).norm()) <= 1e-5 * float(truth.norm()) + 1e-12


def test_clips_hold_where_the_policy_has_moved(lm, groups):
    """DAPO's four regions: ratio above and below its clip, and the dual clip for a negative advantage."""
    objective = training_loss(config_of("dapo", dual_clip=1.5))
    (step,) = dapo_sequences(groups[:1], problems=1, score=None, total=float, max_new_tokens=LIMIT)
    first = step.sequences[0]
    for advantage, shift, value in ((1.0, 0.5, 1.28), (1.0, -0.5, None), (-1.0, -0.5, -0.8), (-1.0, 1.0, -1.5)):
        taken = logps(lm, first.prompt_ids, first.completion_ids).detach()
        old = tuple((taken - shift).tolist())
        moved = type(first)(first.prompt_ids, first.completion_ids, advantage, 1.0, old_logprobs=old)
        micro = collate_training([moved], 0, with_teacher=False)
        loss = PolicyModel(lm)(objective, micro)[0]
        expected = (torch.tensor(shift).exp().item() if value is None else value) * len(first.completion_ids)
        sign = advantage if value is None else 1.0
        assert float(loss.detach()) == pytest.approx(-sign * expected, rel=1e-5)


def test_the_overlong_penalty_rises_from_the_zone_to_the_limit():
    def penalty(length):
        rollout = Rollout(RolloutRequest(0, "auto", 0, (1,), 0), (1,) * length, (0.0,) * length, False, 0)
        return overlong_penalty(rollout, max_new_tokens=100, share=0.2)

    assert [penalty(n) for n in (1, 80, 85, 90, 100)] == pytest.approx([0, 0, 0.25, 0.5, 1.0])


def test_dapo_drops_what_all_or_none_solve(groups):
    assert [is_informative(g) for g in groups] == [True, False, False, True]
    steps = training_method(config_of("dapo"))(groups[1:3], problems=2, score=None, total=lambda value: value)
    assert [step.sequences for step in steps] == [[], []]


def test_the_constants_of_a_method_are_defaults():
    assert config_of("dapo").algorithm.dual_clip == 10.0
    assert config_of("dapo").algorithm.refill_rounds == 9
    assert config_of("dapo", dual_clip=None).algorithm.dual_clip is None
    assert config_of("luffy").algorithm.entropy_coef == 0.001
    assert config_of("luffy").algorithm.clip_low is None
    assert config_of("hpt", normalize_std=True).algorithm.normalize_std is True
    assert config_of("grpo").algorithm.clip_high == 0.28
