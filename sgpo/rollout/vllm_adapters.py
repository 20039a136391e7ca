"""LoRA adapters in a running vLLM engine: taken from memory, in place of those of the step before."""

from __future__ import annotations

import re
from typing import Any, get_args

import torch
from vllm.config.lora import MaxLoRARanks
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest

from sgpo.types import SgpoError


def adapter_options(rank: int, modules: tuple[str, ...] | None) -> dict[str, Any]:
    """Arguments of an LLM that is to sample with adapters. Raises SgpoError for a rank above vLLM's largest."""
    size = next((size for size in sorted(get_args(MaxLoRARanks)) if size >= rank), None)
    if size is None:
        raise SgpoError(
            f"model.lora.rank = {rank} is more than vLLM takes ({max(get_args(MaxLoRARanks))}); lower it or set "
            "model.lora.sync to merged"
        )
    named = None if modules is None else list(modules)
    return {"enable_lora": True, "max_lora_rank": size, "max_loras": 1, "lora_target_modules": named}


class VllmAdapters:
    """The adapters of `llm`, scaled by alpha / rank. `request`: what a request says to be sampled with them."""

    def __init__(self, llm: Any, rank: int, alpha: float) -> None:
        self._llm, self._rank, self._alpha = llm, rank, alpha
        self._loads = 0
        self.request: LoRARequest | None = None

    def replace(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes other values, by their names in peft's state dict; under a new number, so that nothing cached can be
        taken for theirs.

        Raises SgpoError where one of a pair is missing or the model has no such layer.
        """
        self.request, number = None, self._loads + 1
        # vLLM multiplies B by its scale in place: what came may be the trainer's own.
        named = {f"base_model.model.{_peft_name(name)}": tensor.clone() for name, tensor in tensors.items()}
        pairs = ((".lora_A.", ".lora_B."), (".lora_B.", ".lora_A."))
        if alone := [n for n in named for one, other in pairs if one in n and n.replace(one, other) not in named]:
            raise SgpoError(f"weight sync: of a pair of adapters only {alone[0]} arrived ({len(alone)} in all)")
        settings = PEFTHelper(self._rank, self._alpha, "all-linear")  # type: ignore[arg-type]
        try:
            unknown = self._llm.collective_rpc(_exchange, args=(number, named, settings))[0]
        except (KeyError, ValueError, RuntimeError, AssertionError, AttributeError) as error:
            raise SgpoError(f"weight sync: vLLM cannot take the adapters: {error}") from error
        if unknown:
            raise SgpoError(
                f"weight sync: vLLM has no layer for the adapters of {', '.join(unknown[:3])}; set model.lora.sync to "
                "merged"
            )
        self._loads = number
        self.request = LoRARequest(f"adapters {number}", number, lora_path="in memory")


def _peft_name(name: str) -> str:
    """As peft writes it to a file: without the adapter's own name ("policy")."""
    return re.sub(r"\.(lora_[AB])\.\w+\.weight$", r".\1.weight", name)


def _exchange(worker: Any, number: int, tensors: dict[str, torch.Tensor], settings: PEFTHelper) -> list[str]:
    """Puts adapters into vLLM's worker; the layers that they name and the model does not have."""
    lora_manager = worker.model_runner.lora_manager
    manager, mapper = lora_manager._adapter_manager, getattr(worker.model_runner.model, "hf_to_vllm_mapper", None)
    lora = LoRAModel.from_lora_tensors(
        number,
        tensors,
        settings,
        device=str(worker.device),
        dtype=lora_manager.lora_config.lora_dtype,
        weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
    )
    lora_manager.remove_all_adapters()
    manager.add_adapter(lora)
    manager.activate_adapter(number)
    return sorted(set(lora.loras) - set(manager.modules))
