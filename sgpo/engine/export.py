"""The trained model as a plain Hugging Face folder: safetensors, config, generation config, tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict

from sgpo.engine.checkpoint import write_folder
from sgpo.engine.zero import ZeroEngine
from sgpo.utils import distributed


def export_model(engine: ZeroEngine, tokenizer: Any, folder: Path, *, beside: Sequence[Path] = ()) -> None:
    """Replaces `folder` atomically by the current weights in the training dtype. Collective; rank 0 writes.

    beside: files that travel with the weights, as the prompt template.
    """

    def write(temporary: Path) -> None:
        # All ranks take part in gathering; only the first keeps what arrives.
        weights = {
            name: tensor.to("cpu", copy=True) for name, tensor in engine.named_weights() if distributed.is_main()
        }
        if distributed.is_main():
            lm = engine.model.lm
            save_torch_state_dict(weights, temporary)
            lm.config.save_pretrained(temporary)
            if lm.generation_config is not None:
                lm.generation_config.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            for file in beside:
                shutil.copy(file, temporary)

    write_folder(folder, write)
