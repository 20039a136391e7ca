"""Every family whose weights transformers renames or fuses in memory gets them back as its checkpoints have them."""

import re

import pytest
import torch
from model_families import config_of, save_family
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import WeightRenaming
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sgpo.engine.checkpoint_names import CheckpointNames, check_round_trip, tied_names
from sgpo.model.loading import load_causal_lm
from sgpo.types import SgpoError


def converted():
    """Families whose weights transformers converts, where SMALL makes a small model of them."""
    found = []
    for family, kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if get_checkpoint_conversion_mapping(family) is None and get_checkpoint_conversion_mapping(kind) is None:
            continue
        try:
            with torch.device("meta"):
                lm = AutoModelForCausalLM.from_config(config_of(family))
        except (AttributeError, ImportError, KeyError, TypeError, ValueError):
            continue  # it wants sizes that fit together in its own way
        if sum(parameter.numel() for parameter in lm.parameters()) < 5e5:
            found.append(family)
    return found


def exported(lm):
    """What leaves the trainer, and the names in memory that each of it comes from."""
    names, tied = CheckpointNames(lm), tied_names(lm)
    held = {name: tensor for name, tensor in lm.state_dict().items() if name not in tied}
    groups = names.groups(held)
    assert sorted(name for group in groups for name in group) == sorted(held)
    weights = {}
    for group in groups:
        # A few weights of one layer at a time: that bounds what a conversion needs.
        assert len({tuple(re.findall(r"\.(\d+)\.", name)[:1]) for name in group}) == 1
        weights |= names.convert({name: held[name] for name in group})
    return weights


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_what_leaves_is_what_save_pretrained_writes_bit_for_bit_and_loads_again(tmp_path):
    families = converted()
    assert len(families) >= 30
    assert {"mixtral", "qwen3_moe", "olmoe", "gpt_neox", "deepseek_v3", "phimoe"} <= set(families)
    for family in families:
        print(family)
        made = save_family(family, tmp_path / family)
        file = load_file(tmp_path / family / "model.safetensors")
        same(exported(made), file)
        lm = AutoModelForCausalLM.from_pretrained(tmp_path / family)
        same(exported(lm), file)
        same(lm.state_dict(), made.state_dict())
        check_round_trip(lm)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_neox"])
def test_a_folder_with_the_names_in_memory_leads_to_those_of_published_checkpoints(tmp_path, family):
    made = save_family(family, tmp_path / "published")
    made.save_pretrained(tmp_path / "memory", save_original_format=False)
    lm = load_causal_lm(tmp_path / "memory", dtype="float32")
    assert load_file(tmp_path / "memory" / "model.safetensors").keys() == lm.state_dict().keys()
    same(exported(lm), load_file(tmp_path / "published" / "model.safetensors"))


def test_adapters_are_called_after_the_layer_that_a_checkpoint_has():
    names = CheckpointNames(AutoModelForCausalLM.from_config(config_of("granitemoe")))
    for module in ("self_attn.q_proj", "block_sparse_moe.router"):
        (layer,) = names.convert({f"model.layers.0.{module}.weight": torch.zeros(4, 64)})
        (adapter,) = names.convert({f"model.layers.0.{module}.lora_A.policy.weight": torch.zeros(4, 64)})
        assert adapter == layer.replace(".weight", ".lora_A.policy.weight")
    assert layer != f"model.layers.0.{module}.weight"


def test_a_family_that_cannot_be_converted_back_is_refused_by_name():
    lm = AutoModelForCausalLM.from_config(config_of("qwen3"))
    check_round_trip(lm)
    lossy = WeightRenaming(source_patterns="self_attn.[qk]_norm", target_patterns="self_attn.q_norm")
    register_checkpoint_conversion_mapping("qwen3", [lossy])
    try:
        with pytest.raises(SgpoError, match=r"family qwen3 cannot leave the trainer: .*_norm"):
            check_round_trip(AutoModelForCausalLM.from_config(config_of("qwen3")))
    finally:
        register_checkpoint_conversion_mapping("qwen3", None, overwrite=True)
