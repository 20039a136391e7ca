"""From a key in YAML to the loss, the gradient norm, the weights after the step and what is logged, for every switch.

The trainer's own way (choice, old log-probs, micro-batches, ZeRO engine, clipping, AdamW) against tests/fp64_step.py.
"""

import copy
import math
import random
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import yaml
from fp64_step import Step
from transformers import Qwen3Config, Qwen3ForCausalLM

from sgpo.builders.loss import training_loss, training_method
from sgpo.builders.model_engine import engine_on
from sgpo.config import Config
from sgpo.engine.step import optimizer_step
from sgpo.train.step_metrics import Clock, record_groups, record_guidance, record_passes, record_update
from sgpo.train.update import choose_sequences, step_lr
from sgpo.types import Problem, PromptPair, RewardResult, Rollout, RolloutRequest, ScoredGroup
from sgpo.utils.config_file import known_keys, load_settings
from sgpo.utils.distributed import Meter

VOCABULARY, STEP, STEPS = 40, 1, 4
# eps is large, so that AdamW's update shows the size of a gradient, and with it the clipping; lr is large, so that the
# second mini-batch meets clipped ratios. A limit of 0.3 nats parts the tokens.
BASE = """
run: {seed: 3}
model: {path: builtin, dtype: float32}
data: {train: builtin}
rollout: {engine: hf, problems_per_step: 4, n_auto: 4, n_guided: 3, temperature: 0.7, max_new_tokens: 12}
reward: {kind: "my.module:reward"}
algorithm: {max_token_kl: 0.3, mini_batches: 2}
optim: {lr: 0.05, eps: 0.01, max_grad_norm: 0.05, weight_decay: 0.1}
engine: {micro_batch_tokens: 60, loss_impl: torch}
"""
GRPO = {"algorithm.method": "grpo", "rollout.n_guided": 0}
SFT = {"algorithm.method": "sft", "rollout.n_guided": 0, "rollout.n_auto": 0}
ONE = {"algorithm.mini_batches": 1}


def method(name, **others):
    return {"algorithm.method": name, "rollout.n_guided": 0, **others}


# Each is a change to BASE. They differ from BASE, or from the other cells of their key, in what they learn.
CELLS = [
    {},
    ONE,
    {"algorithm.mini_batches": 4},
    GRPO,
    method("dapo"),
    method("dapo", **{"algorithm.overlong_share": 0.6, "algorithm.dual_clip": 1.2}),
    method("luffy"),
    method("luffy", **{"algorithm.demo_shaping": 0.5, "algorithm.entropy_coef": 0.2}),
    method("luffy", **{"algorithm.normalize_std": True}),
    method("hpt"),
    method("hpt", **{"algorithm.demo_gate": 2, "algorithm.normalize_std": True}),
    SFT,
    {"algorithm.autonomous_grpo": False},
    {"algorithm.normalize_std": False},
    {"algorithm.clip_low": 0.05},
    {"algorithm.clip_high": 0.05},
    {"algorithm.clip_low": None, "algorithm.clip_high": None},
    {"algorithm.dual_clip": 1.1},
    {"algorithm.entropy_coef": 0.3},
    {**GRPO, **ONE, "algorithm.entropy_coef": 0.3},
    {"algorithm.distillation": None},
    {"algorithm.distillation": "reverse_kl"},
    {"algorithm.distillation": "js", "algorithm.max_token_kl": 0.1},
    {"algorithm.distillation": "sft"},
    {"algorithm.selection": "mean"},
    {"algorithm.selection": "all"},
    *({"algorithm.over_limit": limit} for limit in ("clamp", "scale", "off")),
    {"algorithm.over_limit": "scale", "algorithm.distillation": "reverse_kl"},
    {"algorithm.over_limit": "scale", "algorithm.distillation": "js", "algorithm.max_token_kl": 0.1},
    {"algorithm.max_token_kl": 0.6},
    {"algorithm.max_token_kl": None},
    {"algorithm.alpha": "fixed", "algorithm.alpha_fixed": 0.3},
    {"algorithm.alpha": "group_advantage"},
    {"algorithm.alpha": "group_advantage", "algorithm.selection": "all"},
    {"algorithm.alpha_0": 0.1},
    {"algorithm.alpha_gamma": 0.7},
    {"algorithm.alpha_max": 0.4},
    {"reward.correct_above": 0.3},
    {"rollout.temperature": 1.0},
    {"rollout.temperature": 1.6},
    {**SFT, "rollout.temperature": 1.6},
    {"rollout.importance_cap": 1.1},
    {"rollout.importance_cap": 1.1, "rollout.importance_level": "sequence", **ONE},
    {"optim.lr": 0.01},
    {"optim.betas": [0.5, 0.7]},
    {"optim.eps": 0.1},
    {"optim.weight_decay": 0.0},
    {"optim.max_grad_norm": 0.01},
    {"optim.max_grad_norm": 100.0},
    {"optim.schedule": "linear"},
    {"optim.schedule": "cosine"},
    {"optim.warmup_ratio": 0.75},
    {"engine.zero_stage": 1},
    {"engine.zero_stage": 2, "engine.packing": "packed", "engine.micro_batch_tokens": 200},
    {"engine.zero_stage": 3, "algorithm.over_limit": "clamp"},
    {"engine.zero_stage": 3, "optim.max_grad_norm": 100.0},
    {"engine.packing": "packed"},
    {"engine.micro_batch_tokens": 4000},
    {"model.gradient_checkpointing": True},
    {"model.dtype": "bfloat16"},
    {"model.dtype": "bfloat16", "engine.zero_stage": 2, **ONE},
]
# How many batches are sampled; what becomes of a step that breaks.
ELSEWHERE = {"algorithm.refill_rounds", "optim.non_finite"}
# They change how a step is computed and nothing of it.
INVARIANT = ("engine.", "model.")


def test_every_key_of_the_method_and_of_the_optimizer_has_a_cell():
    keys = {key for key in known_keys(Config) if key.startswith(("algorithm.", "optim."))}
    assert keys - {key for cell in CELLS for key in cell} == ELSEWHERE


def config_of(cell, tmp_path):
    settings = yaml.safe_load(BASE)
    for key, value in cell.items():
        section, name = key.split(".")
        settings[section][name] = value
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return load_settings(Config, path)


# Of four problems: some rollouts right; none alone, all with the strategy; rewards in between; all right alone.
REWARDS = [
    ((1, 0, 0, 1), (1, 1, 0)),
    ((0, 0, 0, 0), (1, 1, 1)),
    ((0.25, 0, 1, 0), (0.25, 1, 0.5)),
    ((1, 1, 1, 0.5), (1, 0, 1)),
]


def make_groups(config, rewards=REWARDS):
    """A group for each of `rewards`; those of a problem without a strategy have no guided ones."""
    rng = random.Random(4)

    def ids(low, high):
        return tuple(rng.randrange(1, VOCABULARY) for _ in range(rng.randint(low, high)))

    groups = []
    for index, of_kinds in enumerate(rewards):
        prompts, parts = PromptPair(ids(3, 5), ids(8, 11)), []
        for kind, prompt, numbers in zip(("auto", "guided"), (prompts.plain, prompts.guided), of_kinds, strict=True):
            wanted = getattr(config.rollout, f"n_{kind}")
            made = [ids(3, 12) for _ in numbers]
            gaps = [tuple(rng.uniform(-5, -1) for _ in done) for done in made]
            parts.append(
                [
                    (
                        Rollout(RolloutRequest(index, kind, k, prompt, 0), done, gap, len(done) == 12, 0),
                        RewardResult(float(reward), correct_above=config.reward.correct_above),
                    )
                    for k, (done, gap, reward) in enumerate(zip(made, gaps, numbers, strict=True))
                ][:wanted]
            )
        (auto, guided), demo = parts, ids(4, 12)
        groups.append(
            ScoredGroup(
                Problem(str(index), "?", "1", "s"), prompts,
                auto=tuple(r for r, _ in auto), guided=tuple(r for r, _ in guided),
                auto_results=tuple(v for _, v in auto), guided_results=tuple(v for _, v in guided), demo_ids=demo,
            )
        )  # fmt: skip
    return groups


@pytest.fixture(scope="module")
def lm():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        made = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1, head_dim=8,
                num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False, attn_implementation="sdpa",
            )
        ).eval()  # fmt: skip
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" not in name:
                parameter.mul_(15.0 if "embed" in name or "lm_head" in name else 8.0)
    return made


@contextmanager
def session(config, lm, device):
    """As much of a run as a step needs."""
    engine = engine_on(config, copy.deepcopy(lm).to(getattr(torch, config.model.dtype)), config.optim, device)
    yield SimpleNamespace(
        config=config, engine=engine, method=training_method(config), loss=training_loss(config), total_steps=STEPS,
        batching={"token_budget": config.engine.micro_batch_tokens, "pad_id": 0},
        display=SimpleNamespace(stage=lambda *_: None),
    )  # fmt: skip
    engine.close()


def step_of(s, groups):
    """What the trainer makes of a step: losses and gradient norms of its mini-batches, what it logs, its choices."""
    meter = Meter()
    problems, mini_batches = choose_sequences(s, groups, Clock(meter))
    lr = step_lr(s, STEP)
    results = [optimizer_step(s.engine, sequences, s.loss, **s.batching, lr=lr) for sequences in mini_batches]
    record_update(meter, results, lr)
    record_groups(meter, groups)
    record_guidance(meter, [problem.guidance for problem in problems])
    record_passes(meter, [done for result in results for done in result.passes])
    targets = [[p.group.guided.index(r) for r in p.guidance.teacher_completions] for p in problems]
    losses, norms = [r.loss for r in results], [r.grad_norm for r in results]
    return SimpleNamespace(losses=losses, norms=norms, logged=meter.reduce(), targets=targets)


def trained(config, lm, groups, device):
    """The same, and the weights after it: by name, or in bf16 all fp32 masters in one vector."""
    with session(config, lm, device) as s:
        found = step_of(s, groups)
        if config.model.dtype == "bfloat16":
            found.weights = {"all": torch.cat([master.detach().float().flatten() for master in _masters(s.engine)])}
        else:
            found.weights = {name: tensor.detach().clone() for name, tensor in s.engine.named_weights()}
    return found


def _masters(engine):
    """fp32 masters in the order of the parameters (one group; of one process: all of them)."""
    return [master for group in engine.adam.param_groups for master in group["params"]]


def moved(lm, weights):
    """What a step has changed, by parameter; in one vector where `weights` is one (its padding left out)."""
    before = {name: p.detach().double() for name, p in lm.named_parameters()}
    if "all" in weights:
        flat = torch.cat([p.flatten() for p in before.values()])
        return {"all": weights["all"][: len(flat)].double() - flat}
    return {name: weights[name].double() - before[name] for name in before}


def in_fp64(config, lm, groups):
    truth = copy.deepcopy(lm).double()
    progress, warm = STEP / STEPS, config.optim.warmup_ratio * STEPS
    by_schedule = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(progress * math.pi)) / 2}
    step = Step(truth, config, (STEP + 1) / warm if warm > STEP else by_schedule[config.optim.schedule])
    step.run(groups)
    return step, {name: p.detach() for name, p in truth.named_parameters()}


@pytest.fixture(scope="module")
def base(lm, tmp_path_factory):
    """Losses and update of BASE in fp64: a cell must change one of the two."""
    config = config_of({}, tmp_path_factory.mktemp("base"))
    step, weights = in_fp64(config, lm, make_groups(config))
    return torch.tensor(step.losses), _flat(moved(lm, weights))


def _flat(parts):
    return torch.cat([part.flatten() for part in parts.values()])


@pytest.mark.parametrize(
    "cell", CELLS, ids=lambda cell: " ".join(f"{k.split('.')[1]}={v}" for k, v in cell.items()) or "base"
)
def test_a_step_is_that_of_fp64(cell, lm, device, base, tmp_path):
    config = config_of(cell, tmp_path)
    groups = make_groups(config)
    found = trained(config, lm, groups, device)
    lm = lm if config.model.dtype == "float32" else copy.deepcopy(lm).bfloat16().float()
    truth, weights = in_fp64(config, lm, groups)
    share = 3e-5 if config.model.dtype == "float32" else 3e-2
    wanted, ours = moved(lm, weights), moved(lm, found.weights)
    assert found.losses == pytest.approx(truth.losses, rel=share, abs=share / 100)
    assert found.norms == pytest.approx(truth.norms, rel=share)
    off = float((_flat(ours) - _flat(wanted)).norm() / _flat(wanted).norm())
    assert off < 10 * share
    if config.algorithm.method == "sgpo":
        assert found.targets == truth.targets
    check_logged(config, found, truth, groups, share)
    if not all(key.startswith(INVARIANT) for key in cell):
        changes = zip((torch.tensor(truth.losses), _flat(wanted)), base, strict=True)
        assert any(a.shape != b.shape or (a - b).norm() > 1e-3 * b.norm() for a, b in changes), "it changes nothing"


def check_logged(config, found, truth, groups, share):
    """What metrics.jsonl gets is what the fp64 step has seen, row by row."""
    logged = found.logged
    for name, rows in truth.rows.items():
        wanted = sum(rows) / len(rows) if rows else None
        assert logged[name] == pytest.approx(wanted, rel=10 * share, abs=10 * share), name
    for rows, name in (("ratio_mean", "policy_rows"), ("kl_mean", "distill_rows")):
        assert logged[name] == len(truth.rows.get(rows, [])), name
    if truth.rows.get("kl_mean"):
        assert logged["kl_max"] == pytest.approx(max(truth.rows["kl_mean"]), rel=10 * share)
    if truth.rows.get("sampler_gap_mean"):
        assert logged["sampler_gap_max"] == pytest.approx(max(truth.rows["sampler_gap_mean"]), rel=10 * share)
    norms = [norm for norm in truth.norms if norm is not None]
    assert logged["loss"] == pytest.approx(sum(truth.losses) / len(truth.losses), rel=10 * share, abs=share / 10)
    assert logged["grad_norm"] == pytest.approx(max(norms), rel=share)
    assert logged["lr"] == pytest.approx(config.optim.lr * truth.factor)
    if truth.alphas:
        for place, name in enumerate(("alpha_mean", "alpha_uncapped_mean")):
            assert logged[name] == pytest.approx(sum(a[place] for a in truth.alphas) / len(groups), abs=1e-6), name
        assert logged["target_share"] == sum(map(bool, truth.targets)) / len(groups)
    for kind in ("auto", "guided"):
        judged = [yes for g in groups for yes in truth.correct(getattr(g, f"{kind}_results"))]
        assert logged[f"accuracy_{kind}"] == (pytest.approx(sum(judged) / len(judged)) if judged else None)


WITHOUT_STRATEGY = ((1, 0, 0, 1), ())
KINDS_OF_STEP = {
    "mixed": REWARDS,
    "all right": [((1,) * 4, (1,) * 3)] * 4,
    "all wrong": [((0,) * 4, (0,) * 3)] * 4,
    "right alone": [((1,) * 4, (0,) * 3)] * 4,
    "some without a strategy": [*REWARDS[:2], WITHOUT_STRATEGY, WITHOUT_STRATEGY],
    "none with a strategy": [WITHOUT_STRATEGY] * 4,
}
METHODS = [{}, ONE, {"algorithm.distillation": None}, {"algorithm.distillation": "sft"}, GRPO, SFT]
METHODS += [{"algorithm.autonomous_grpo": False}, *map(method, ("dapo", "luffy", "hpt"))]
METHODS += [{"rollout.importance_cap": 2.0}]


@pytest.fixture(scope="module")
def logged_keys(lm, device, tmp_path_factory):
    config = config_of({}, tmp_path_factory.mktemp("keys"))
    return trained(config, lm, make_groups(config), device).logged.keys()


@pytest.mark.parametrize("cell", METHODS, ids=lambda cell: " ".join(map(str, cell.values())) or "sgpo")
def test_a_step_logs_the_same_keys_whatever_it_learns_from(cell, lm, device, logged_keys, tmp_path):
    """With a number, or with None where there is nothing to count."""
    config = config_of(cell, tmp_path)
    with session(config, lm, device) as s:
        for kind, rewards in KINDS_OF_STEP.items():
            logged = step_of(s, make_groups(config, rewards)).logged
            assert logged.keys() == logged_keys, kind
            assert all(value is None or math.isfinite(value) for value in logged.values()), kind
            if kind == "none with a strategy":
                assert logged["alpha_mean"] in (None, 0)
                assert logged["accuracy_guided"] is None


@pytest.mark.parametrize("kind", ["some without a strategy", "none with a strategy"])
def test_a_problem_without_a_strategy_learns_by_grpo_alone(kind, lm, device, tmp_path):
    config = config_of({"data.without_strategy": "grpo"}, tmp_path)
    groups = make_groups(config, KINDS_OF_STEP[kind])
    found, (truth, weights) = trained(config, lm, groups, device), in_fp64(config, lm, groups)
    assert found.losses == pytest.approx(truth.losses, rel=3e-5, abs=1e-7)
    ours, wanted = _flat(moved(lm, found.weights)), _flat(moved(lm, weights))
    assert float((ours - wanted).norm() / wanted.norm()) < 3e-4
    assert found.targets == truth.targets
    assert found.targets[2:] == [[], []]
