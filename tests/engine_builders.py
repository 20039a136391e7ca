"""Makes rollout engines; a module of its own because child processes import it by name."""

import importlib.util
import time

import pytest
import torch
from processes import scaled

NO_VLLM = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


ADAPTERS = {"rank": 4, "alpha": 8.0}


def with_adapters(lm, dora=False):
    """As the trainer and its rollout engine both do it."""
    from sgpo.model.lora import add_adapters

    add_adapters(lm, **ADAPTERS, modules=["all-linear"], dora=dora, seed=1)
    return lm


def make_hf(folder, eos_ids, max_batch_tokens, *, adapters=False, dora=False):
    from sgpo.data.builtin import PAD, vocabulary
    from sgpo.model.loading import load_causal_lm
    from sgpo.rollout.hf_engine import HfEngine

    lm = load_causal_lm(folder, dtype="float32")
    return HfEngine(
        with_adapters(lm, dora) if adapters else lm,
        eos_ids=eos_ids,
        pad_id=vocabulary().index(PAD),
        device=torch.device("cpu"),
        max_batch_tokens=max_batch_tokens,
    )


def whole_weights_nowhere():
    """ZeRO-3 never cuts a weight of fewer than 100,000 numbers, which are all that a small model has: from here on it
    does in this process, so that a gather forgotten shows."""
    import deepspeed

    initialize = deepspeed.initialize

    def cutting(*, config, **others):
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return initialize(config=config, **others)

    deepspeed.initialize = cutting


def make_vllm(folder, eos_ids, max_batch_tokens, *, adapters=False, **options):
    """A small batch budget becomes few requests at a time."""
    from sgpo.rollout.vllm_engine import VllmEngine, VllmOptions

    at_once = min(max(max_batch_tokens // 16, 1), 256)
    sizes = {"max_model_len": 128, "max_num_seqs": at_once, "kv_cache_mib": 64, **options}
    if adapters:
        sizes |= {"lora_rank": ADAPTERS["rank"], "lora_alpha": ADAPTERS["alpha"]}
    return VllmEngine(folder, eos_ids=eos_ids, dtype="float32", options=VllmOptions(**sizes))


def make_hanging(folder, eos_ids, max_batch_tokens):
    """Its third forward pass never ends; the interpreter stays responsive, as under a kernel that hangs."""
    engine = make_hf(folder, eos_ids, max_batch_tokens)
    engine._stall_s = scaled(2.0)
    forward, calls = engine._lm.forward, [0]

    def hang(*args, **kwargs):
        calls[0] += 1
        while calls[0] > 3:
            time.sleep(0.1)
        return forward(*args, **kwargs)

    engine._lm.forward = hang
    return engine


def make_failing(error, *arguments):
    raise error(*arguments)
