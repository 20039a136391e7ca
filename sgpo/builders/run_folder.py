"""The folder of a run: made or entered again, with the resolved config and where the run comes from."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from sgpo.config import Config
from sgpo.types import SgpoError
from sgpo.utils.config_file import checked
from sgpo.utils.config_rules import GONE, RENAMED
from sgpo.utils.distributed import on_rank_zero_first
from sgpo.utils.provenance import environment

# Sections that may change between a checkpoint and its resumption without changing what is learnt.
_FREE_SECTIONS = ("run", "log", "checkpoint", "plan")


def open_run_folder(config: Config) -> Path:
    """The run's folder, ready to be written to. Collective: rank 0 makes it; what it finds wrong ends every rank."""
    check_packages(config)
    return on_rank_zero_first(partial(prepare_run_folder, config))


def prepare_run_folder(config: Config) -> Path:
    """Creates or re-enters the run folder, writes the resolved config and where the run comes from.

    Raises SgpoError where the folder holds a run with other settings. Call on rank 0 only.
    """
    folder = config.run.dir
    resolved = config.model_dump(mode="json")
    written = folder / "config.yaml"
    if written.exists() and config.run.resume == "never":
        spare = next(p for n in range(1, 10_000) if not (p := folder.with_name(f"{folder.name}.old-{n}")).exists())
        folder.rename(spare)
        print(f"{folder} is set aside as {spare}")
    if written.exists() and (folder / "metrics.jsonl").exists():  # it has made a step
        _check_same(yaml.safe_load(written.read_text(encoding="utf-8")), resolved, written)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written.write_text(yaml.safe_dump(resolved, sort_keys=False), encoding="utf-8")
        (folder / "environment.json").write_text(json.dumps(environment(), indent=1), encoding="utf-8")
    except OSError as error:
        raise SgpoError(f"run folder {folder} cannot be written: {error.strerror}; set run.output_dir") from error
    return folder


def check_packages(config: Config) -> None:
    """Optional packages that the config asks for."""
    wanted = {"tensorboard": config.log.tensorboard, "wandb": config.log.wandb_project is not None}
    for package, asked in wanted.items():
        if asked and importlib.util.find_spec(package) is None:
            raise SgpoError(f"the log section asks for {package}, which is not installed: pip install {package}")


def _check_same(old: dict[str, Any], new: dict[str, Any], path: Path) -> None:
    old = from_earlier_version(old)
    with suppress(SgpoError):  # a key that did not exist then had what is its default now
        old = checked(Config, old, str(path)).model_dump(mode="json")
    old, new = copy.deepcopy(old), copy.deepcopy(new)
    for settings in (old, new):  # what to do about a step that is not finite may be decided where it came
        for path_of in (["optim"], ["warmup", "optim"]):
            _section(settings, path_of).pop("non_finite", None)
    changed = [
        f"{section}.{key} ({old.get(section, {}).get(key)!r} -> {value!r})"
        for section, values in new.items()
        if section not in _FREE_SECTIONS
        for key, value in values.items()
        if old.get(section, {}).get(key) != value
    ]
    if changed:
        raise SgpoError(
            f"{path} belongs to a run with other settings: {', '.join(changed)}; give another run.name, "
            "or --run.resume never to set the old folder aside"
        )


def from_earlier_version(raw: dict[str, Any]) -> dict[str, Any]:
    """An old run's config.yaml in today's words: renamed keys moved, those that are gone left out."""
    found = copy.deepcopy(raw)
    for key in GONE:
        *path, leaf = key.split(".")
        section = _section(found, path)
        if leaf in section:
            value = section.pop(leaf)
            if key in RENAMED:
                section[RENAMED[key].rsplit(".", 1)[1]] = value
    algorithm = _section(found, ["algorithm"])
    if algorithm.get("over_limit") == "off":
        algorithm.update(over_limit="mask", max_token_kl=None)
    return found


def _section(raw: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """The mapping at `path`; an empty one where there is none."""
    for name in path:
        raw = raw.get(name) or {}
        if not isinstance(raw, dict):
            return {}
    return raw
