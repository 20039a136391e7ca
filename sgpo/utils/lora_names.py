"""Names of weights in a model with adapters: trainer and rollout engines tell the one from the other by them."""

from __future__ import annotations

import re


def is_adapter(name: str) -> bool:
    """True for the parameters that peft added; `name` as in the state dict."""
    return re.search(r"\.lora_\w+\.", name) is not None


def plain_name(name: str) -> str:
    """The name that a weight had before adapters were put beside it."""
    return name.replace(".base_layer.", ".")
