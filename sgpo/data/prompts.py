r"""The two contexts of a problem as token ids: plain, and with guidance in front of it.

plain   = [system] user(plain template)
guided  = [system] [guidance turns] user(guided template if there is a strategy, else plain template)

Both end with the same opening of the answer, so that the contexts differ in the guidance alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from sgpo.data.chat_format import ChatFormat, ChatTokenizer, Turns, presence_of
from sgpo.data.problems import listing
from sgpo.data.prompt_template import PromptTemplate
from sgpo.types import Problem, PromptPair, SgpoError

Context = Literal["plain", "guided"]


@dataclass(slots=True)
class _Built:
    """The prompts of a problem, why they cannot be used, and which of its turns are not whole in them."""

    plain: tuple[int, ...] = ()
    guided: tuple[int, ...] | None = None
    complaints: list[str] = field(default_factory=list)
    losses: list[tuple[str, str]] = field(default_factory=list)  # what happened, and the text


class PromptBuilder:
    """Turns problems into token ids with the tokenizer's chat template.

    Args:
        tokenizer: with a chat template that opens the assistant's turn.
        template: the texts around the problem, and the chat template's arguments.
        max_prompt_tokens: the longest allowed prompt, either context, in tokens.

    Attributes:
        tail: token ids of the opening of the answer, with which every prompt ends.
        tail_text: the same as text, from the end of the user's text on.
        notes: what the user should know of the prompts; `check_all` adds to it.

    Raises:
        SgpoError: the tokenizer has no chat template, or one that cannot be used (see `ChatFormat`).
    """

    def __init__(self, tokenizer: ChatTokenizer, template: PromptTemplate, *, max_prompt_tokens: int) -> None:
        self._format = ChatFormat(tokenizer, template.template_kwargs, system=template.system)
        self._template = template
        self._max_prompt_tokens = max_prompt_tokens
        self.tail = self._format.tail
        self.tail_text = self._format.tail_text
        self.notes = self._format.notes

    def build(self, problem: Problem) -> PromptPair:
        """The two prompts of `problem`; `guided` is None where it has no guidance.

        Raises:
            SgpoError: a prompt is too long, lacks the problem's text, does not end with the opening of the answer, or
                guidance changes nothing.
        """
        built = self._build(problem)
        if built.complaints:
            raise SgpoError(f"{built.complaints[0]}.")
        return PromptPair(built.plain, built.guided)

    def check_all(self, problems: Iterable[Problem]) -> list[PromptPair]:
        """The prompts of all problems, in their order; one SgpoError that lists every bad prompt."""
        found = [(problem, self._build(problem)) for problem in problems]
        complaints = [complaint for _, built in found for complaint in built.complaints]
        if complaints:
            raise SgpoError(listing(f"{len(complaints)} prompts cannot be used; remove or change them", complaints))
        losses: dict[str, list[tuple[str, str]]] = {}
        for problem, built in found:
            for what, text in built.losses:
                losses.setdefault(what, []).append((problem.id, text))
        for what, where in losses.items():
            name, text = where[0]
            self.notes.append(
                f"In {len(where)} of {len(found)} problems (first {name!r}) {what} by the chat template of "
                f"{self._format.name}: {' '.join(text.split())[:80]!r}"
            )
        return [PromptPair(built.plain, built.guided) for _, built in found]

    def _build(self, problem: Problem) -> _Built:
        built = _Built()
        built.plain = self._encode(problem, "plain", built)
        if problem.has_guidance:
            built.guided = self._encode(problem, "guided", built)
            if built.guided == built.plain:
                built.complaints.append(f"Problem {problem.id!r}: its guidance changes nothing in the guided prompt")
        return built

    def _encode(self, problem: Problem, context: Context, built: _Built) -> tuple[int, ...]:
        """The token ids of one context; what is wrong with it goes into `built`."""
        turns = self._turns(problem, guided=context == "guided")
        try:
            text, ids = self._format.text(turns), self._format.ids(turns)
        except SgpoError as error:
            built.complaints.append(f"Problem {problem.id!r}, {context} prompt: {str(error).rstrip('.')}")
            return ()
        if len(ids) > self._max_prompt_tokens:
            built.complaints.append(
                f"Problem {problem.id!r}: the {context} prompt has {len(ids)} tokens, "
                f"more than max_prompt_tokens = {self._max_prompt_tokens}"
            )
        if not text.endswith(self.tail_text):
            built.complaints.append(
                f"Problem {problem.id!r}: the {context} prompt does not end with the generation prompt of the "
                "tokenizer's chat template, so the two contexts would differ in more than the guidance"
            )
        self._look_for_losses(problem, context, turns, text, built)
        return ids

    def _look_for_losses(self, problem: Problem, context: Context, turns: Turns, text: str, built: _Built) -> None:
        if presence_of(problem.problem, text) == "lost":
            built.complaints.append(
                f"Problem {problem.id!r}: its text is not in the {context} prompt, the chat template of "
                f"{self._format.name} drops it"
            )
            return
        names = ["the system turn" if role == "system" else f"the guidance turn of the {role}" for role, _ in turns]
        names[-1] = "the text around the problem"
        for name, (_, content) in zip(names, turns, strict=True):
            if (presence := presence_of(content, text)) != "whole":
                loss = (f"{name} is {'changed' if presence == 'changed' else 'left out in part or whole'}", content)
                if loss not in built.losses:
                    built.losses.append(loss)

    def _turns(self, problem: Problem, *, guided: bool) -> Turns:
        system = [("system", self._template.system)] if self._template.system is not None else []
        guidance = [(turn.role, turn.content) for turn in problem.guidance_turns] if guided else []
        if guided and problem.strategy:
            last = self._template.render_guided(problem.problem, problem.strategy)
        else:
            last = self._template.render_plain(problem.problem)
        return [*system, *guidance, ("user", last)]


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
