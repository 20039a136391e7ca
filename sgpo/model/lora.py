"""LoRA and DoRA through peft: adapters beside frozen weights, and the merged weights of a plain model.

Exports, and rollout engines that know nothing of adapters, get the weight W + scale B A (for DoRA with its rows
rescaled) under the name that the model's checkpoint has for it. Engines with adapters of their own get these as they
are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch

from sgpo.types import SgpoError

_ADAPTER = "policy"


def add_adapters(lm: Any, *, rank: int, alpha: float, modules: Sequence[str], dora: bool, seed: int) -> None:
    """Freezes `lm` and puts trainable adapters of `rank` beside its linear layers `modules` ("all-linear": all but the
    head). A in them is random by `seed`, B zero: the model is at first what it was.

    Raises SgpoError where peft is not installed, no layer has such a name, or it is that of the head or an embedding.
    """
    try:
        peft = import_module("peft")
    except ImportError as error:
        raise SgpoError(
            f"model.lora needs peft ({error}); pip install 'sgpo[lora]', or leave model.lora.rank at 0"
        ) from error
    chosen = _linear_layers(lm) if "all-linear" in modules else list(modules)
    settings = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=chosen, use_dora=dora, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            # In a module without a config: of one with it peft turns names of linear layers (those of shared experts)
            # into those of fused experts, to read adapters of older checkpoints.
            peft.inject_adapter_in_model(settings, torch.nn.ModuleDict({"lm": lm}), adapter_name=_ADAPTER)
        except (ValueError, TypeError) as error:
            raise SgpoError(f"model.lora.modules = {list(modules)}: {str(error).splitlines()[0]}") from error
    for module in (lm.get_output_embeddings(), lm.get_input_embeddings()):
        if _is_adapted(module):  # the fused loss reads the head's own weight: adapters there would learn nothing
            raise SgpoError(f"model.lora.modules = {list(modules)}: head and embedding take no adapters")
    for name, module in lm.named_modules():
        if _is_adapted(module) and not _is_linear(base := module.get_base_layer()):
            raise SgpoError(
                f"model.lora.modules = {list(modules)}: {name} is a {type(base).__name__} and no linear layer; "
                "leave it out, or set all-linear, which takes the linear layers alone"
            )
    bases = {name: module.get_base_layer() for name, module in lm.named_modules() if _is_adapted(module)}
    uses = Counter(id(base.weight) for base in bases.values())
    if shared := [name for name, base in bases.items() if uses[id(base.weight)] > 1]:
        raise SgpoError(
            f"model.lora.modules = {list(modules)}: {shared[0]} has its weight in common with another layer, and the "
            "adapters of both could not be merged into it; leave it out, or set all-linear, which does"
        )


@torch.no_grad()
def _is_linear(part: Any) -> bool:
    """Whether a layer gives the product with its weight; of a subclass one product tells (a router gives more)."""
    from transformers.pytorch_utils import Conv1D

    if type(part) is torch.nn.Linear or not isinstance(part, torch.nn.Linear):
        return type(part) in (torch.nn.Linear, Conv1D)
    ones = part.weight.new_ones(1, part.in_features)
    try:
        found = part(ones)
    except RuntimeError:  # it wants more than rows
        return False
    return isinstance(found, torch.Tensor) and torch.allclose(found, torch.nn.Linear.forward(part, ones), rtol=1e-2)


def _linear_layers(lm: Any) -> list[str]:
    """Names of all linear layers with a weight of their own but the head, `lm` being one. peft's own "all-linear" also
    takes routers and fused experts, which hold bare parameters or give more than a product, and layers that share a
    weight: their adapters could not be merged."""
    head = lm.get_output_embeddings()
    layers = {name: part for name, part in lm.named_modules() if _is_linear(part) and part is not head}
    uses = Counter(id(part.weight) for part in layers.values())
    return [f"lm.{name}" for name, part in layers.items() if uses[id(part.weight)] == 1]


def _is_adapted(module: Any) -> bool:
    """Whether adapters stand beside this layer."""
    return hasattr(module, "lora_A")


def merged_weights(lm: Any) -> dict[str, tuple[list[torch.Tensor], Callable[[], torch.Tensor]]]:
    """For each weight that an adapter changes, by its plain name: a function that makes the merged weight anew, and
    the parameters that must be whole when it is called (under ZeRO-3 they are not by themselves)."""
    layers = [(name, module) for name, module in lm.named_modules() if _is_adapted(module)]
    return {f"{name}.weight": (_parameters_of(module), _merge_of(module)) for name, module in layers}


def _parameters_of(module: Any) -> list[torch.Tensor]:
    bias = module.get_base_layer().bias
    return [parameter for parameter in module.parameters() if parameter is not bias]


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
