"""Tiny random models of transformers' families, by rule: what is in one's config is set, nothing else."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,  # no multiple of 32, to which kernels pad
    "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def config_of(family, **changes):
    """The config of `family` with the sizes of SMALL, and `changes` to it."""
    known = CONFIG_MAPPING[family]().to_dict()
    return CONFIG_MAPPING[family](**{name: value for name, value in {**SMALL, **changes}.items() if name in known})


def save_family(family, folder, seed=0, **changes):
    """A folder as its makers would publish it; every weight random, norms and biases too."""
    lm = AutoModelForCausalLM.from_config(config_of(family, **changes)).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    lm.save_pretrained(folder)
    return lm
