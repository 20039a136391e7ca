"""One rank of the engine tests: runs every case of the command line in one process and writes what came out.

python zero_worker.py OUT.json MODEL_FOLDER CASE ...    STAGE:DTYPE:TOKEN_BUDGET[:OPTION...], step:CASE (step_cases.py)
or broken:STAGE:DTYPE
"""

import json
import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from engine_builders import whole_weights_nowhere
from processes import PATIENCE_S

from sgpo.algorithm.loss import LossSettings, SgpoLoss
from sgpo.engine.step import micro_batches, optimizer_step, score_contexts
from sgpo.engine.zero import ZeroEngine, init_distributed
from sgpo.model.loading import load_causal_lm
from sgpo.model.policy import PolicyModel
from sgpo.types import SgpoError, TrainSequence
from sgpo.utils import distributed

SPLIT = 100  # token budget of several micro-batches


def make_sequences() -> list[TrainSequence]:
    """24 policy and 5 distilled completions of mixed length, two of the policy ones without gradient."""
    rng = random.Random(0)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randrange(5, 40) for _ in range(rng.randrange(low, high)))

    policy = [
        TrainSequence(ids(5, 12), ids(3, 14), advantage=0.0 if i < 2 else rng.uniform(-1, 1), policy_weight=1 / 200)
        for i in range(24)
    ]
    distilled = [
        TrainSequence(ids(5, 12), ids(3, 14), distill_weight=1 / 50, teacher_prompt_ids=ids(12, 22)) for _ in range(5)
    ]
    return policy + distilled


loss = SgpoLoss(LossSettings(clip_low=0.2, clip_high=0.28, over_limit="scale", max_token_kl=1.0))


def gradient(engine: ZeroEngine, stage: int) -> dict[str, list[float]]:
    """The gradient of the first step, read from Adam's first moment: exp_avg = (1 - 0.9) x gradient."""
    from deepspeed.utils import safe_get_full_optimizer_state

    found = {}
    for name, parameter in engine.model.lm.named_parameters():
        if stage == 0:
            moment = engine._optimizer.state[parameter]["exp_avg"]
        else:
            moment = safe_get_full_optimizer_state(parameter, "exp_avg")
        found[name] = (moment / 0.1).flatten()[::37].tolist()
    return found


def engine_of(model: PolicyModel, device: torch.device, stage: int, dtype: str, **changes) -> ZeroEngine:
    """The engine of these tests; `changes` to its settings."""
    settings = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0, "max_grad_norm": 1e9}
    return ZeroEngine(model, device=device, zero_stage=stage, dtype=dtype, **{**settings, **changes})


OPTIONS = {  # of PolicyModel
    "packed": {"packed": True},
    "checkpointed": {"gradient_checkpointing": True},
    "hosted": {"gradient_checkpointing": True, "activation_offload": True},
    "tiled": {"mlp_tile_tokens": 7},
}


def run_case(case: str, folder: str, device: torch.device) -> dict:
    stage, dtype, budget, *options = case.split(":")
    model = PolicyModel(load_causal_lm(folder, dtype=dtype), **{k: v for o in options for k, v in OPTIONS[o].items()})
    engine = engine_of(model, device, int(stage), dtype)
    mine = make_sequences()[distributed.rank() :: distributed.world_size()]
    live = [sequence for sequence in mine if sequence.is_live]
    batches = sum(1 for _ in micro_batches(live, token_budget=int(budget), pad_id=0))
    losses, norms, first = [], [], {}
    for step in range(3):
        result = optimizer_step(engine, mine, loss, token_budget=int(budget), pad_id=0, lr=1e-3)
        losses.append(sum(distributed.gather(result.loss)))
        norms.append(result.grad_norm)
        if step == 0 and dtype == "float32":
            first = gradient(engine, int(stage))
    contexts = [(s.prompt_ids, s.completion_ids) for s in mine]
    scores = score_contexts(engine, contexts, token_budget=int(budget), pad_id=0)
    nothing = optimizer_step(engine, [], loss, token_budget=int(budget), pad_id=0, lr=1e-3)
    weights = {name: tensor.double().sum().item() for name, tensor in engine.named_weights()}
    masters = all(t.dtype == torch.float32 for g in engine._optimizer.param_groups for t in g["params"])
    engine.close()
    return {
        "batches": batches,
        "losses": losses,
        "norms": norms,
        "gradient": first,
        "scores": [sum(row) for part in distributed.gather(scores) for row in part],
        "stepped_on_nothing": nothing.grad_norm is not None,
        "weights": weights,
        "fp32_masters": masters,
    }


class Broken:
    """The loss, on this rank with one hidden state or its gradient that is not finite."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __call__(self, head, bias, hidden, *rest):
        if self.what == "row":
            hidden = torch.where((torch.arange(len(hidden)) == 4)[:, None], torch.nan, hidden)
        elif self.what == "gradient" and hidden.requires_grad:
            hidden.register_hook(lambda grad: grad * torch.inf)
        return loss(head, bias, hidden, *rest)


def run_broken_case(case: str, folder: str, device: torch.device) -> dict:
    """Two steps, and between them steps in which something of the last rank is not finite; against two steps alone."""
    stage, dtype = case.split(":")
    mine, last = make_sequences()[distributed.rank() :: distributed.world_size()], distributed.world_size() - 1
    weights, said = {}, {}
    for between in ((), ("row", "gradient")):
        engine = engine_of(PolicyModel(load_causal_lm(folder, dtype=dtype)), device, int(stage), dtype)
        options = {"token_budget": SPLIT, "pad_id": 0, "lr": 1e-3}
        optimizer_step(engine, mine, loss, **options)
        for what in between:
            broken = Broken(what) if distributed.rank() == last else loss
            try:
                optimizer_step(engine, mine, broken, **options)
            except SgpoError as error:
                said[f"stop {what}"] = distributed.gather(str(error))
            result = optimizer_step(engine, mine, broken, **options, non_finite="skip", name=lambda _: "the one")
            said[f"skip {what}"] = distributed.gather((result.skipped, result.grad_norm, len(result.passes)))
        optimizer_step(engine, mine, loss, **options)
        weights[str(between)] = [(n, t.double().sum().item()) for n, t in engine.named_weights()]
        engine.close()
    return {"weights": list(weights.values()), "said": said}


def main() -> None:
    out, folder, *cases = sys.argv[1:]
    device = init_distributed(PATIENCE_S)
    whole_weights_nowhere()
    results = {}
    for case in cases:
        if case.startswith("step:"):
            import step_cases

            results[case] = step_cases.run_case(case.removeprefix("step:"), folder, device)
        elif case.startswith("broken:"):
            results[case] = run_broken_case(case.removeprefix("broken:"), folder, device)
        else:
            results[case] = run_case(case, folder, device)
    if distributed.is_main():
        Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
