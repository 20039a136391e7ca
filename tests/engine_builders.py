"""Makes rollout engines; a module of its own because child processes import it by name."""

import importlib.util
import time

import pytest
import torch

NO_VLLM = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


def make_hf(folder, eos_ids, max_batch_tokens):
    from sgpo.data.builtin import PAD, vocabulary
    from sgpo.models import load_causal_lm
    from sgpo.rollout.hf_engine import HfEngine

    return HfEngine(
        load_causal_lm(folder, dtype="float32"),
        eos_ids=eos_ids,
        pad_id=vocabulary().index(PAD),
        device=torch.device("cpu"),
        max_batch_tokens=max_batch_tokens,
    )


def make_vllm(folder, eos_ids, max_batch_tokens, **options):
    """A small batch budget becomes few requests at a time."""
    from sgpo.rollout.vllm_engine import VllmEngine, VllmOptions

    at_once = min(max(max_batch_tokens // 16, 1), 256)
    sizes = {"max_model_len": 128, "max_num_seqs": at_once, "kv_cache_mib": 64, **options}
    return VllmEngine(folder, eos_ids=eos_ids, dtype="float32", options=VllmOptions(**sizes))


def make_hanging(folder, eos_ids, max_batch_tokens):
    """Its third forward pass never ends; the interpreter stays responsive, as under a kernel that hangs."""
    engine = make_hf(folder, eos_ids, max_batch_tokens)
    engine._stall_s = 2.0
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
