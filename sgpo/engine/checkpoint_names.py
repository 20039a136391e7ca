"""Weights as checkpoints of their family have them: transformers fuses and renames some in memory (experts, routers,
heads), and other programs know only the names on disk. All conversions are transformers' own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from sgpo.types import SgpoError
from sgpo.utils.lora_names import is_adapter


class CheckpointNames:
    """Turns weights of `lm` into those of a checkpoint, as its save_pretrained would, but a group at a time.

    The names are those of the folder that `lm` was loaded from. Where that has the names in memory (an export of
    save_pretrained without conversion), or there is none, they are those of its family's published checkpoints.
    """

    def __init__(self, lm: Any) -> None:
        if not getattr(lm, "_weight_conversions", None):  # what loading has used; all that saving looks at
            lm._weight_conversions = [
                conversion
                for conversion in get_model_conversion_mapping(lm, add_legacy=False)
                if not isinstance(conversion, PrefixChange)  # whether a prefix was there, only loading can tell
            ]
        self._lm = lm
        reverse = [conversion.reverse_transform() for conversion in reversed(lm._weight_conversions)]
        self._renamings = [step for step in reverse if isinstance(step, WeightRenaming)]
        self._converters = [step for step in reverse if isinstance(step, WeightConverter)]

    def groups(self, names: Iterable[str]) -> list[list[str]]:
        """Names in memory, those together that are converted together: the least that `convert` can work on."""
        found: dict[str, list[str]] = {}
        for name in names:
            found.setdefault(self._target(name)[0], []).append(name)
        return list(found.values())

    def convert(self, group: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors that a checkpoint has in place of one group; some share memory with those that came."""
        name, *others = group
        target, is_converted = self._target(name)
        if not is_converted and not others:
            return {target: group[name]}
        return revert_weight_conversion(self._lm, dict(group))

    def _target(self, name: str) -> tuple[str, bool]:
        """What a name becomes (of several, a pattern for all), and whether more than the name changes."""
        if is_adapter(name):  # it is called after its layer, and itself nobody's part
            layer, suffix = name.split(".lora_", 1)
            target, _ = rename_source_key(f"{layer}.weight", self._renamings, [], reverse=True)
            return f"{target.removesuffix('.weight')}.lora_{suffix}", False
        target, converter = rename_source_key(name, self._renamings, self._converters, reverse=True)
        return target, converter is not None


def check_round_trip(lm: Any) -> None:
    """Proves, without weights, that transformers reads what `CheckpointNames` makes of `lm` as `lm` again: every name
    and every shape. Raises SgpoError that names the family where it does not.
    """
    if type(lm.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:  # part of a larger model that is loaded as a whole only
        raise SgpoError(
            f"the weights of model family {lm.config.model_type} cannot leave the trainer: transformers loads a folder "
            f"with a {type(lm.config).__name__} as no language model of its own; choose another family"
        )
    tied = tied_names(lm)
    held = {name: tensor for name, tensor in lm.state_dict().items() if name not in tied}
    names = CheckpointNames(lm)
    exported: dict[str, torch.Tensor] = {}
    with torch.device("meta"):
        for group in names.groups(held):
            exported |= names.convert({name: torch.empty(held[name].shape, dtype=lm.dtype) for name in group})
        twin = type(lm)(lm.config)
    conversions: list[Any] = get_model_conversion_mapping(twin)
    settings = LoadStateDictConfig(device_map={"": "meta"}, dtype=lm.dtype, weight_mapping=conversions)
    with _without_progress_bar():
        info, _ = convert_and_load_state_dict_in_model(twin, exported, settings)
    lost = (info.missing_keys & held.keys()) | info.unexpected_keys | info.conversion_errors.keys()
    lost |= {name for name, *_ in info.mismatched_keys}
    if lost:
        raise SgpoError(
            f"the weights of model family {lm.config.model_type} cannot leave the trainer: transformers does not read "
            f"back what it makes of them for a checkpoint ({', '.join(sorted(lost)[:3])}; {len(lost)} weights in all); "
            "choose another family or another version of transformers"
        )


def tied_names(lm: Any) -> set[str]:
    """Names of `lm` for a weight that has another name, under which it leaves."""
    kept = {name for name, _ in lm.named_parameters()}
    return {name for name, _ in lm.named_parameters(remove_duplicate=False)} - kept


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
