"""From a YAML file and `--section.key value` words to checked settings of any pydantic schema. Loads without torch.

Unknown keys, values out of range and pairs that cannot work together are refused with one sentence, which names the
file, the key and, where one is close, the key that was meant.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from sgpo.types import SgpoError

Settings = TypeVar("Settings", bound=BaseModel)


def load_settings(
    schema: type[Settings], path: str | Path | None, overrides: Sequence[str] = (), base: dict[str, Any] | None = None
) -> Settings:
    """Reads a YAML file, applies `--section.key value` overrides, checks everything against `schema`.

    Args:
        path: the file; None: the overrides alone, on top of `base`.

    Raises SgpoError with one sentence per problem: the file, the key, what was expected and the nearest known key.
    """
    raw = dict(base or {}) if path is None else _read_sections(schema, Path(path))
    for key, value in parse_overrides(overrides):
        _assign(raw, key, value)
    return checked(schema, raw, "command line" if path is None else str(path))


def checked(schema: type[Settings], raw: dict[str, Any], place: str) -> Settings:
    """The settings in `raw`; SgpoError with one sentence per problem, each starting with `place`."""
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        raise SgpoError("; ".join(_sentence(schema, place, item) for item in error.errors())) from None


def _read_sections(schema: type[BaseModel], path: Path) -> dict[str, Any]:
    try:
        raw = _read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SgpoError(f"config {path} does not exist; give a YAML file such as configs/quickstart.yaml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SgpoError(f"config {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise SgpoError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise SgpoError(f"config {path} must be a mapping of sections ({', '.join(schema.model_fields)})")
    return raw


class _Loader(yaml.SafeLoader):
    """YAML without its surprises: `off` and `2024-01-05` are texts, and a key given twice is refused.

    YAML 1.1 reads off, on, yes and no as booleans (pydantic still takes these words for a boolean knob), and keeps the
    last of two equal keys without a word.
    """

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":timestamp"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.constructor.ConstructorError(problem=f"{twice[0]} is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def _read_yaml(text: str) -> Any:
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def parse_overrides(arguments: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) from `--a.b value` and `--a.b=value`; values are read as YAML."""
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise SgpoError(f"unexpected argument {word!r}; options are written --section.key value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise SgpoError(f"option --{key} lacks a value; write --{key} VALUE")
            value = rest.pop(0)
        try:
            yield key, _read_yaml(value)
        except yaml.YAMLError:
            raise SgpoError(f"the value of --{key}, {value!r}, is not readable as YAML") from None


def config_first(words: Sequence[str]) -> tuple[Path | None, Sequence[str]]:
    """The config file, where the first of `words` is one, and the other words."""
    return (Path(words[0]), words[1:]) if words and not words[0].startswith("--") else (None, words)


def no_words(words: Sequence[str]) -> None:
    """For a command without settings: SgpoError where there is a word left over."""
    if words:
        raise SgpoError(f"unexpected argument {words[0]!r}")


def known_keys(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> pydantic field of every leaf."""
    keys: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            keys.update(known_keys(info.annotation, f"{prefix}{name}."))
        else:
            keys[prefix + name] = info
    return keys


def describe(schema: type[BaseModel]) -> str:
    """All knobs with type, default and meaning, for the help of a command."""
    lines = []
    for key, info in known_keys(schema).items():
        default = "required" if info.is_required() else f"default {info.default!r}"
        annotation = re.sub(r"Annotated\[(\w+), .*?\]\)\]", r"\1", str(info.annotation))
        kind = annotation.replace("typing.", "").removeprefix("<class '").removesuffix("'>")
        lines.append(f"  --{key}  ({kind}, {default})" + (f": {info.description}" if info.description else ""))
    return "\n".join(lines)


def _assign(raw: dict[str, Any], key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    for section in sections:
        child = raw.setdefault(section, {})
        if not isinstance(child, dict):
            raise SgpoError(f"option --{key}: {section!r} is not a section")
        raw = child
    raw[leaf] = value


def _nearest(schema: type[BaseModel], key: str) -> str | None:
    """The key that was meant: one that abbreviates the same words (`learning_rate`: `lr`), or the closest spelling."""
    known = list(known_keys(schema))
    initials = "".join(word[:1] for word in key.split(".")[-1].split("_"))
    same = [name for name in known if len(initials) > 1 and name.split(".")[-1] == initials]
    section = key.rpartition(".")[0]
    if same:
        return next((name for name in same if name.rpartition(".")[0] == section), same[0])
    sections = [".".join(name.split(".")[:-1]) for name in known]
    close = difflib.get_close_matches(key, [*known, *sections], n=1, cutoff=0.5)
    return close[0] if close else None


def _sentence(schema: type[BaseModel], place: str, item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    gone: dict[str, str] = getattr(schema, "gone_keys", {})
    if key in gone:
        return f"{place}: {key} {gone[key]}"
    if item["type"] == "extra_forbidden":
        close = _nearest(schema, key)
        return f"{place}: unknown key {key!r}" + (f"; did you mean {close!r}?" if close else "")
    inner = [known for known in known_keys(schema) if known.startswith(f"{key}.")]
    if item["type"] == "model_type" and inner:
        return f"{place}: {key} is a section, not a value; write --{inner[0]} VALUE, or {inner[0]} in the file"
    if item["type"] == "missing":
        return f"{place}: {key} is required"
    message = item["msg"].removeprefix("Value error, ")
    got = "" if isinstance(item["input"], dict | BaseModel) else f", got {item['input']!r}"
    return f"{place}: {key + ': ' if key else ''}{message}{got}"
