"""Makes rollout engines; a module of its own because child processes import it by name."""

import torch


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
