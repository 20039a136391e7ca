"""The questions to a strong model, from one template file, and the reading of its answers: strict, nothing is guessed.

An answer that does not have the form asked for raises `Malformed` with a reason that can be told to the model.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from sgpo.types import SgpoError

CRITERIA = ("problem_type", "strategy", "steps", "no_results")
MAX_STRATEGY_CHARS = 6000

_PLACEHOLDERS = {
    "system": frozenset(),
    "extract": {"problem", "solution"},
    "score": {"problem", "solution", "strategy"},
    "again": {"reason"},
}
_NAMES = frozenset().union(*_PLACEHOLDERS.values())
_PLACEHOLDER = re.compile(r"\{(" + "|".join(sorted(_NAMES)) + r")\}")

Messages = tuple[tuple[str, str], ...]
"""Chat turns as (role, content)."""


class Malformed(Exception):
    """The answer of a model has not the form asked for; the text says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Templates:
    """The texts of the questions; `system` None for no system turn."""

    system: str | None
    extract: str
    score: str
    again: str

    @classmethod
    def load(cls, path: str | None = None) -> Templates:
        """Reads a YAML file with exactly these keys; the packaged default where `path` is None.

        Raises:
            SgpoError: no such file, not YAML, a key or placeholder missing or out of place.
        """
        source = Path(path) if path is not None else files("sgpo.strategies") / "templates" / "default.yaml"
        name = f"strategy template {path or 'default.yaml'}"
        try:
            content: Any = yaml.safe_load(source.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise SgpoError(f"the {name} cannot be read: {' '.join(str(error).split())}") from error
        keys = [field.name for field in fields(cls)]
        if not isinstance(content, dict) or set(content) != set(keys):
            raise SgpoError(f"the {name} must have exactly the keys {', '.join(keys)}")
        for key in keys:
            _check(name, key, content[key])
        return cls(**content)

    def extraction(self, problem: str, solution: str, reason: str = "") -> Messages:
        """The question for a strategy; `reason` is what was wrong with the answer before."""
        return self._turns(_fill(self.extract, problem=problem, solution=solution), reason)

    def scoring(self, problem: str, solution: str, strategy: str, reason: str = "") -> Messages:
        """The question for the quality of a strategy; `reason` is what was wrong with the answer before."""
        return self._turns(_fill(self.score, problem=problem, solution=solution, strategy=strategy), reason)

    def _turns(self, text: str, reason: str) -> Messages:
        if reason:
            text = f"{text}\n\n{_fill(self.again, reason=reason)}"
        system = (("system", self.system),) if self.system is not None else ()
        return (*system, ("user", text))


def _check(name: str, key: str, text: Any) -> None:
    if key == "system" and text is None:
        return
    if not isinstance(text, str) or not text.strip():
        raise SgpoError(f"the {name}: {key} must be a non-empty text")
    wanted, found = _PLACEHOLDERS[key], set(_PLACEHOLDER.findall(text))
    if found != wanted:
        expected = ", ".join(f"{{{placeholder}}}" for placeholder in sorted(wanted)) or "no placeholder"
        raise SgpoError(f"the {name}: {key} must hold {expected}, got {', '.join(sorted(found)) or 'none'}")


def _fill(text: str, **values: str) -> str:
    # One pass, so that a placeholder inside a problem's own text is left alone.
    return _PLACEHOLDER.sub(lambda match: values[match[1]], text)


# ---- answers -------------------------------------------------------------------------------------------------------

_LABELS = ("Problem type", "Strategy", "Steps")
_LABEL = re.compile(
    r"^[ \t#*_]*(problem type|strategy|(?:procedural )?steps)[ \t*_]*:[ \t*_]*", re.IGNORECASE | re.MULTILINE
)
_BULLET = re.compile(r"^[ \t]*(?:[-*•]|\(?\d{1,2}[.)]|step \d{1,2}[.:])[ \t]+", re.IGNORECASE)
_FENCE = re.compile(r"^```\w*\n(.*?)\n?```$", re.DOTALL)


def parse_strategy(text: str) -> str:
    """The three parts of an answer in one canonical form: list markers become "- ", emphasis of the labels goes.

    Raises Malformed where a part is missing, empty, repeated or out of order, or text stands around them.
    """
    text = text.strip()
    if fenced := _FENCE.match(text):
        text = fenced[1].strip()
    if not text:
        raise Malformed("it was empty")
    if len(text) > MAX_STRATEGY_CHARS:
        raise Malformed(f"it had {len(text)} characters where {MAX_STRATEGY_CHARS} are allowed")
    labels = list(_LABEL.finditer(text))
    found = [match[1].lower().removeprefix("procedural ") for match in labels]
    if found != [label.lower() for label in _LABELS]:
        raise Malformed(f"it must have the three parts {', '.join(_LABELS)}, once each and in this order")
    if text[: labels[0].start()].strip():
        raise Malformed("there was text before the first part")
    kind, idea, steps = (
        text[match.end() : following].strip()
        for match, following in zip(labels, (labels[1].start(), labels[2].start(), len(text)), strict=True)
    )
    if not kind or not idea:
        raise Malformed(f"the part {_LABELS[0] if not kind else _LABELS[1]} was empty")
    bullets = "\n".join(f"- {step}" for step in _steps(steps))
    return f"{_LABELS[0]}: {_one_line(kind)}\n{_LABELS[1]}: {_one_line(idea)}\n{_LABELS[2]}:\n{bullets}"


def _steps(text: str) -> list[str]:
    steps: list[str] = []
    after_blank = False
    for line in text.splitlines():
        if match := _BULLET.match(line):
            steps.append(line[match.end() :].strip())
        elif line.strip():
            if not steps or (after_blank and not line.startswith((" ", "\t"))):
                raise Malformed("the part Steps must be a list with one step per line and nothing after it")
            steps[-1] += " " + line.strip()
        after_blank = not line.strip()
    if not steps or not all(steps):
        raise Malformed("the part Steps had no step or an empty one")
    return steps


def _one_line(text: str) -> str:
    return " ".join(text.split())


def parse_scores(text: str) -> dict[str, float]:
    """The four numbers of a judgement. Raises Malformed unless it ends with one JSON object of exactly these."""
    objects = re.findall(r"\{[^{}]*\}", text)
    if len(objects) != 1:
        raise Malformed(f"it must be one JSON object, got {len(objects)}")
    try:
        scores = json.loads(objects[0])
    except ValueError:
        raise Malformed("it was not valid JSON") from None
    if set(scores) != set(CRITERIA):
        raise Malformed(f"it must have exactly the keys {', '.join(CRITERIA)}")
    for key, value in scores.items():
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not (math.isfinite(value) and 0 <= value <= 1)
        ):
            raise Malformed(f"{key} must be a number between 0 and 1")
    return {key: float(scores[key]) for key in CRITERIA}
