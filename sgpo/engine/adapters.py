"""LoRA and DoRA through peft: adapters beside frozen weights, and the merged weights that everybody else gets to see.

Rollout engines and exports know nothing of adapters: `merged_weights` gives them the weight W + scale B A (for DoRA
with its rows rescaled) under the name that the model's checkpoint has for it: a weight sync is proved as ever.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch

from sgpo.schema import SgpoError

_ADAPTER = "policy"


def add_adapters(lm: Any, *, rank: int, alpha: float, targets: Sequence[str], dora: bool, seed: int) -> None:
    """Freezes `lm` and puts trainable adapters of `rank` beside its linear layers `targets` ("all-linear": all but the
    head). A in them is random by `seed`, B zero: the model is at first what it was.

    Raises SgpoError where peft is not installed or no layer has such a name.
    """
    try:
        peft = import_module("peft")
    except ImportError as error:
        raise SgpoError(
            f"model.lora needs peft ({error}); pip install 'sgpo[lora]', or leave model.lora.rank at 0"
        ) from error
    chosen: str | list[str] = "all-linear" if "all-linear" in targets else list(targets)
    settings = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=chosen, use_dora=dora, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            peft.inject_adapter_in_model(settings, lm, adapter_name=_ADAPTER)
        except ValueError as error:
            raise SgpoError(f"model.lora.targets = {list(targets)}: {str(error).splitlines()[0]}") from error


def is_adapter(name: str) -> bool:
    """True for the parameters that peft added; `name` as in the state dict."""
    return re.search(r"\.lora_\w+\.", name) is not None


def plain_name(name: str) -> str:
    """The name that a weight had before adapters were put beside it."""
    return name.replace(".base_layer.", ".")


def merged_weights(lm: Any) -> dict[str, Callable[[], torch.Tensor]]:
    """For each weight that an adapter changes, by its plain name: a function that makes the merged weight anew."""
    layers = [(name, module) for name, module in lm.named_modules() if hasattr(module, "lora_A")]
    return {f"{name}.weight": _merge_of(module) for name, module in layers}


def _merge_of(module: Any) -> Callable[[], torch.Tensor]:
    @torch.no_grad()
    def merge() -> torch.Tensor:
        # peft merges in place; `safe_merge` makes it a new tensor, so the old one can be put back untouched.
        layer = module.get_base_layer()
        original = layer.weight.data
        module.merge(safe_merge=True)
        merged, layer.weight.data = layer.weight.data, original
        module.merged_adapters.clear()
        return merged

    return merge
