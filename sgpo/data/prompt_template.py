"""The texts around a problem, and the arguments of the chat template: from a YAML file, or with a model of ours."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from sgpo.config import Config
from sgpo.data.builtin import BUILTIN
from sgpo.types import SgpoError

TEMPLATE_FILE = "prompt_template.yaml"
"""In a run folder and in every exported model: what their prompts were made of."""

_TEXTS = ("system", "plain", "guided")
_PLACEHOLDERS = {"system": frozenset(), "plain": {"problem"}, "guided": {"problem", "strategy"}}
# A name in braces is a placeholder, except as the argument of a LaTeX command: \boxed{answer}.
_NAMED_BRACES = re.compile(r"(\\[A-Za-z]+|\})?\{([A-Za-z_]\w*)\}")


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """The texts around a problem; `system` is None where there is no system turn.

    template_kwargs: what the chat template gets beside the conversation, as {"enable_thinking": False}.
    source: where it was read, for messages.
    """

    system: str | None
    plain: str
    guided: str
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    source: str = field(default="", compare=False)

    @classmethod
    def load(cls, path: str | Path | None = None) -> PromptTemplate:
        """Reads a YAML file with the keys system, plain, guided and, if any, template_kwargs; None: the packaged
        default.

        Raises:
            SgpoError: no such file, not YAML, a key or placeholder missing or unknown.
        """
        file = Path(path) if path is not None else packaged("default")
        name = str(path or "the packaged default.yaml")
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise SgpoError(f"Cannot read the prompt template {name}: {reason}.") from error
        if not isinstance(content, dict) or set(content) - {"template_kwargs"} != set(_TEXTS):
            raise SgpoError(
                f"The prompt template {name} must have exactly the keys system, plain and guided (and template_kwargs, "
                "if the chat template needs arguments)."
            )
        for key in _TEXTS:
            _check_text(name, key, content[key])
        kwargs = content.pop("template_kwargs", None) or {}
        if not isinstance(kwargs, dict):
            raise SgpoError(f"The key 'template_kwargs' of the prompt template {name} must be a mapping.")
        return cls(**content, template_kwargs=kwargs, source=name)

    def as_yaml(self) -> str:
        """The content of a file that `load` reads back."""
        content = {**{key: getattr(self, key) for key in _TEXTS}, "template_kwargs": self.template_kwargs}
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)

    def render_plain(self, problem: str) -> str:
        """The user text of the plain context."""
        return _fill(self.plain, {"problem": problem})

    def render_guided(self, problem: str, strategy: str) -> str:
        """The user text of the context that carries a strategy."""
        return _fill(self.guided, {"problem": problem, "strategy": strategy})


def packaged(name: str) -> Path:
    """The file of a template that comes with sgpo."""
    return Path(str(files("sgpo.data"))) / "templates" / f"{name}.yaml"


def template_of(config: Config) -> PromptTemplate:
    """data.template; without it what a model of ours was trained with, or else the packaged one. On top of it
    data.template_kwargs."""
    data, brought = config.data, Path(config.model.path) / TEMPLATE_FILE
    if data.template is not None:
        template = PromptTemplate.load(data.template)
    elif brought.is_file():
        template = PromptTemplate.load(brought)
    else:
        template = PromptTemplate.load(packaged("builtin") if data.train == BUILTIN else None)
    return replace(template, template_kwargs={**template.template_kwargs, **data.template_kwargs})


def source_note(config: Config, template: PromptTemplate) -> str:
    """What to say where a model brings the template that it was trained with; "" where it brings none."""
    brought = Path(config.model.path) / TEMPLATE_FILE
    if not brought.is_file():
        return ""
    if template == PromptTemplate.load(brought):
        return f"prompts: as the model was trained, by {brought}"
    return f"prompts: not as the model was trained ({brought}), but by {template.source} and data.template_kwargs"


def _check_text(name: str, key: str, text: Any) -> None:
    if key == "system" and text is None:
        return
    if not isinstance(text, str) or not text.strip():
        raise SgpoError(f"The key {key!r} of the prompt template {name} must be a non-empty text.")
    allowed = _PLACEHOLDERS[key]
    found = {match[2] for match in _NAMED_BRACES.finditer(text) if match[2] in allowed or not match[1]}
    if missing := allowed - found:
        raise SgpoError(f"The key {key!r} of the prompt template {name} lacks {_braced(missing)}.")
    if unknown := found - allowed:
        known = _braced(allowed) if allowed else "no placeholder"
        raise SgpoError(
            f"The key {key!r} of the prompt template {name} has the unknown {_braced(unknown)}: it may have {known}."
        )


def _braced(names: Iterable[str]) -> str:
    return " and ".join(f"{{{name}}}" for name in sorted(names))


def _fill(text: str, values: dict[str, str]) -> str:
    # One pass, so that a placeholder inside a problem's own text is left alone.
    return re.sub(r"\{(" + "|".join(values) + r")\}", lambda match: values[match[1]], text)
