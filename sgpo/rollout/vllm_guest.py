"""vLLM as a guest in the trainer's process: what it changes for the whole process is put back, or made its own."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import CONFIG_MAPPING, MODEL_MAPPING


@contextmanager
def keeping_the_process_group() -> Iterator[None]:
    """vLLM's shutdown ends all of torch.distributed, the trainer's process group included, which outlives it."""
    destroy = dist.destroy_process_group

    def destroy_own(group: Any = None) -> None:
        if group is not None:
            destroy(group)

    dist.destroy_process_group = destroy_own
    try:
        yield
    finally:
        dist.destroy_process_group = destroy


@contextmanager
def undisturbed() -> Iterator[None]:
    """vLLM seeds every random generator of the process and, on a CPU, replaces torch.set_num_threads."""
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # vLLM reads every attribute of torch.distributed
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)


class ClassesKept:
    """Around the making of an engine. A family that vLLM has no code for runs as transformers' own module, whose class
    vLLM decorates (it compiles, and has vLLM's settings) for everybody: a trainer's model of that class, older or
    newer, would fail in its next forward pass. At the end the class is what it was; `hand_over` gives what was changed
    to vLLM's modules alone, through a class of their own.
    """

    def __init__(self, folder: Path) -> None:
        # The module of the family, imported before it can be changed.
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        if model_type in CONFIG_MAPPING:
            MODEL_MAPPING.get(CONFIG_MAPPING[model_type], None)
        self._before: dict[type, tuple[tuple[type, ...], dict[str, Any]]] = {}
        self._own: dict[type, type] = {}

    def __enter__(self) -> ClassesKept:
        self._before = {found: (found.__bases__, dict(vars(found))) for found in _transformers_modules()}
        return self

    def __exit__(self, *_: object) -> None:
        for shared, (bases, attributes) in self._before.items():
            changed = {name: value for name, value in vars(shared).items() if value is not attributes.get(name)}
            if shared.__bases__ == bases and not changed:
                continue
            added = tuple(base for base in shared.__bases__ if base not in bases)
            shared.__bases__ = bases
            for name in changed:
                if name in attributes:
                    setattr(shared, name, attributes[name])
                else:
                    delattr(shared, name)
            self._own[shared] = type(shared.__name__, (shared, *added), {**changed, "__module__": shared.__module__})

    def hand_over(self, model: torch.nn.Module) -> None:
        """Makes the modules of vLLM's `model` what they were before the end."""
        for module in model.modules():
            if own := self._own.get(type(module)):
                module.__class__ = own


def _transformers_modules() -> Iterator[type]:
    """Every class of torch modules that transformers has defined so far."""
    found, left = set(), [torch.nn.Module]
    while left:
        for child in left.pop().__subclasses__():
            if child not in found:
                found.add(child)
                left.append(child)
    return (kind for kind in found if kind.__module__.startswith("transformers."))
