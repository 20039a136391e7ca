"""One rank of the weight-sync tests: faults, each to be caught before anything is sampled, and sound syncs between.

python weight_sync_worker.py OUT.json MODEL_FOLDER hf|vllm:ZERO_STAGE:TENSOR_PARALLEL[:adapters|dora] ...
"""

import itertools
import json
import random
import sys
from pathlib import Path

import torch

from sgpo.data.builtin import END, vocabulary
from sgpo.engine import zero
from sgpo.engine.step import score_contexts
from sgpo.engine.weight_sync import PolicySampler
from sgpo.engine.zero import ZeroEngine, init_distributed
from sgpo.model.loading import load_causal_lm
from sgpo.model.policy import PolicyModel
from sgpo.types import RolloutRequest, SamplingParams, SgpoError
from sgpo.utils import distributed

sys.path.insert(0, str(Path(__file__).parents[1]))
from engine_builders import make_hf, make_vllm, whole_weights_nowhere, with_adapters
from processes import PATIENCE_S

EOS = vocabulary().index(END)
PROBE = tuple(range(5, 60))
GREEDY = SamplingParams(0.0, 1.0, 10)
TOKENS = {"token_budget": 4096, "pad_id": 0}


def faulty(named, fault, rng):
    """The weights with one fault. A changed bit is the least that can go wrong; noise is what a model would show."""
    items = [(name, tensor.clone()) for name, tensor in named]
    names = [name for name, _ in items]
    # A vector of ones swapped with another, or the second half of an embedding no one reads, would be no fault at all.
    victim = rng.choice([i for i, (name, tensor) in enumerate(items) if tensor.dim() == 2 and "embed" not in name])
    tensor = items[victim][1]
    if fault == "bit":
        tensor.view(torch.int32).view(-1)[rng.randrange(tensor.numel())] ^= 1
    elif fault == "noise":
        tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(victim)) * tensor.std())
    elif fault == "drop":
        del items[victim]
    elif fault == "zero":
        tensor.zero_()
    elif fault == "swap":
        other = rng.choice([i for i, (_, t) in enumerate(items) if t.shape == tensor.shape and i != victim])
        items[victim], items[other] = (names[victim], items[other][1]), (names[other], tensor)
    elif fault == "stale":
        items[victim] = (names[victim], STALE[names[victim]])
    return iter(items)


STALE: dict[str, torch.Tensor] = {}


def outcome(synced, version):
    try:
        synced.sync(version)
    except SgpoError as error:
        return str(error)
    return None


def move(engine, amount):
    """Changes the trainer's weights, the same way on every rank and for every ZeRO stage."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(engine.model.lm.named_parameters()):
            if not parameter.requires_grad:  # beside adapters
                continue
            if engine.zero_stage < 3:
                parameter.add_(amount * torch.randn(parameter.shape, generator=generator))
                continue
            from deepspeed.runtime.zero.partition_parameters import GatheredParameters

            with GatheredParameters([parameter], modifier_rank=0):
                if distributed.is_main():
                    parameter.add_(amount * torch.randn(parameter.shape, generator=generator))


def run_case(case, folder, device):
    kind, stage, tensor_parallel, *adapters = case.split(":")
    stage, tensor_parallel, adapters = int(stage), int(tensor_parallel), "".join(adapters)
    zero._BUCKET_BYTES = 20_000 if adapters else 200_000  # several gathers per sync
    STALE.clear()
    lm = load_causal_lm(folder, dtype="float32")
    if adapters:
        with_adapters(lm, dora=adapters == "dora")
    engine = ZeroEngine(
        PolicyModel(lm), device=device, zero_stage=stage, dtype="float32", lr=1e-3, betas=(0.9, 0.95), eps=1e-8,
        weight_decay=0.0, max_grad_norm=1.0,
    )  # fmt: skip
    make = {"hf": make_hf, "vllm": make_vllm}[kind]
    options = {"tensor_parallel_size": tensor_parallel, "from_scratch": True} if kind == "vllm" else {}
    if adapters:
        options |= {"adapters": True, **({"dora": True} if adapters == "dora" else {})}
    rollouts = make(folder, [EOS], 400, **options)
    synced = PolicySampler(engine, rollouts, probe_ids=PROBE, tolerance=2e-4, adapters=bool(adapters), **TOKENS)
    found = {"faults": [], "sound": [], "unsynced": None}
    requests = [RolloutRequest(i, "auto", 0, tuple(range(4 + i, 20 + 2 * i)), i) for i in range(5)]
    try:
        synced.generate(requests, GREEDY)
    except SgpoError as error:
        found["unsynced"] = str(error)
    STALE.update((name, tensor.clone()) for name, tensor in engine.named_weights("apart" if adapters else "merged"))
    rng, version = random.Random(0), 0
    places = ("source", "way") * (2 if distributed.world_size() == 1 and not adapters else 1)
    kinds = ("bit", "drop", "stale") if adapters else ("bit", "noise", "drop", "zero", "swap", "stale")
    named_weights, load_weights = engine.named_weights, rollouts.load_weights
    for fault, place in itertools.product(kinds, places):
        move(engine, 0.005)
        seed = rng.random()
        if (fault, place) != ("bit", "source"):  # one bit more or less in the trainer itself is no fault of the sync
            version += 1
            if place == "source":
                engine.named_weights = lambda parts, f=fault, s=seed, **naming: faulty(
                    named_weights(parts, **naming), f, random.Random(s)
                )
            elif distributed.rank() == distributed.world_size() - 1:  # on one rank only
                rollouts.load_weights = lambda named, *rest, f=fault, s=seed: load_weights(
                    faulty(named, f, random.Random(s)), *rest
                )
            said = outcome(synced, version)
            engine.named_weights = named_weights
            rollouts.load_weights = load_weights
            try:
                synced.generate(requests, GREEDY)
                refused = False
            except SgpoError:
                refused = True
            found["faults"].append({"fault": fault, "place": place, "said": said, "refused": refused})
        version += 1
        report = synced.sync(version)
        sampled = synced.generate(requests, GREEDY)
        scores = score_contexts(engine, [(r.request.prompt_ids, r.completion_ids) for r in sampled], **TOKENS)
        gaps = [
            abs(a - b)
            for row, r in zip(scores, sampled, strict=True)
            for a, b in zip(row, r.rollout_logprobs, strict=True)
        ]
        found["sound"].append(
            {
                "gap": report.sync_gap_max,
                "sampled_gap": max(gaps),
                "bytes": report.sync_bytes,
                "versions": sorted({r.policy_version for r in sampled} ^ {version}),
                "tokens": [list(r.completion_ids) for r in sampled],
            }
        )
    engine.close()
    return found, rollouts


def main(out, folder, *cases):
    device = init_distributed(PATIENCE_S)
    whole_weights_nowhere()
    done = {case: run_case(case, Path(folder), device) for case in cases}
    if distributed.is_main():
        Path(out).write_text(json.dumps({case: found for case, (found, _) in done.items()}))
    for _, rollouts in done.values():  # last of all: vLLM takes the process group with it
        rollouts.close()
    distributed.wait_for_gloo()


if __name__ == "__main__":
    main(*sys.argv[1:])
