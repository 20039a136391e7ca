"""What a backbone keeps and computes: packed attention, checkpoints, their offload to the host, the MLP in tiles.

Each is arithmetic-neutral: the same hidden states and gradients, up to rounding. transformers is only imported where a
model is already there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sgpo.types import SgpoError

_PER_SEQUENCE = "sgpo_per_sequence"
# Arguments of an attention function that SDPA honours, or that say nothing of what attends to what.
_HARMLESS = ("dropout", "scaling", "position_ids", "cache_position", "use_cache")
_FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")


# ---- packed rows ---------------------------------------------------------------------------------------------------


def pack_attention(lm: Any) -> None:
    """Makes the model's attention stay inside each sequence of a packed row.

    flash-attn's varlen kernel where the model was loaded with it, or where it is installed on a GPU and the weights are
    bfloat16; else causal SDPA, sequence by sequence: no mask of [T, T], and no product between sequences.

    Raises SgpoError for a model whose layers mix tokens by anything but full causal attention.
    """
    require_full_attention(lm, "engine.packing: packed", "set engine.packing to padded")
    if lm.config.get_text_config()._attn_implementation in _FLASH:
        return
    if torch.cuda.is_available() and lm.dtype == torch.bfloat16 and importlib.util.find_spec("flash_attn"):
        lm.set_attn_implementation("flash_attention_2")
        return
    attend_per_sequence(lm)


def require_full_attention(lm: Any, wish: str, instead: str) -> None:
    """SgpoError, in the words of the knob, for a model whose layers do not all attend to everything before."""
    settings = lm.config.get_text_config()
    kinds = set(getattr(settings, "layer_types", None) or [_only_kind(settings)])
    if kinds != {"full_attention"}:
        raise SgpoError(
            f"{wish} needs full causal attention in every layer, which {settings.model_type} does not "
            f"have ({', '.join(sorted(kinds))}); {instead}"
        )
    if not getattr(lm, "_supports_attention_backend", False):
        raise SgpoError(
            f"{wish} needs an attention of its own, which the code of {settings.model_type} does not take; {instead}"
        )


def _only_kind(settings: Any) -> str:
    """Of a model that does not name its layers' kinds: Mistral and Phi-3 have a window all the same."""
    window = getattr(settings, "sliding_window", None)
    positions = getattr(settings, "max_position_embeddings", None)
    whole = window is None or (positions is not None and window >= positions)
    return "full_attention" if whole else "sliding_attention"


def attend_per_sequence(lm: Any) -> Callable[..., tuple[torch.Tensor, None]]:
    """Gives the model causal SDPA, sequence by sequence; returns that attention function."""
    from transformers import AttentionInterface

    AttentionInterface.register(_PER_SEQUENCE, _attention_per_sequence)
    lm.set_attn_implementation(_PER_SEQUENCE)
    return _attention_per_sequence


def packed_inputs(lm: Any, lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Arguments of the backbone for one row [1, T] that holds sequences of these lengths, in order."""
    positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
    inputs: dict[str, Any] = {"position_ids": positions[None]}
    if lm.config.get_text_config()._attn_implementation == _PER_SEQUENCE:
        return {**inputs, "sequence_lengths": tuple(lengths)}
    edges = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
    longest = max(lengths)
    return {
        **inputs,
        "cu_seq_lens_q": edges,
        "cu_seq_lens_k": edges,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _attention_per_sequence(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    sequence_lengths: tuple[int, ...] | None = None,
    across_ranks: Callable[..., tuple[torch.Tensor, None]] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, heads, T, D], key and value [1, key heads, T, D] -> [1, T, heads, D].

    `across_ranks` (of `sequence_parallel`): T is this rank's slice, and it calls back with all tokens of some heads.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if sequence_lengths is None:  # the model dropped the argument: tokens would see other sequences
        raise SgpoError(
            f"engine.packing: packed does not work with {type(module).__name__}, which does not hand the lengths to "
            "its attention; set engine.packing to padded"
        )
    _require_plain_causal(module, sequence_lengths, {"attention_mask": attention_mask, **kwargs})
    if across_ranks is not None:
        return across_ranks(module, query, key, value, None, sequence_lengths=sequence_lengths, **kwargs)
    parts = zip(*(tensor.split(sequence_lengths, dim=2) for tensor in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, q, k, v, None, **kwargs)[0] for q, k, v in parts], dim=1), None


def _require_plain_causal(module: nn.Module, lengths: Sequence[int], arguments: dict[str, Any]) -> None:
    """SgpoError where the model hands its attention what causal SDPA would drop: a mask, a cap, sinks, a window."""
    window = arguments.get("sliding_window")
    wide = isinstance(window, int) and window >= max(lengths)
    neutral = {"is_causal": True, "sliding_window": window if wide else None}
    for name, value in arguments.items():
        if name not in _HARMLESS and value is not None and value is not False and value is not neutral.get(name):
            raise SgpoError(
                f"engine.packing: packed and engine.sequence_parallel_size above 1 need plain causal attention, but "
                f"{type(module).__name__} has {name} of its own; set engine.packing to padded, and the size to 1"
            )


# ---- memory for time -----------------------------------------------------------------------------------------------


def checkpoint_layers(lm: Any, *, offload: bool) -> None:
    """Keeps only the input [B, T, H] of each layer for backward, on the host if `offload`; the rest is computed again.

    Raises SgpoError where the model's layers cannot do it.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[Any] = [module for module in lm.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise SgpoError(
            f"model.gradient_checkpointing: {lm.config.model_type} has no layers that support it; set it to false"
        )
    try:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise SgpoError(
            f"model.gradient_checkpointing: {lm.config.model_type} does not support it ({error}); set it to false"
        ) from error
    for layer in layers:
        # transformers checkpoints only in training mode, while a loaded model is in evaluation mode (no dropout). Only
        # the layer's own flag is set, not that of its parts.
        layer.training = True
        layer._gradient_checkpointing_func = partial(_checkpointed, layer, offload)


def _checkpointed(layer: nn.Module, offload: bool, function: Callable[..., Any], *args: Any) -> Any:
    """`function` of the layer under a checkpoint: in evaluation mode, or the layer's own dropout would be on."""

    def run(*args: Any) -> Any:
        layer.training = False
        try:
            return function(*args)
        finally:
            layer.training = True

    if not offload:
        return checkpoint(run, *args, use_reentrant=False)
    # Inside, checkpoint's own hooks keep everything from being saved; the outer one sees the inputs alone.
    with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
        return checkpoint(run, *args, use_reentrant=False)


def tile_mlps(lm: Any, tile_tokens: int) -> None:
    """Runs every MLP over `tile_tokens` tokens at a time, and again in backward: its inner activations
    [tile_tokens, intermediate size] are the only ones alive.

    Raises SgpoError where a layer has no dense gated MLP.
    """
    layers = getattr(lm.base_model, "layers", None)
    if layers is None or not all(hasattr(getattr(layer, "mlp", None), "down_proj") for layer in layers):
        raise SgpoError(
            f"model.mlp_tile_tokens: the layers of {lm.config.model_type} have no dense MLP to tile; leave it out"
        )
    for layer in layers:
        layer.mlp.forward = partial(_tiled, layer.mlp.forward, tile_tokens)


def tiled_mlps(model: nn.Module) -> list[nn.Module]:
    """The MLPs that `tile_mlps` has changed."""
    forwards = [(module, module.__dict__.get("forward")) for module in model.modules()]
    return [module for module, forward in forwards if isinstance(forward, partial) and forward.func is _tiled]


def _tiled(mlp: Callable[[torch.Tensor], torch.Tensor], tile_tokens: int, hidden: torch.Tensor) -> torch.Tensor:
    """hidden [B, T, H] -> [B, T, H]."""
    tokens = hidden.flatten(0, -2)
    if len(tokens) <= tile_tokens:
        return mlp(hidden)
    run = partial(checkpoint, mlp, use_reentrant=False) if torch.is_grad_enabled() else mlp
    tiles: list[Any] = [run(tile) for tile in tokens.split(tile_tokens)]
    return torch.cat(tiles).view_as(hidden)


def use_liger(lm: Any, choice: str) -> bool:
    """Puts Liger's fused RMSNorm, RoPE and SwiGLU into the model; returns whether it did.

    Args:
        choice: "on", "off", or "auto": where there is a GPU, Liger is installed and knows the model.

    Raises SgpoError where "on" cannot be done: Liger's kernels need a GPU.
    """
    lacking = None
    if not torch.cuda.is_available():
        lacking = "its kernels need a GPU, and there is none"
    elif importlib.util.find_spec("liger_kernel") is None:
        lacking = "it is not installed: pip install liger-kernel"
    else:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

        if lm.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
            lacking = f"it does not know {lm.config.model_type}"
    if choice == "off" or (choice == "auto" and lacking):
        return False
    if lacking:
        raise SgpoError(f"model.liger: on, but {lacking}; set it to auto or off")
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(lm, cross_entropy=False, fused_linear_cross_entropy=False)
    return True
