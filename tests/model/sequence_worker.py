"""One rank of the sequence parallel tests: `python sequence_worker.py OUT.pt CASE ...`

A case is STAGE:PACKING:KV_HEADS:OWNERS, and ":frugal" for checkpoints on the host and MLPs in tiles. OWNERS: "all"
take turns with the sequences, or the "last" rank has them all.
"""

import copy
import importlib.util
import sys
from functools import partial
from pathlib import Path

import torch
from sgpo_kernels.testing import cpu_peak
from transformers import Qwen2Config, Qwen2ForCausalLM

from sgpo.engine.batching import collate_training
from sgpo.engine.gradient_check import check_gradients
from sgpo.engine.step import optimizer_step, score_contexts
from sgpo.engine.zero import init_distributed
from sgpo.model.policy import PolicyModel
from sgpo.model.sequence_parallel import SequenceParallel
from sgpo.types import TrainSequence
from sgpo.utils import distributed

spec = importlib.util.spec_from_file_location("zero_worker", Path(__file__).parents[1] / "engine" / "zero_worker.py")
zero_worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(zero_worker)

BUDGET = 60  # tokens of a rank: a few micro-batches, and some sequences are longer than a rank's part


def make_model(kv_heads: int, **changes: int):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            **changes,
        }
        lm = Qwen2ForCausalLM(Qwen2Config(vocab_size=48, num_key_value_heads=kv_heads, **sizes)).eval()
        for name, parameter in lm.named_parameters():  # biases start at 0 and would hide a mistake
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.5)
    return lm


def alone(lm) -> tuple[float, dict[str, torch.Tensor], list[float]]:
    """Loss and gradient of all sequences, and their scores, by one process in one padded micro-batch, no engine."""
    model, made = PolicyModel(copy.deepcopy(lm)), zero_worker.make_sequences()
    micro = collate_training([s for s in made if s.is_live], 0, with_teacher=True)
    loss, _ = model(zero_worker.loss, micro)
    loss.backward()
    scores = []
    with torch.no_grad():
        for s in made:
            logits = lm(torch.tensor([[*s.prompt_ids, *s.completion_ids]])).logits[0, len(s.prompt_ids) - 1 : -1]
            taken = logits.log_softmax(-1).gather(-1, torch.tensor(s.completion_ids)[:, None])
            scores.append(float(taken.sum()))
    return float(loss), {name: p.grad.flatten()[::37] for name, p in model.lm.named_parameters()}, scores


def run_case(case: str, device: torch.device) -> dict:
    stage, packing, kv_heads, owners, *frugal = case.split(":")
    lm = make_model(int(kv_heads))
    loss, truth, scores = alone(lm)
    size, rank = distributed.world_size(), distributed.rank()
    model = PolicyModel(
        lm,
        packed=packing == "packed",
        gradient_checkpointing=bool(frugal),
        activation_offload=bool(frugal),
        mlp_tile_tokens=7 if frugal else None,
        parallel=partial(SequenceParallel, size=size, timeout_s=zero_worker.PATIENCE_S),
    )
    engine = zero_worker.engine_of(model, device, int(stage), "float32")
    check_gradients(engine, dtype="float32")
    made = zero_worker.make_sequences()
    if owners == "last":
        mine = made if rank == size - 1 else []
    else:
        mine = made[rank::size]
    widths = []
    model.lm.base_model.layers[0].register_forward_hook(lambda _, inputs, output: widths.append(inputs[0].shape[1]))
    found = score_contexts(engine, [(s.prompt_ids, s.completion_ids) for s in mine], token_budget=BUDGET, pad_id=0)
    result = optimizer_step(engine, mine, zero_worker.loss, token_budget=BUDGET, pad_id=0, lr=1e-3)
    gradient = zero_worker.gradient(engine, int(stage))
    weights = {name: tensor.double().sum().item() for name, tensor in engine.named_weights()}
    engine.close()
    everywhere = distributed.gather((result.loss, [sum(row) for row in found], widths, len(result.passes)))
    order = range(len(made)) if owners == "last" else [i for r in range(size) for i in range(r, len(made), size)]
    return {
        "loss": (sum(part[0] for part in everywhere), loss),
        "gradient": (torch.cat([torch.tensor(gradient[n]) for n in truth]), torch.cat([truth[n] for n in truth])),
        "scores": ([x for part in everywhere for x in part[1]], [scores[i] for i in order]),
        "widths": [part[2] for part in everywhere],
        "passes": [part[3] for part in everywhere],
        "norm": result.grad_norm,
        "weights": weights,
    }


def peak_bytes(size: int, *, checkpointed: bool) -> int:
    """Peak of what forward and backward allocate on this rank; the one long micro-batch is the last rank's."""
    lm = make_model(2, hidden_size=128, intermediate_size=384, num_hidden_layers=4, max_position_embeddings=4096)
    parallel = partial(SequenceParallel, size=size, timeout_s=zero_worker.PATIENCE_S) if size > 1 else None
    model = PolicyModel(lm, packed=True, gradient_checkpointing=checkpointed, parallel=parallel)
    tokens = tuple(i % 40 + 5 for i in range(1024))
    made = [
        TrainSequence(tokens[:200], tokens, advantage=0.5, policy_weight=1e-3),
        TrainSequence(tokens[:200], tokens, distill_weight=1e-3, teacher_prompt_ids=tokens[:400]),
    ]
    micro = collate_training(made if distributed.rank() else [], 0, with_teacher=True, packed=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return cpu_peak(lambda: model(zero_worker.loss, micro)[0].backward()).peak_bytes


def main() -> None:
    out, *cases = sys.argv[1:]
    device = init_distributed(zero_worker.PATIENCE_S)
    results = {case: run_case(case, device) for case in cases}
    results["peaks"] = {
        checkpointed: distributed.gather([peak_bytes(size, checkpointed=checkpointed) for size in (1, 2)])
        for checkpointed in (False, True)
    }
    if distributed.is_main():
        torch.save(results, out)
    distributed.wait_for_gloo()


if __name__ == "__main__":
    main()
