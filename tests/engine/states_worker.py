"""One rank of the optimizer-state tests: every case in one process, what came out goes to OUT.

python states_worker.py OUT.pt MODEL_FOLDER STAGE:DTYPE:STATE[:offload] ...
"""

import importlib.util
import os
import sys
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # torchao's step, compiled, takes longer to compile than all cases to run
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from engine_builders import whole_weights_nowhere
from processes import PATIENCE_S

from sgpo.engine.gradient_check import check_gradients
from sgpo.engine.step import optimizer_step
from sgpo.engine.zero import ZeroEngine, init_distributed
from sgpo.model.loading import load_causal_lm
from sgpo.model.policy import PolicyModel
from sgpo.utils import distributed

spec = importlib.util.spec_from_file_location("zero_worker", Path(__file__).with_name("zero_worker.py"))
zero_worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(zero_worker)

SLOW_STEPS = 36


def build(folder: str, case: str, device: torch.device) -> ZeroEngine:
    stage, dtype, state, *offload = case.split(":")
    lm = load_causal_lm(folder, dtype="bfloat16").to(getattr(torch, dtype))  # the same start for both dtypes
    states = {"optimizer_state": state, "offload_during_rollout": bool(offload)}
    return zero_worker.engine_of(PolicyModel(lm), device, int(stage), dtype, **states)


def step(engine: ZeroEngine, *, lr: float = 1e-3, budget: int = 100) -> float:
    mine = zero_worker.make_sequences()[distributed.rank() :: distributed.world_size()]
    return optimizer_step(engine, mine, zero_worker.loss, token_budget=budget, pad_id=0, lr=lr).grad_norm


def weights(engine: ZeroEngine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in engine.named_weights()}


def masters(engine: ZeroEngine) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    if engine.zero_stage == 0:
        return {name: p.detach().float().clone() for name, p in engine.model.lm.named_parameters()}
    return {name: safe_get_full_fp32_param(p).clone() for name, p in engine.model.lm.named_parameters()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def run_case(case: str, folder: str, device: torch.device, scratch: Path) -> dict:
    engine = build(folder, case, device)
    start, random = weights(engine), torch.get_rng_state()
    difference = check_gradients(engine, dtype=case.split(":")[1])
    untouched = equal(start, weights(engine)) and torch.equal(random, torch.get_rng_state())

    norms = [step(engine), step(engine)]
    engine.offload_states()
    engine.save(scratch)
    norms.append(step(engine))
    straight = weights(engine)
    moments = [state["exp_avg"] for state in engine.adam.state.values()]
    quantised = sum(m.numel() for m in moments if hasattr(m, "codes")) / sum(m.numel() for m in moments)
    engine.close()

    engine = build(folder, case, device)
    check_gradients(engine, dtype=case.split(":")[1])
    engine.load(scratch)
    step(engine)
    resumed = equal(straight, weights(engine))
    engine.close()
    return {
        "difference": difference,
        "untouched": untouched,
        "norms": norms,
        "weights": straight,
        "quantised": quantised,
        "resumed": resumed,
    }


def run_slowly(case: str, folder: str, device: torch.device) -> dict:
    """Steps at the paper's learning rate."""
    engine = build(folder, case, device)
    start = weights(engine)
    for _ in range(SLOW_STEPS):
        step(engine, lr=1e-6, budget=4000)
    result = {"start": start, "weights": weights(engine), "masters": masters(engine)}
    engine.close()
    return result


def main() -> None:
    out, folder, *cases = sys.argv[1:]
    device = init_distributed(PATIENCE_S)
    whole_weights_nowhere()
    results = {}
    for k, case in enumerate(cases):
        if case.startswith("slow:"):
            results[case] = run_slowly(case.removeprefix("slow:"), folder, device)
        else:
            results[case] = run_case(case, folder, device, Path(out).parent / f"checkpoint-{k}")
    if distributed.is_main():
        torch.save(results, out)


if __name__ == "__main__":
    main()
