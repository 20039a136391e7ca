"""A tiny model with random weights of any causal language model that transformers has.

The configuration is the family's own default, shrunk by rules on the names of its settings: sizes, heads, experts, one
layer of each kind, windows short enough to bite, multipliers that are not 1. All weights are random, norms and biases
too: nothing is neutral that a trained model's would not be. Only what keeps the best tokens by score (`index_topk`,
`indexer_budget`, `keep_window_size`) has room for all: between equal scores the code of these families decides by the
row's length.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from sgpo.data.builtin import make_tokenizer

VOCABULARY = 112  # more than the tokenizer's 99, as in most checkpoints
LOGIT_SPREAD = 4.0  # standard deviation: a soft-cap of 30 then moves the logits, as it does in trained models

# A setting whose name matches is at most so large; the first pattern decides.
_LIMITS: tuple[tuple[str, int], ...] = (
    (r"(^|_)vocab_size(_per_layer_input)?$|^codebook_size$|^ngram_vocab_size_base$", VOCABULARY),
    (r"lora_rank|^time_step_rank$|dt_rank$|laurel_rank|hc_lowrank|gated_norm_rank|adapter_rank", 16),
    (r"^qk_head_dim$|^mamba_(d_head|head_?dim)$", 16),
    (r"^mamba_d_ssm$", 64),
    (r"head_dim|headdim|_d_head$|dim_head|^kv_channels$|^d_head$|attention_head_size|^rotary_dim$", 8),
    (r"^hidden_size_per_layer_input$|^d_rel$", 8),
    (r"moe_intermediate_size|expert_intermediate_size|expert_ffn_hidden_size", 24),
    (r"intermediate_size|ffn_(dim|hidden_size)|^n_inner$|^dff$|^dim_ff$|^mlp_dim$|feed_forward_size", 48),
    (r"hidden_size|^d_model$|^n_embd$|embed(ding)?_(size|dim)$|word_embed_proj_dim|^emb_dim$|^lru_width$", 32),
    (r"^d_inner$", 64),
    (r"linear_num_key_heads|(key_value|kv)_heads|^kv_n_heads$|query_groups|^hc_(count|mult)$|altup_num_inputs", 2),
    (r"heads?$|num_attention_heads", 4),
    (r"_layer_period$|_pattern$|layer_interval$|every_n_layers$|layer_step$|sparse_step$", 2),
    (r"_layer_offset$|^first_k_dense_replace$|^num_dense_layers$|^max_window_layers$|^num_nextn_predict_layers$", 1),
    (r"hidden_layers|^n_layers?$|num_layers|(encoder|decoder)_layers$|^depth$|_blocks$", 2),
    (r"^(n_routed|num_local|num|moe_num)_experts$|^zero_expert_num$|^num_centroids$", 4),
    (r"experts_per_tok(en)?$|(?<!index_)top_?k$|^moe_k$", 2),
    (r"shared_experts$|_group$|n_?groups$", 1),
    (r"(?<!keep_)window|^local_attention$|attention_chunk_size|mem_len", 4),
    (r"chunk_size$|chunk_length$|block_size$", 8),
    (r"state_size$|d_state$", 8),
    (r"position_embeddings|^n_positions$|^n_ctx$|_positions$|max_seq_len|context_length", 64),
    (r"image_size|crop_size", 28),
    (r"patch_size", 14),
)
# 1 by default and something else in the checkpoints that have it.
_MULTIPLIER = r"multiplier$|^logits_scaling$|^logit_scale$"
_OTHER_MULTIPLIER = 0.75

# Without which the class makes no configuration at all.
_NEEDED: dict[str, dict[str, Any]] = {
    name: {"text_encoder": {"model_type": "t5"}, "audio_encoder": {"model_type": "encodec"}, "decoder": {}}
    for name in ("musicgen", "musicgen_melody")
}
_SHARED = {
    "layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4, "num_kv_shared_layers": 2
}  # fmt: skip
_INDEXED = {"indexer_budget": 64, "indexer_compress_ratio": 2} | {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8
}  # fmt: skip
_ROPE = {
    kind: {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [1, 1, 2]}
    for kind in ("sliding_attention", "full_attention")
}
# What no rule can know: settings that are None until a checkpoint says what they are, and sizes that must agree.
_EXTRAS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"], "rope_parameters": _ROPE},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "emu3": {"vocabulary_map": {"<image>": 100}},
    "gemma3n_text": _SHARED | {"activation_sparsity_pattern": [0.95, 0.0, 0.95, 0.0]},
    "gemma4_text": _SHARED,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "mamba2": {"head_dim": 16},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _INDEXED},
    "qwen4_exp_text": _INDEXED,
    "reformer": {"attn_layers": ["local", "lsh"], "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8]},
    "xlstm": {"hidden_size": 128, "num_heads": 1},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
}


def tiny_config(model_type: str) -> Any:
    """The configuration of a tiny model of this type."""
    from transformers import CONFIG_MAPPING

    kind, needed = CONFIG_MAPPING[model_type], _NEEDED.get(model_type, {})
    default = kind(**deepcopy(needed))  # some classes take their arguments apart
    values = default.to_dict()
    small = _merged(deepcopy(needed), _changed(default, values, _shrunk(values)))
    return kind(**_merged(small, _EXTRAS.get(model_type, {})))


def make_tiny(model_type: str, *, seed: int = 0) -> Any:
    """A model of this type in float32, in evaluation mode, with random weights: the causal language model, or the one
    with images and sound of which that is a part."""
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    config = tiny_config(model_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if type(lm.config) is not type(config):
            lm = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32)
        randomize(lm.eval())
    return lm


def save_tiny(model_type: str, folder: Path, *, seed: int = 0) -> None:
    """Model, configuration and the built-in tokenizer as a Hugging Face folder."""
    make_tiny(model_type, seed=seed).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


@torch.no_grad()
def randomize(lm: Any) -> None:
    """Matrices get entries of variance 1 / inputs; to everything else noise is added: a norm's gain stays near its
    neutral value, which families write as 0 or as 1, and a decay stays one. Then the head is scaled, so that the
    logits have the spread of a trained model's."""
    for tensor in lm.parameters():
        if tensor.dim() > 1:
            tensor.normal_(std=tensor.shape[-1] ** -0.5)
        else:
            tensor.add_(0.2 * torch.randn_like(tensor))
    for tensor in _saved_buffers(lm):
        tensor.add_(0.2 * torch.rand_like(tensor))
    logits = lm(input_ids=torch.randint(5, 95, (1, 24)), use_cache=False).logits
    lm.get_output_embeddings().weight.mul_(LOGIT_SPREAD / logits.float().std())


def _saved_buffers(lm: Any) -> Iterator[torch.Tensor]:
    saved = lm.state_dict().keys()
    for name, buffer in lm.named_buffers():
        if name in saved and buffer.is_floating_point():
            yield buffer


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """`second` over `first`, in nested configurations too."""
    nested = {
        k: _merged(first[k], v) for k, v in second.items() if isinstance(v, dict) and isinstance(first.get(k), dict)
    }
    return {**first, **second, **nested}


def _changed(config: Any, values: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """What `wanted` has otherwise, in nested configurations too. Sizes that the class derives from others it derives
    anew."""
    fields, nested = config.__dataclass_fields__, config.sub_configs
    found: dict[str, Any] = {}
    for name, value in wanted.items():
        if name in nested and isinstance(value, dict):
            found[name] = _changed(getattr(config, name), values[name], value)
        elif value != values[name] and name in fields and (fields[name].default is not None or isinstance(value, list)):
            found[name] = value
    return found


def _shrunk(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration's dictionary with every size within its limit, and one layer of each kind."""
    layers = next((values[n] for n in ("num_hidden_layers", "n_layer", "num_layers") if values.get(n)), 0)
    kept = _one_of_each_kind(values, layers)
    found = {name: _small(name, value, layers, kept) for name, value in values.items()}
    found |= {name: len(kept) for name in ("num_hidden_layers", "n_layer", "num_layers") if values.get(name) and kept}
    if "kv_lora_rank" in values:  # latent attention: a key head for every query head
        found["num_key_value_heads"] = found["num_attention_heads"]
    return found


def _small(name: str, value: Any, layers: int, kept: list[int]) -> Any:
    if isinstance(value, dict) and "model_type" in value:
        return _shrunk(value)
    if name == "is_decoder":
        return True  # BERT and its kin look both ways otherwise
    if re.search(r"_token_(id|index)s?$", name):
        return _small_id(value)
    if isinstance(value, list) and kept:
        if value and _are_indices(value, layers):
            return [kept.index(i) for i in value if i in kept]
        return [value[i] for i in kept] if len(value) == layers else value
    if isinstance(value, float) and value == 1.0 and re.search(_MULTIPLIER, name):
        return _OTHER_MULTIPLIER
    if isinstance(value, int) and not isinstance(value, bool):
        return min([value, *(limit for pattern, limit in _LIMITS if re.search(pattern, name))][:2])
    return value


def _one_of_each_kind(values: dict[str, Any], layers: int) -> list[int]:
    """Indices of the first layer of each combination of kinds, at least two; none where no setting tells kinds."""
    lists = [v for v in values.values() if isinstance(v, list) and len(v) == layers > 1 and not _are_indices(v, layers)]
    if not lists:
        return []
    kinds = [str(kind) for kind in zip(*lists, strict=True)]
    first = sorted(kinds.index(kind) for kind in set(kinds))
    return first if len(first) > 1 else [0, 1]


def _are_indices(values: list[Any], layers: int) -> bool:
    """Whether a list names layers by number."""
    return all(type(v) is int for v in values) and sorted(set(values)) == values and values[-1] < layers


def _small_id(value: Any) -> Any:
    if isinstance(value, list):
        return [_small_id(v) for v in value]
    return value if value is None or value < VOCABULARY else 100 + value % 10
