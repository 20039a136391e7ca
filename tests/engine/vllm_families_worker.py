"""Families between the trainer and vLLM, in one process: three syncs, and the export in transformers and vLLM.

python vllm_families_worker.py OUT.json SCRATCH CASE ...    FAMILY:ZERO_STAGE[:adapters], or the folder of an export
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from engine_builders import make_vllm, whole_weights_nowhere
from model_families import save_family
from processes import PATIENCE_S
from safetensors.torch import load_file

from sgpo.data.builtin import make_tokenizer
from sgpo.engine.checkpoint_names import check_round_trip
from sgpo.engine.export import export_model
from sgpo.engine.step import score_contexts
from sgpo.engine.weight_sync import PolicySampler
from sgpo.engine.zero import ZeroEngine, init_distributed
from sgpo.model.loading import load_causal_lm
from sgpo.model.lora import add_adapters
from sgpo.model.policy import PolicyModel
from sgpo.utils import distributed

PROBE = tuple(range(5, 60))
KEPT = []  # samplers: to close one ends torch.distributed


def move(engine):
    """Experts turn round: in a wrong layout they would be another model. All other weights change a little."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in engine.model.lm.named_parameters():
        if not parameter.requires_grad:
            continue

        def change(name=name, parameter=parameter):
            noise = 0.05 * torch.randn(parameter.shape, generator=generator)
            parameter.mul_(-3) if "experts" in name else parameter.add_(noise)

        with torch.no_grad():
            if engine.zero_stage < 3:
                change()
                continue
            from deepspeed.runtime.zero.partition_parameters import GatheredParameters

            with GatheredParameters([parameter], modifier_rank=0):
                change()


def logprobs_of_folder(folder):
    """On the probe: by transformers, and by vLLM, both from the folder."""
    lm = load_causal_lm(folder, dtype="float32").eval()
    ids = torch.tensor([PROBE])
    with torch.no_grad():
        scores = lm(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    KEPT.append(sampler := make_vllm(folder, [2], 400))
    return scores.tolist(), sampler._probe(PROBE)


def gap(ours, theirs):
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def run_case(case, scratch, device):
    if Path(case).is_absolute():
        return gap(*logprobs_of_folder(Path(case)))
    family, stage, *adapters = case.split(":")
    source, final = scratch / case / "model", scratch / case / "final"
    save_family(family, source)
    lm = load_causal_lm(source, dtype="float32")
    check_round_trip(lm)
    if adapters:
        add_adapters(lm, rank=4, alpha=8.0, modules=["q_proj", "v_proj"], dora=False, seed=1)
    engine = ZeroEngine(
        PolicyModel(lm), device=device, zero_stage=int(stage), dtype="float32", lr=1e-3, betas=(0.9, 0.95), eps=1e-8,
        weight_decay=0.0, max_grad_norm=1.0,
    )  # fmt: skip
    KEPT.append(sampler := make_vllm(source, [2], 400, from_scratch=True))
    synced = PolicySampler(engine, sampler, probe_ids=PROBE, tolerance=2e-4, token_budget=4096, pad_id=0)
    gaps = [synced.sync(0).sync_gap_max]
    move(engine)
    gaps += [synced.sync(version).sync_gap_max for version in (1, 2)]
    export_model(engine, make_tokenizer(), final)
    held = {name: tensor.clone() for name, tensor in engine.named_weights(checkpoint_names=False)}
    trained = score_contexts(engine, [(PROBE[:1], PROBE[1:])], token_budget=4096, pad_id=0)[0]
    engine.close()
    transformers, vllm = logprobs_of_folder(final)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, final))
    loaded = load_causal_lm(final, dtype="float32").state_dict()
    return {
        "gaps": gaps,
        "same_names": {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()},
        "changed_by_loading": [name for name, tensor in held.items() if not torch.equal(tensor, loaded[name])],
        "moved": sum(not torch.equal(before[name], after[name]) for name in before if name in after),
        "transformers": gap(transformers, trained),
        "vllm": gap(vllm, transformers),
    }


def main(out, scratch, *cases):
    device = init_distributed(PATIENCE_S)
    whole_weights_nowhere()
    Path(out).write_text(json.dumps({case: run_case(case, Path(scratch), device) for case in cases}))
    for sampler in KEPT:
        sampler.close()
    distributed.wait_for_gloo()


if __name__ == "__main__":
    main(*sys.argv[1:])
