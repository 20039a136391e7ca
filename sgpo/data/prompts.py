r"""The two contexts of a problem as token ids: plain, and with guidance in front of it.

plain   = [system] user(plain template)
guided  = [system] [guidance turns] user(guided template if there is a strategy, else plain template)

Both end with the same generation prompt, token for token, so that the contexts differ in the guidance alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import yaml
from jinja2.exceptions import TemplateError

from sgpo.data.problems import listing
from sgpo.types import Problem, PromptPair, SgpoError

_TEMPLATE_KEYS = ("system", "plain", "guided")
_PLACEHOLDERS = {"system": frozenset(), "plain": {"problem"}, "guided": {"problem", "strategy"}}
# A name in braces is a placeholder, except as the argument of a LaTeX command: \boxed{answer}.
_NAMED_BRACES = re.compile(r"(\\[A-Za-z]+|\})?\{([A-Za-z_]\w*)\}")


class ChatTokenizer(Protocol):
    """The part of a Hugging Face tokenizer that prompts need."""

    chat_template: Any
    eos_token_id: Any

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """The ids or the text of a conversation, as the model's own template writes it."""
        ...


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """The texts around a problem; `system` is None where there is no system turn."""

    system: str | None
    plain: str
    guided: str

    @classmethod
    def load(cls, path: str | None = None) -> PromptTemplate:
        """Reads a YAML file with the keys system, plain and guided; the packaged default where `path` is None.

        Raises:
            SgpoError: no such file, not YAML, a key or placeholder missing or unknown.
        """
        source = Path(path) if path is not None else files("sgpo.data") / "templates" / "default.yaml"
        name = str(path or "the packaged default.yaml")
        try:
            content = yaml.safe_load(source.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise SgpoError(f"Cannot read the prompt template {name}: {reason}.") from error
        if not isinstance(content, dict) or set(content) != set(_TEMPLATE_KEYS):
            raise SgpoError(f"The prompt template {name} must have exactly the keys system, plain and guided.")
        for key in _TEMPLATE_KEYS:
            _check_text(name, key, content[key])
        return cls(**content)

    def render_plain(self, problem: str) -> str:
        """The user text of the plain context."""
        return _fill(self.plain, {"problem": problem})

    def render_guided(self, problem: str, strategy: str) -> str:
        """The user text of the context that carries a strategy."""
        return _fill(self.guided, {"problem": problem, "strategy": strategy})


class PromptBuilder:
    """Turns problems into token ids with the tokenizer's chat template.

    Args:
        tokenizer: with a chat template that has a generation prompt.
        template: the texts around the problem.
        max_prompt_tokens: the longest allowed prompt, either context, in tokens.

    Attributes:
        tail: token ids of the generation prompt, with which every prompt ends.

    Raises:
        SgpoError: the tokenizer has no chat template, or the template no generation prompt.
    """

    def __init__(self, tokenizer: ChatTokenizer, template: PromptTemplate, *, max_prompt_tokens: int) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise SgpoError("The tokenizer has no chat template: use an instruction-tuned model or set chat_template.")
        self._tokenizer = tokenizer
        self._template = template
        self._max_prompt_tokens = max_prompt_tokens
        self.tail = self._generation_prompt()

    def build(self, problem: Problem) -> PromptPair:
        """The two prompts of `problem`; `guided` is None where it has no guidance.

        Raises:
            SgpoError: a prompt is too long, does not end with the generation prompt, or guidance changes nothing.
        """
        pair, complaints = self._build(problem)
        if complaints:
            raise SgpoError(f"{complaints[0]}.")
        return pair

    def check_all(self, problems: Iterable[Problem]) -> list[PromptPair]:
        """The prompts of all problems, in their order; one SgpoError that lists every bad prompt."""
        built = [self._build(problem) for problem in problems]
        complaints = [complaint for _, found in built for complaint in found]
        if complaints:
            raise SgpoError(listing(f"{len(complaints)} prompts cannot be used; remove or change them", complaints))
        return [pair for pair, _ in built]

    def _build(self, problem: Problem) -> tuple[PromptPair, list[str]]:
        plain = self._encode(self._conversation(problem, guided=False))
        complaints = self._complaints(problem.id, "plain", plain)
        if not problem.has_guidance:
            return PromptPair(plain, None), complaints
        guided = self._encode(self._conversation(problem, guided=True))
        complaints += self._complaints(problem.id, "guided", guided)
        if guided == plain:
            complaints.append(f"Problem {problem.id!r}: its guidance changes nothing in the guided prompt")
        return PromptPair(plain, guided), complaints

    def _complaints(self, problem_id: str, context: str, ids: tuple[int, ...]) -> list[str]:
        complaints = []
        if len(ids) > self._max_prompt_tokens:
            complaints.append(
                f"Problem {problem_id!r}: the {context} prompt has {len(ids)} tokens, "
                f"more than max_prompt_tokens = {self._max_prompt_tokens}"
            )
        if ids[-len(self.tail) :] != self.tail:
            complaints.append(
                f"Problem {problem_id!r}: the {context} prompt does not end with the generation prompt of the "
                "tokenizer's chat template, so the two contexts would differ in more than the guidance"
            )
        return complaints

    def _conversation(self, problem: Problem, *, guided: bool) -> list[dict[str, str]]:
        turns = [(turn.role, turn.content) for turn in problem.guidance_turns] if guided else []
        if guided and problem.strategy:
            last = self._template.render_guided(problem.problem, problem.strategy)
        else:
            last = self._template.render_plain(problem.problem)
        return self._with_system([*turns, ("user", last)])

    def _with_system(self, turns: list[tuple[str, str]]) -> list[dict[str, str]]:
        system = [("system", self._template.system)] if self._template.system is not None else []
        return [{"role": role, "content": content} for role, content in [*system, *turns]]

    def _encode(self, conversation: list[dict[str, str]], *, generation_prompt: bool = True) -> tuple[int, ...]:
        try:
            ids = self._tokenizer.apply_chat_template(
                conversation, tokenize=True, add_generation_prompt=generation_prompt, return_dict=False
            )
        except TemplateError as error:
            raise SgpoError(
                f"The tokenizer's chat template refuses the conversation ({error}): "
                "where it has no system role, set system: null in the prompt template."
            ) from error
        return tuple(ids)

    def _generation_prompt(self) -> tuple[int, ...]:
        probe = self._with_system([("user", "1")])
        without = self._encode(probe, generation_prompt=False)
        ids = self._encode(probe)
        if len(ids) <= len(without) or ids[: len(without)] != without:
            raise SgpoError(
                "The tokenizer's chat template has no generation prompt (add_generation_prompt adds nothing after the "
                "last user turn): use a template that opens the assistant's turn."
            )
        return ids[len(without) :]


def eos_token_ids(tokenizer: ChatTokenizer, generation_config_eos: int | Sequence[int] | None) -> tuple[int, ...]:
    """All ids that end a completion, without repeats: the tokenizer's EOS, then those of the generation config.

    Raises:
        SgpoError: neither names an EOS.
    """
    from_config = [generation_config_eos] if isinstance(generation_config_eos, int) else generation_config_eos or ()
    candidates = [tokenizer.eos_token_id, *from_config]
    ids = tuple(dict.fromkeys(eos for eos in candidates if eos is not None))
    if not ids:
        raise SgpoError(
            "Neither the tokenizer nor the generation config names an EOS token: set eos_token or eos_token_id."
        )
    return ids


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
