"""The tokenizer's chat template: a conversation as text and as token ids, and what it puts behind the last user turn.

Chat templates are programs of other people. What this file relies on is looked up in what they render: where the
assistant's turn begins, whether a turn's text is still there, whether today's date is in the prompt.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import takewhile
from typing import Any, Literal, Protocol

from jinja2.exceptions import TemplateError

from sgpo.types import SgpoError

Turns = Sequence[tuple[str, str]]
"""(role, content) of a conversation."""

TODAY = datetime(2024, 7, 26)
"""The day that a chat template is told: the same at every start, or a run could not be resumed and two evaluations not
be compared. It is the one that Llama's templates write where they have no clock."""

# What a template may raise on a conversation that it was not written for.
_FAULTS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
# Texts of the probes: different ends, so that what all prompts end with is the template's; nothing that a template
# would trim, escape or write in another case.
_PROBES = ("what is one more than 1", "what is one more than x", "tell what is one more than 1.")
_ANSWER = "certainly it is 2"


class ChatTokenizer(Protocol):
    """The part of a Hugging Face tokenizer that prompts need."""

    chat_template: Any
    eos_token_id: Any

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """The ids or the text of a conversation, as the model's own template writes it."""
        ...

    def encode(self, text: Any, **options: Any) -> Any:
        """The ids of a text."""
        ...


class ChatFormat:
    """A tokenizer's chat template, checked.

    Args:
        tokenizer: with a chat template.
        kwargs: what the template gets beside the conversation.
        system: the system turn of every conversation; None: no such turn.

    Attributes:
        name: of the tokenizer, for messages.
        tail: token ids that every prompt ends with, whatever its last user turn is: the opening of the answer.
        tail_text: all that stands behind the last user text. `tail` may lack a part of its beginning, which some
            tokenizers merge with the end of the user text.
        notes: what the user should know of the template.

    Raises:
        SgpoError: no chat template, one that opens no assistant turn, ends with EOS, loses the user's text, refuses the
            system turn, or knows nothing of one of `kwargs`.
    """

    def __init__(self, tokenizer: ChatTokenizer, kwargs: Mapping[str, Any], *, system: str | None) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise SgpoError("The tokenizer has no chat template: use an instruction-tuned model or set chat_template.")
        self.name = str(getattr(tokenizer, "name_or_path", "")) or "the tokenizer"
        self.notes: list[str] = []
        self._tokenizer = tokenizer
        self._kwargs = dict(kwargs)
        self._system = [("system", system)] if system is not None else []
        self._check_names()
        self._hold_the_clock()
        self.tail_text, self.tail = self._find_tail()
        self._check_opening()

    def text(self, turns: Turns, *, generation_prompt: bool = True) -> str:
        """The prompt as text. Raises SgpoError where the template refuses the conversation."""
        return self._apply(turns, tokenize=False, add_generation_prompt=generation_prompt)

    def ids(self, turns: Turns) -> tuple[int, ...]:
        """The prompt as token ids."""
        return tuple(self._apply(turns, tokenize=True, add_generation_prompt=True, return_dict=False))

    def _apply(self, turns: Turns, **options: Any) -> Any:
        conversation = [{"role": role, "content": content} for role, content in turns]
        try:
            return self._tokenizer.apply_chat_template(conversation, **{**self._kwargs, **options})
        except _FAULTS as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise SgpoError(
                f"The chat template of {self.name} refuses the conversation ({reason}){self._way_out()}"
            ) from error

    def _way_out(self) -> str:
        """What helps against a refusal: no system turn, if one user turn alone is taken."""
        if not self._system:
            return "."
        system, self._system = self._system, []
        try:
            helps = _PROBES[0] in self._apply([("user", _PROBES[0])], tokenize=False, add_generation_prompt=True)
        except SgpoError:
            helps = False
        self._system = system
        return ": where it has no system role, set system: null in the prompt template." if helps else "."

    def _check_names(self) -> None:
        source = str(self._tokenizer.chat_template)
        if unknown := [name for name in self._kwargs if name not in source]:
            raise SgpoError(
                f"The chat template of {self.name} knows nothing of {', '.join(unknown)}: correct or remove it in "
                "data.template_kwargs."
            )

    def _hold_the_clock(self) -> None:
        """What asks for the time always gets TODAY; a note where a prompt shows it."""
        if "strftime_now" not in str(self._tokenizer.chat_template):
            return
        turns = [*self._system, ("user", _PROBES[0])]
        days = [TODAY, datetime(2031, 1, 2)]
        first, second = (self._apply(turns, tokenize=False, strftime_now=day.strftime) for day in days)
        self._kwargs["strftime_now"] = TODAY.strftime
        if first != second:
            self.notes.append(
                f"The chat template of {self.name} writes the date into the prompt; it is always told {TODAY:%d %b %Y}"
                ", so that runs can be resumed and evaluations compared (where the template takes a date_string, "
                "data.template_kwargs can set it)"
            )

    def _find_tail(self) -> tuple[str, tuple[int, ...]]:
        conversations = [[*self._system, ("user", probe)] for probe in _PROBES]
        texts = [self.text(turns) for turns in conversations]
        if any(probe not in text for probe, text in zip(_PROBES, texts, strict=True)):
            raise SgpoError(
                f"The chat template of {self.name} leaves out the user's text or changes it (those of image-text "
                "models expect another form): use one for plain text."
            )
        ends = [text.rpartition(probe)[2] for probe, text in zip(_PROBES, texts, strict=True)]
        tail_text = "".join(_common_end(ends))
        ids = [self.ids(turns) for turns in conversations]
        bos = getattr(self._tokenizer, "bos_token_id", None)
        if bos is not None and ids[0][:2] == (bos, bos):
            self.notes.append(f"The chat template of {self.name} begins every prompt with BOS twice")
        longest = len(self._tokenizer.encode(tail_text, add_special_tokens=False))
        return tail_text, tuple(_common_end(ids)[-longest:]) if longest else ()

    def _check_opening(self) -> None:
        """That the tail opens the answer: the template's generation prompt says so, or else an answer that follows in a
        whole conversation begins right there (Mistral's `[/INST]`)."""
        turns = [*self._system, ("user", _PROBES[0])]
        opened = self._before_answer(turns)
        adds_nothing = self.text(turns, generation_prompt=False) == self.text(turns)
        if adds_nothing and (not self.tail_text.strip() or opened is None or opened.strip() != self.tail_text.strip()):
            raise SgpoError(
                f"The chat template of {self.name} has no generation prompt (add_generation_prompt adds nothing after "
                "the last user turn): use a template that opens the assistant's turn."
            )
        eos = getattr(self._tokenizer, "eos_token", None)
        if eos and self.tail_text.rstrip().endswith(eos) and not (opened or "").rstrip().endswith(eos):
            raise SgpoError(
                f"The chat template of {self.name} ends a prompt with {eos}, which ends the answer before it begins: "
                "use a template that opens the assistant's turn."
            )

    def _before_answer(self, turns: Turns) -> str | None:
        """What stands between the user's text and the answer in a whole conversation; None where there is none."""
        try:
            whole = self.text([*turns, ("assistant", _ANSWER)], generation_prompt=False)
        except SgpoError:
            return None
        before, found, _ = whole.rpartition(_ANSWER)
        return before.rpartition(_PROBES[0])[2] if found else None


Presence = Literal["whole", "changed", "lost"]


def presence_of(content: str, text: str) -> Presence:
    """Whether a turn's text is in the prompt: as it stands (but for white space at its ends), in another case, spacing
    or escape (HTML, JSON), or not at all."""
    content = content.strip()
    if content in text:
        return "whole"
    return "changed" if _bare(content) in _bare(text) or json.dumps(content)[1:-1] in text else "lost"


def _bare(text: str) -> str:
    return " ".join(html.unescape(text).casefold().split())


def _common_end(sequences: Sequence[Sequence[Any]]) -> list[Any]:
    columns = zip(*(reversed(sequence) for sequence in sequences), strict=False)
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)][::-1]
