"""avg@k: the arithmetic on made-up rollouts, then the built-in model with the exact reward."""

import pytest
import torch

from sgpo.commands.eval import evaluate_model
from sgpo.config import Config
from sgpo.data.builtin import make_problems
from sgpo.data.prompts import PromptBuilder, PromptTemplate
from sgpo.evaluation.held_out import evaluate
from sgpo.model.loading import load_causal_lm, load_tokenizer
from sgpo.rewards.pool import RewardPool
from sgpo.rollout.hf_engine import HfEngine
from sgpo.types import Problem, PromptPair, RewardResult, Rollout, SamplingParams, TaskData
from sgpo.utils.config_file import load_settings

SAMPLING = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=6)


class FakeTokenizer:
    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return " ".join(map(str, ids))


class FakeRollouts:
    """Completion of sample k of problem i: the token 100 i + k, i + 1 times; odd samples are truncated."""

    def __init__(self):
        self.requests = []

    def generate(self, requests, sampling, on_progress=None, on_rollout=None):
        self.requests = list(requests)
        if on_progress:
            on_progress(len(requests), 0)
        rollouts = [
            Rollout(
                r, (100 * r.problem_index + r.sample_index,) * (r.problem_index + 1), (), bool(r.sample_index % 2), 0
            )
            for r in requests
        ]
        for rollout in reversed(rollouts):
            on_rollout(rollout)
        return rollouts


class FakeRewards:
    """Rewards by first token."""

    def __init__(self, rewards):
        self.rewards = rewards
        self.items = []
        self.begun = []

    def begin(self, item):
        self.begun.append(item)

    def score(self, items):
        assert list(items) == self.begun[::-1]  # each was begun as it came
        self.items += items
        return [RewardResult(self.rewards.get(int(item.completion.split()[0]), 0.0)) for item in items]


def make_task(count, unguided=()):
    return TaskData(
        [Problem(f"p{i:02d}", f"question {i}", f"answer {i}") for i in range(count)],
        [PromptPair((1, i), None if i in unguided else (2, i)) for i in range(count)],
    )


def run(rewards, *, count=3, samples=2, rollouts=None, unguided=(), **options):
    rollouts = rollouts or FakeRollouts()
    rewards = FakeRewards(rewards)
    task = make_task(count, unguided)
    options = {"seed": 1, **options}
    return evaluate(rollouts, rewards, FakeTokenizer(), task, SAMPLING, samples=samples, **options), rollouts, rewards


def test_avg_at_k_by_hand():
    # Problem 0: both right, 1: one of two, 2: none. Lengths 1, 1, 2, 2, 3, 3; every second one truncated.
    found, _, rewards = run({0: 1.0, 1: 1.0, 101: 1.0})
    assert found.accuracy == pytest.approx((1 + 0.5 + 0) / 3)
    assert (found.k, found.length, found.truncated) == (2, 2.0, 0.5)
    assert found.low <= found.accuracy <= found.high
    assert found.metrics()["accuracy"] == found.accuracy
    assert (rewards.items[2].gold, rewards.items[2].problem, rewards.items[2].completion) == (
        "answer 1", "question 1", "100 100",
    )  # fmt: skip


def test_a_row_per_completion():
    found, _, _ = run({101: 1.0})
    assert [(row["problem_id"], row["sample"]) for row in found.samples] == [
        (f"p{i:02d}", k) for i in range(3) for k in range(2)
    ]
    row = found.samples[3]
    assert (row["reward"], row["tokens"], row["truncated"], row["text"], row["kind"]) == (
        1.0,
        2,
        True,
        "101 101",
        "auto",
    )


def test_a_reward_counts_as_right_or_not():
    assert run({0: 5.0, 1: 0.25, 100: -1.0})[0].accuracy == pytest.approx(1 / 3)


@pytest.mark.parametrize(("reward", "accuracy"), [(1.0, 1.0), (0.0, 0.0)])
def test_unanimous_results_have_an_interval_of_no_width(reward, accuracy):
    found, _, _ = run({100 * i + k: reward for i in range(3) for k in range(2)})
    assert (found.accuracy, found.low, found.high) == (accuracy, accuracy, accuracy)


@pytest.mark.parametrize("seed", range(8))
def test_the_interval_contains_the_mean(seed):
    generator = torch.Generator().manual_seed(seed)
    rewards = {100 * i + k: float(torch.rand((), generator=generator) < 0.3) for i in range(20) for k in range(4)}
    found, _, _ = run(rewards, count=20, samples=4, seed=seed)
    assert 0 <= found.low < found.accuracy < found.high <= 1


def test_the_interval_is_over_problems_and_not_over_samples():
    """More samples of the same problems with the same rates do not make the mean over problems more certain."""
    few, _, _ = run({100 * i: 1.0 for i in range(10)}, count=20, samples=1)
    many, _, _ = run({100 * i + k: 1.0 for i in range(10) for k in range(9)}, count=20, samples=9)
    assert (few.low, few.high) == (many.low, many.high)


def test_guided_evaluation_leaves_out_problems_without_guidance():
    found, rollouts, _ = run({0: 1.0}, unguided=(1,), kind="guided")
    assert {r.problem_index for r in rollouts.requests} == {0, 2}
    assert {r.prompt_ids[0] for r in rollouts.requests} == {2}
    assert {row["kind"] for row in found.samples} == {"guided"}
    assert found.accuracy == pytest.approx(0.25)
    plain, rollouts, _ = run({0: 1.0}, unguided=(1,))
    assert {r.prompt_ids[0] for r in rollouts.requests} == {1}
    assert plain.accuracy == pytest.approx(1 / 6)


def test_nothing_to_evaluate_has_no_accuracy():
    found, _, _ = run({}, unguided=(0, 1, 2), kind="guided")
    assert found.accuracy != found.accuracy
    assert found.samples == []


def test_seeds_are_paired_across_policies_and_differ_between_samples_kinds_and_runs():
    _, first, _ = run({}, samples=4)
    _, again, _ = run({1: 1.0}, samples=4)
    _, fewer, _ = run({}, samples=2, count=2)
    _, guided, _ = run({}, samples=4, kind="guided")
    _, other, _ = run({}, samples=4, seed=2)
    seeds = [r.seed for r in first.requests]
    assert len(set(seeds)) == 12
    assert [r.seed for r in again.requests] == seeds
    assert {r.seed for r in fewer.requests} <= set(seeds)
    for different in (guided, other):
        assert {r.seed for r in different.requests}.isdisjoint(seeds)


def test_ranks_share_the_problems(monkeypatch):
    monkeypatch.setattr("sgpo.evaluation.held_out.distributed.world_size", lambda: 2)
    monkeypatch.setattr("sgpo.evaluation.held_out.distributed.gather", lambda value: [value])
    seen = []
    for rank in range(2):
        monkeypatch.setattr("sgpo.evaluation.held_out.distributed.rank", lambda rank=rank: rank)
        seen.append({r.problem_index for r in run({}, count=5)[1].requests})
    assert seen == [{0, 2, 4}, {1, 3}]


def test_progress_is_reported():
    calls = []
    run({}, on_progress=lambda done, tokens: calls.append(done))
    assert calls == [6]


# The real parts together.


@pytest.fixture(scope="module")
def rewards():
    with RewardPool("exact", workers=1) as pool:
        yield pool


@pytest.fixture(scope="module")
def real(builtin_folder):
    tokenizer = load_tokenizer(builtin_folder)
    template = PromptTemplate(system=None, plain="{problem}", guided="{strategy}\n{problem}")
    problems = make_problems("eval", seed=0, count=6)
    prompts = PromptBuilder(tokenizer, template, max_prompt_tokens=64).check_all(problems)
    engine = HfEngine(
        load_causal_lm(builtin_folder, dtype="float32"), eos_ids=[tokenizer.eos_token_id],
        pad_id=tokenizer.pad_token_id, device=torch.device("cpu"), max_batch_tokens=4096,
    )  # fmt: skip
    return engine, tokenizer, TaskData(problems, prompts)


def test_the_same_seed_gives_the_same_samples(real, rewards):
    engine, tokenizer, task = real
    first, again, other = (
        evaluate(engine, rewards, tokenizer, task, SAMPLING, samples=2, seed=seed) for seed in (5, 5, 6)
    )
    assert first == again
    assert [row["text"] for row in first.samples] != [row["text"] for row in other.samples]
    assert len(first.samples) == 12
    assert all(row["tokens"] <= 6 for row in first.samples)


class Parrot:
    """Answers as told, to see that text reaches the reward intact."""

    def __init__(self, tokenizer, texts):
        self.completions = [
            (*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id) for text in texts
        ]

    def generate(self, requests, sampling, on_progress=None, on_rollout=None):
        return [Rollout(r, self.completions[r.problem_index], (), False, 0) for r in requests]


def test_right_answers_are_rewarded_and_wrong_ones_are_not(real, rewards):
    _, tokenizer, task = real
    answers = [problem.answer for problem in task.problems]
    texts = [rf"left \boxed{{{answer if i % 2 else int(answer) + 1}}}" for i, answer in enumerate(answers)]
    found = evaluate(Parrot(tokenizer, texts), rewards, tokenizer, task, SAMPLING, samples=1, seed=0)
    assert found.accuracy == 0.5
    assert [row["reward"] for row in found.samples] == [0.0, 1.0] * 3
    assert "<|im_end|>" not in found.samples[0]["text"]


def test_the_command_evaluates_both_contexts(builtin_folder, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        f"run: {{output_dir: {tmp_path}}}\nmodel: {{path: {builtin_folder}, dtype: float32}}\n"
        "data: {train: builtin, eval: builtin, eval_limit: 3}\nrollout: {engine: hf}\n"
        "reward: {kind: exact, workers: 1}\neval: {samples: 2, max_new_tokens: 4}\n"
    )
    found = evaluate_model(load_settings(Config, path))
    assert list(found) == ["auto", "guided"]
    assert all(len(result.samples) == 6 and result.k == 2 for result in found.values())
    assert list(evaluate_model(load_settings(Config, path, ["--eval.guided=false"]))) == ["auto"]
