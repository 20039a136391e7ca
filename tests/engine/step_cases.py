"""Whole SGPO steps with their choice of o+: cases of zero_worker.py. A case is STAGE:CHECKPOINTED:PACKED, in fp32."""

import random
from functools import partial

import torch
import zero_worker

from sgpo.algorithm.method import all_sequences
from sgpo.algorithm.sgpo import SgpoSettings, sgpo_sequences
from sgpo.engine.step import optimizer_step, score_contexts
from sgpo.engine.zero import ZeroEngine
from sgpo.model.loading import load_causal_lm
from sgpo.model.policy import PolicyModel
from sgpo.train.step_metrics import record_guidance, record_passes
from sgpo.types import Problem, PromptPair, RewardResult, Rollout, RolloutRequest, ScoredGroup
from sgpo.utils import distributed

BUDGET, PAD, TEMPERATURE = 60, 0, 0.7
# Rewards of the autonomous and the guided rollouts. Every second group is one rank's where there are two: that rank has
# to choose from 4 and from 3 candidates and has a lone o+, the other to choose from 2 that are a tie.
REWARDS = [
    ((1, 0, 0, 1), (1, 1, 1, 1)),
    ((0, 0, 0, 0), (1, 0, 1, 0)),
    ((0, 1, 0, 0), (0, 0, 1, 0)),
    ((1, 1, 1, 1), (0, 0, 0, 0)),
    ((0, 0, 0, 0), (0, 1, 1, 1)),
]
TIE = 1


def make_groups() -> list[ScoredGroup]:
    """All ids are 5 or more, and no two completions are the same but those of the tie."""
    rng = random.Random(1)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randrange(5, 40) for _ in range(rng.randrange(low, high)))

    groups = []
    for index, rewards in enumerate(REWARDS):
        prompts, completions = (ids(4, 8), ids(12, 16)), ([ids(6, 20) for _ in rewards[0]], [ids(6, 20)] * 4)
        if index != TIE:
            completions = (completions[0], [ids(6, 20) for _ in rewards[1]])
        rollouts = [
            tuple(
                Rollout(RolloutRequest(index, kind, k, prompt, 0), done, (0.0,) * len(done), False, 0)
                for k, done in enumerate(made)
            )
            for kind, prompt, made in zip(("auto", "guided"), prompts, completions, strict=True)
        ]
        results = [tuple(RewardResult(float(reward)) for reward in part) for part in rewards]
        groups.append(ScoredGroup(Problem(str(index), "?", "1", "s"), PromptPair(*prompts), *rollouts, *results))
    return groups


def watch(lm) -> tuple[list, list]:
    """What goes into the backbone, as (with graph, sequences without padding), and how many rows into its last norm."""
    inputs, rows = [], []

    def look(_, arguments) -> None:
        sequences = [[token for token in row if token != PAD] for row in arguments[0].tolist()]
        inputs.append((torch.is_grad_enabled(), [row for row in sequences if row]))

    lm.get_input_embeddings().register_forward_pre_hook(look)
    lm.base_model.norm.register_forward_pre_hook(lambda _, arguments: rows.append(arguments[0].shape[:-1].numel()))
    return inputs, rows


def one_step(engine: ZeroEngine, groups: list[ScoredGroup]) -> dict:
    score = partial(score_contexts, engine, token_budget=BUDGET, pad_id=PAD, temperature=TEMPERATURE)
    steps = sgpo_sequences(groups, SgpoSettings(), problems=len(REWARDS), score=score)
    sequences, guidance = all_sequences(steps), [step.guidance for step in steps]
    result = optimizer_step(engine, sequences, zero_worker.loss, token_budget=BUDGET, pad_id=PAD, lr=1e-3)
    meter = distributed.Meter()
    record_guidance(meter, guidance)
    record_passes(meter, result.passes)
    chosen_completions = [
        [(r.request.problem_index, r.request.sample_index) for r in chosen.teacher_completions] for chosen in guidance
    ]
    return {
        "loss": sum(distributed.gather(result.loss)),
        "grad_norm": result.grad_norm,
        "teacher_completions": sorted(
            one for part in distributed.gather(chosen_completions) for chosen in part for one in chosen
        ),
        "metrics": meter.reduce(),
    }


def run_case(case: str, folder: str, device: torch.device) -> dict:
    stage, checkpointed, packed = (int(part) for part in case.split(":"))
    lm = load_causal_lm(folder, dtype="float32")
    model = PolicyModel(lm, packed=bool(packed), gradient_checkpointing=bool(checkpointed))
    engine = zero_worker.engine_of(model, device, stage, "float32")
    groups = make_groups()[distributed.rank() :: distributed.world_size()]
    inputs, rows = watch(lm)
    first = one_step(engine, groups)
    first |= {"inputs": distributed.gather(list(inputs)), "norm_rows": distributed.gather(sum(rows))}
    gradient = zero_worker.gradient(engine, stage)
    later = [one_step(engine, groups)]
    weights = {name: tensor.double().sum().item() for name, tensor in engine.named_weights()}
    engine.close()
    return {"first": first, "gradient": gradient, "later": later, "weights": weights}
