"""Sizes of a model, from its config.json or a short table of known ones: all that a memory plan needs of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgpo.types import SgpoError


@dataclass(frozen=True, slots=True)
class Architecture:
    """A dense decoder with gated MLP: Qwen2, Llama, SmolLM2 and their kin."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    tied: bool
    head_dim: int
    attention_bias: bool

    @property
    def query(self) -> int:
        """Width of the queries of a layer."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Width of the keys of a layer, and of its values."""
        return self.kv_heads * self.head_dim

    @property
    def head_parameters(self) -> int:
        """Weights of the output layer."""
        return self.vocab * self.hidden

    @property
    def layer_parameters(self) -> int:
        """Weights of one block: attention, MLP, two norms."""
        attention = 2 * self.hidden * (self.query + self.kv) + (self.query + 2 * self.kv) * self.attention_bias
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def parameters(self) -> int:
        """Weights of the model; a tied head counts once."""
        return self.layers * self.layer_parameters + self.hidden + self.head_parameters * (1 if self.tied else 2)

    def linears(self, modules: Sequence[str]) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the linear layers of one block that `modules` name; "all-linear": all of them."""
        hidden, wide = self.hidden, self.intermediate
        shapes = {
            "q_proj": (hidden, self.query),
            "k_proj": (hidden, self.kv),
            "v_proj": (hidden, self.kv),
            "o_proj": (self.query, hidden),
            "gate_proj": (hidden, wide),
            "up_proj": (hidden, wide),
            "down_proj": (wide, hidden),
        }
        named = {module.rsplit(".", 1)[-1] for module in modules}
        return {name: shape for name, shape in shapes.items() if "all-linear" in modules or name in named}

    def tensors(self) -> list[tuple[int, int]]:
        """(how many, elements) of the large weights; norms and biases are left out."""
        layer = [(self.layers, inputs * outputs) for inputs, outputs in self.linears(["all-linear"]).values()]
        return [*layer, (1 if self.tied else 2, self.head_parameters)]

    def adapter_parameters(self, adapted: dict[str, tuple[int, int]], rank: int, *, dora: bool = False) -> int:
        """Of adapters on these layers of every block: A [rank, inputs], B [outputs, rank], DoRA's lengths [outputs]."""
        return self.layers * sum(rank * (inputs + outputs) + dora * outputs for inputs, outputs in adapted.values())


KNOWN = {
    "qwen2.5-7b": Architecture(3584, 28, 28, 4, 18944, 152064, False, 128, True),
    "qwen2.5-1.5b": Architecture(1536, 28, 12, 2, 8960, 151936, True, 128, True),
}


def find_architecture(name: str) -> Architecture:
    """That of a known name, a config.json or a model folder. Raises SgpoError where there is none such."""
    if name in KNOWN:
        return KNOWN[name]
    file = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise SgpoError(
            f"no plan: {name} is neither a model folder nor a config.json; set plan.architecture to one of these or to "
            f"{', '.join(KNOWN)}"
        ) from None
    return from_config(raw, str(file))


def from_config(raw: dict[str, Any], place: str) -> Architecture:
    """The sizes in a Hugging Face config.json. Raises SgpoError where one is missing or the model is not dense."""
    raw = raw.get("text_config", raw)
    if raw.get("num_experts") or raw.get("num_local_experts"):
        raise SgpoError(
            f"no plan: {place} is a mixture of experts, which the plan does not know; set plan.on_misfit: off"
        )
    try:
        hidden, heads = int(raw["hidden_size"]), int(raw["num_attention_heads"])
        return Architecture(
            hidden=hidden,
            layers=int(raw["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(raw.get("num_key_value_heads") or heads),
            intermediate=int(raw["intermediate_size"]),
            vocab=int(raw["vocab_size"]),
            tied=bool(raw.get("tie_word_embeddings", False)),
            head_dim=int(raw.get("head_dim") or hidden // heads),
            attention_bias=bool(raw.get("attention_bias", raw.get("model_type") == "qwen2")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise SgpoError(f"no plan: {place} lacks {error}; set plan.on_misfit: off to train without a plan") from None


def check_sequence_parallel(size: int, *, processes: int, model: Mapping[str, Any]) -> None:
    """Whether `size` ranks can share the forward passes of the model whose config.json is `model`.

    Raises SgpoError where the processes do not split into such groups or the heads not among their members.
    """
    if size == 1:
        return
    key = "engine.sequence_parallel_size"
    if processes % size:
        raise SgpoError(
            f"{key} = {size} must divide the number of processes, which is {processes} (planning: plan.gpus)"
        )
    text = model.get("text_config") or model
    heads = text.get("num_attention_heads") or text.get("n_head") or 1
    kv_heads = text.get("num_key_value_heads") or heads
    if heads % size or (kv_heads % size and size % kv_heads):
        raise SgpoError(
            f"{key} = {size} must divide the {heads} attention heads of the model, and divide its {kv_heads} key/value "
            "heads or be a multiple of them"
        )
