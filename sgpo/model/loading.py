"""What a local Hugging Face folder holds: tokenizer, model, and the few facts of its config that the trainer needs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from sgpo.types import SgpoError

# transformers maps most models' names to the first one; these have kept their own.
_POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length", "n_ctx")


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a local folder. Raises SgpoError where there is none, or it lacks an EOS token."""
    from transformers import AutoTokenizer

    _require_folder(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
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
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError, StrictDataclassError) as error:
        if "attention implementation" in str(error):  # transformers goes on with advice that cannot be followed here
            raise SgpoError(
                f"the model in {path} has no {attn_implementation} attention; set model.attn_implementation to eager"
            ) from error
        raise SgpoError(f"no model can be loaded from {path}: {_first_line(error)}") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise SgpoError(
            f"the model in {path} lacks {', '.join(missing[:3])} ({len(missing)} weights in all), which would be "
            "random numbers; copy the whole checkpoint"
        )
    return model


def eos_ids_of_folder(path: str | Path) -> int | list[int] | None:
    """EOS of the model's generation config, or of its config where it has none."""
    for name in ("generation_config.json", "config.json"):
        if (file := Path(path) / name).is_file():
            return json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    return None


def positions_of(model_folder: Path) -> int | None:
    """Longest sequence that the model was made for; None where its config does not say."""
    settings = _text_settings(model_folder)
    return next((found for name in _POSITIONS if isinstance(found := settings.get(name), int) and found > 0), None)


def check_length(model_folder: Path, longest: int, sequence: str, advice: str) -> None:
    """SgpoError, with the words for the sequence and what to do, where one of `longest` tokens is more than the model
    was made for, or changes what it computes for the shorter ones beside it."""
    positions = positions_of(model_folder)
    if positions is not None and longest > positions:
        raise SgpoError(f"{sequence}, more than {positions}, the positions of {model_folder}; {advice}")
    rope = _text_settings(model_folder).get("rope_parameters") or {}
    original = rope.get("original_max_position_embeddings")
    if original is not None and rope.get("rope_type") == "longrope" and longest > original:
        raise SgpoError(
            f"{sequence}, more than {original}: from there on the LongRoPE of {model_folder} turns every sequence of a "
            f"batch otherwise, the short ones too, so that log-probs depend on what stands beside them; {advice}"
        )


def check_token_ids(model_folder: Path, tokenizer: Any, sequences: Iterable[Sequence[int]]) -> None:
    """SgpoError where a token that the run needs has no row in the model's embedding: of these sequences, EOS or
    padding. The tokenizer is larger than the model then."""
    rows = _text_settings(model_folder).get("vocab_size")
    largest = max(max(ids, default=0) for ids in (*sequences, (tokenizer.eos_token_id, tokenizer.pad_token_id)))
    if isinstance(rows, int) and largest >= rows:
        raise SgpoError(
            f"the tokenizer in {model_folder} gives token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), "
            f"but the model's embedding has {rows} rows: the two do not belong together; take the model's own "
            "tokenizer, or enlarge its embedding (resize_token_embeddings) and save it"
        )


def _text_settings(model_folder: Path) -> dict[str, Any]:
    """What the config of the language model says, under the names of transformers and under its own; only the
    folder's own words where transformers does not know the model."""
    from transformers import AutoConfig

    raw = config_of(model_folder)
    try:
        config = AutoConfig.from_pretrained(model_folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, StrictDataclassError):
        return raw
    text = config.get_text_config(decoder=True)
    known = {name: getattr(text, name, None) for name in (*_POSITIONS, "vocab_size", "rope_parameters")}
    return {name: value for name, value in known.items() if value is not None}


def config_of(model_folder: Path) -> dict[str, Any]:
    """The folder's config.json."""
    return json.loads((model_folder / "config.json").read_text(encoding="utf-8"))


def _require_folder(path: str | Path) -> None:
    if not (Path(path) / "config.json").is_file():
        raise SgpoError(f"model folder {path} does not exist or has no config.json; give a local Hugging Face folder")


def _first_line(error: Exception) -> str:
    """And the second, which says what is wrong where the first one ends with where."""
    first, *others = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return f"{first} {others[0]}" if first.endswith(":") and others else first
