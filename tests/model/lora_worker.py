"""One rank of the adapter tests: `python lora_worker.py OUT.pt MODEL_FOLDER SCRATCH STAGE:DTYPE:lora|dora ...`"""

import importlib.util
import sys
from pathlib import Path

import torch

from sgpo.engine.gradient_check import check_gradients
from sgpo.engine.step import optimizer_step, score_contexts
from sgpo.engine.weight_sync import PolicySampler, SyncReport
from sgpo.engine.zero import ZeroEngine, init_distributed
from sgpo.model.loading import load_causal_lm
from sgpo.model.policy import PolicyModel
from sgpo.rollout.hf_engine import HfEngine
from sgpo.utils.lora_names import is_adapter

sys.path.insert(0, str(Path(__file__).parents[1]))
from engine_builders import whole_weights_nowhere, with_adapters
from processes import PATIENCE_S

spec = importlib.util.spec_from_file_location("zero_worker", Path(__file__).parents[1] / "engine" / "zero_worker.py")
zero_worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(zero_worker)


def build(folder: str, case: str, device: torch.device) -> ZeroEngine:
    stage, dtype, kind = case.split(":")
    lm = load_causal_lm(folder, dtype=dtype)
    model = PolicyModel(with_adapters(lm, dora=kind == "dora"), gradient_checkpointing=True)
    return zero_worker.engine_of(model, device, int(stage), dtype, lr=1e-2, max_grad_norm=1.0)


def step(engine: ZeroEngine) -> float:
    sequences = zero_worker.make_sequences()
    return optimizer_step(engine, sequences, zero_worker.loss, token_budget=200, pad_id=0, lr=1e-2).loss


def state(engine: ZeroEngine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in engine.named_weights("apart")}


def sync(engine: ZeroEngine, rollouts: HfEngine, ids: list[int], version: int, *, adapters: bool) -> SyncReport:
    synced = PolicySampler(
        engine, rollouts, probe_ids=ids, tolerance=0.1, token_budget=4000, pad_id=0, adapters=adapters
    )
    return synced.sync(version)


def run_case(case: str, folder: str, device: torch.device, scratch: Path) -> dict:
    engine = build(folder, case, device)
    start = {name: tensor.clone() for name, tensor in engine.named_weights()}
    difference = check_gradients(engine, dtype=case.split(":")[1])
    before = state(engine)
    losses = [step(engine), step(engine)]
    engine.save(scratch)
    losses.append(step(engine))
    after = state(engine)
    sizes = {"saved": sum(file.stat().st_size for file in scratch.rglob("*") if file.is_file())}

    plain = load_causal_lm(folder, dtype=case.split(":")[1])
    rollouts = HfEngine(plain, eos_ids=[1], pad_id=0, device=device, max_batch_tokens=4096)
    ids = list(range(5, 35))
    reports = {"merged": [sync(engine, rollouts, ids, 1, adapters=False)]}
    beside = with_adapters(load_causal_lm(folder, dtype=case.split(":")[1]), dora="dora" in case)
    rollouts = HfEngine(beside, eos_ids=[1], pad_id=0, device=device, max_batch_tokens=4096)
    reports["adapters"] = [sync(engine, rollouts, ids, version, adapters=True) for version in (1, 2)]
    unmerged = score_contexts(engine, [(ids[:1], ids[1:])], token_budget=4000, pad_id=0)[0]
    untouched = all(torch.equal(after[name], tensor) for name, tensor in state(engine).items())
    merged = {name: tensor.clone() for name, tensor in engine.named_weights()}
    engine.close()

    engine = build(folder, case, device)
    engine.load(scratch)
    step(engine)
    resumed = all(torch.equal(after[name], tensor) for name, tensor in state(engine).items())
    engine.close()
    return {
        "start": start,
        "merged": merged,
        "adapters": {name: tensor for name, tensor in after.items() if is_adapter(name)},
        "names": list(plain.state_dict()),
        "difference": difference,
        "losses": losses,
        "frozen_moved": [n for n in before if not is_adapter(n) and not torch.equal(before[n], after[n])],
        "adapters_still": [n for n in before if is_adapter(n) and torch.equal(before[n], after[n])],
        "sizes": {**sizes, "model": sum(t.nbytes for t in plain.state_dict().values())},
        "bytes": {kind: [report.sync_bytes for report in found] for kind, found in reports.items()},
        "gaps": {kind: [report.sync_gap_max for report in found] for kind, found in reports.items()},
        "unmerged": unmerged,
        "untouched": untouched,
        "resumed": resumed,
    }


def main() -> None:
    out, folder, scratch, *cases = sys.argv[1:]
    device = init_distributed(PATIENCE_S)
    whole_weights_nowhere()
    torch.save({case: run_case(case, folder, device, Path(scratch) / str(k)) for k, case in enumerate(cases)}, out)


if __name__ == "__main__":
    main()
