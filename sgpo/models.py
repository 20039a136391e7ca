"""A Hugging Face causal language model as the trainer needs it: hidden states, and a head that never makes logits."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from sgpo.activations import checkpoint_layers, pack_attention, packed_inputs, tile_mlps, use_liger
from sgpo.schema import SgpoError
from sgpo.sequence_parallel import SequenceParallel

# Models that change the logits after the head: the fused losses would silently compute something else.
# Each with the values that change nothing.
_UNSUPPORTED_LOGITS = {
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "lm_head_multiplier": (None, 1),
    "output_multiplier": (None, 1),
}


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a local folder. Raises SgpoError where there is none, or it lacks an EOS token."""
    from transformers import AutoTokenizer

    _require_folder(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise SgpoError(f"no tokenizer can be loaded from {path}: {_first_line(error)}") from error
    if not tokenizer.encode("1", add_special_tokens=False):
        # For some model types transformers makes up an empty tokenizer where the files are missing.
        raise SgpoError(f"no tokenizer can be loaded from {path}: it has no vocabulary; add the tokenizer's files")
    if tokenizer.eos_token_id is None:
        raise SgpoError(f"the tokenizer in {path} has no eos_token; completions could never end: set one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(path: str | Path, *, dtype: str, attn_implementation: str = "sdpa") -> Any:
    """The model of a local folder in `dtype` ("float32" or "bfloat16"), safetensors only, no remote code."""
    from transformers import AutoModelForCausalLM

    _require_folder(path)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise SgpoError(f"no model can be loaded from {path}: {_first_line(error)}") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise SgpoError(
            f"the model in {path} lacks {', '.join(missing[:3])} ({len(missing)} weights in all), which would be "
            "random numbers; copy the whole checkpoint"
        )
    settings = model.config.get_text_config()
    for name, neutral in _UNSUPPORTED_LOGITS.items():
        if getattr(settings, name, None) not in neutral:
            raise SgpoError(f"the model in {path} sets {name}, which the fused loss does not support yet")
    return model


class LossHead(nn.Module):
    """Holds the output weight so that its own forward, not a product with all rows, is where the loss is formed.

    Being a module matters under ZeRO-3: the engine gathers a module's parameters around its forward and backward.
    """

    def __init__(self, output: nn.Module) -> None:
        super().__init__()
        self.weight = output.weight
        self.bias = getattr(output, "bias", None)

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(self.weight, self.bias, *args)


class PolicyModel(nn.Module):
    """Backbone and head of `lm`. Every method takes int64 ids [B, T] and flat row indices [N].

    Args:
        packed: rows hold several sequences each ([1, T], with their lengths) in place of one padded sequence.
        activation_offload: checkpoints (which it needs) wait for backward on the host.
        mlp_tile_tokens: tokens that an MLP takes at a time; None: all.
        liger: "auto", "on" or "off", see `sgpo.activations.use_liger`.
        parallel: the ranks that share every forward pass of `lm`; all of its calls are then collective among them.
    """

    def __init__(
        self,
        lm: Any,
        *,
        packed: bool = False,
        gradient_checkpointing: bool = False,
        activation_offload: bool = False,
        mlp_tile_tokens: int | None = None,
        liger: str = "off",
        parallel: SequenceParallel | None = None,
    ) -> None:
        super().__init__()
        self.lm = lm
        self.head = LossHead(lm.get_output_embeddings())
        self.packed = packed
        self._parallel = parallel
        self._pick: Callable[[torch.Tensor], torch.Tensor] | None = None
        lm.config.use_cache = False
        if packed and parallel is None:
            pack_attention(lm)
        use_liger(lm, liger)
        if gradient_checkpointing:
            checkpoint_layers(lm, offload=activation_offload)
        if mlp_tile_tokens is not None:
            tile_mlps(lm, mlp_tile_tokens)
        if isinstance(norm := getattr(lm.base_model, "norm", None), nn.Module):
            norm.register_forward_pre_hook(self._select)

    @property
    def shared_by(self) -> int:
        """Number of ranks that share a forward pass."""
        return 1 if self._parallel is None else self._parallel.size

    def hidden(self, input_ids: torch.Tensor, rows: torch.Tensor, lengths: Sequence[int] | None = None) -> torch.Tensor:
        """Last hidden states [N, H] of the selected positions.

        The final norm runs on them alone, so no other state outlives the last layer. `lengths`: of the sequences in a
        packed row; None: each row is one sequence, padded on the right.
        """
        if self._parallel is not None:
            input_ids, arguments, pick = self._parallel.share(input_ids, rows, lengths)
        else:
            arguments = {} if lengths is None else packed_inputs(self.lm, lengths, input_ids.device)
            pick = partial(_selected, rows)
        self._pick = pick
        try:
            states = self.lm.base_model(input_ids=input_ids, use_cache=False, **arguments).last_hidden_state
            return states if self._pick is None else pick(states)
        finally:
            self._pick = None

    def _select(self, _: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Before the final norm: the selected rows of [B, T, H]."""
        if self._pick is None:  # somebody else calls the backbone
            return arguments
        pick, self._pick = self._pick, None
        return (pick(arguments[0]), *arguments[1:])

    def forward(self, function: Callable[..., Any], batch: Any, teacher: Any = None) -> Any:
        """function(head weight [V, H], head bias or None, hidden of the batch's rows, of the teacher's rows or None).

        The teacher's rows carry no gradient.
        """
        teacher_hidden = None
        if teacher is not None:
            with torch.no_grad():
                teacher_hidden = self.hidden(teacher.input_ids, teacher.rows, teacher.lengths)
        return self.head(function, self.hidden(batch.input_ids, batch.rows, batch.lengths), teacher_hidden)


def _selected(rows: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Rows [N, H] of [B, T, H]."""
    return states.flatten(0, 1)[rows]


def eos_ids_of_folder(path: str | Path) -> int | list[int] | None:
    """EOS of the model's generation config, or of its config where it has none."""
    for name in ("generation_config.json", "config.json"):
        if (file := Path(path) / name).is_file():
            return json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    return None


def _require_folder(path: str | Path) -> None:
    if not (Path(path) / "config.json").is_file():
        raise SgpoError(f"model folder {path} does not exist or has no config.json; give a local Hugging Face folder")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
