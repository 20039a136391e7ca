r"""Where a completion's thinking ends: only what comes after it is an answer. Plain text functions, linear in the text.

A marker is a tag that names thinking: `<think>`, `[THINK]`, `<seed:think>`, `<|START_THINKING|>`, `</reasoning>`,
`<|begin_of_thought|>`; a few families write theirs in another way (`_OTHER_FORMS`). What opens is closed by its own
kind only: a completion that ends inside a thought has no answer, whatever stands in a box there.
"""

from __future__ import annotations

import re

_THINKING = re.compile(r"think|thought|reason|scratchpad|monologue|\b(?:analysis|cot|reflection)\b")
_OPENING_WORDS = frozenset(("begin", "start", "open", "of"))
_CLOSING_WORDS = frozenset(("end", "stop", "close"))

# How they open, how they close. The pieces that are tokens of their own are in `_PIECES`.
_OTHER_FORMS = (
    (
        r"<\|channel\|>(?!final\b)\w+",
        r"<\|channel\|>final\b(?:[^\n]{0,80}?<\|message\|>)?",
    ),  # gpt-oss: every channel but the final one
    (r"<\|channel>thought", r"<channel\|>"),  # Gemma 4
    (r"<\|open\|>think<\|sep\|>", r"<\|close\|>think<\|sep\|>"),  # Kimi K3
    (r"<unused94>thought", r"<unused95>"),  # MedGemma
    (r"\[unused16\]", r"\[unused17\]"),  # openPangu
    (r"<\|inner_prefix\|>", r"<\|inner_suffix\|>"),  # Apertus
    (r"<\|im_start\|>think\b", r"<\|im_start\|>answer\b"),  # s1
    (r"^Here are my reasoning steps:", r"\[BEGIN FINAL RESPONSE\]"),  # Apriel
    (r"^Here is my thought process:", r"^Here is my response:"),  # Granite 3.2
)
_PIECES = frozenset(
    (
        *("<|channel|>", "<|message|>", "<|channel>", "<channel|>", "<|open|>", "<|close|>", "<|sep|>"),
        *("<unused94>", "<unused95>", "[unused16]", "[unused17]", "<|inner_prefix|>", "<|inner_suffix|>"),
        *("<|im_start|>", "[BEGIN FINAL RESPONSE]"),
    )
)

_TAG = (
    r"<(?P<angle>\|?/?[\w:|]{1,60})(?:[ \t]+\w+=[^<>\n]{0,80})?[ \t]*>"
    r"|\[(?P<square>/?\w{1,60})\]|◁(?P<triangle>/?\w{1,40})▷"
)
_MARKER = re.compile(
    "|".join([*(f"(?P<open{i}>{a})|(?P<close{i}>{b})" for i, (a, b) in enumerate(_OTHER_FORMS)), _TAG]), re.MULTILINE
)
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")

# A marker that a sentence speaks of: a word before it and the sentence going on behind it, or the marker in quotes.
_SENTENCE_BEFORE = re.compile(r"[^\W_],?[ \t]+[\"'`“(]*\Z")
_SENTENCE_AFTER = re.compile(r"[\"'`”)]*(?:[ \t]+[^\W\d_]|[-.,;:!?)])")
_QUOTES = {"`": "`", '"': '"', "'": "'", "“": "”"}


def after_thinking(completion: str) -> str | None:
    r"""The text after the last end of thinking; the whole text where nothing was thought; None where it never ended.

    A marker that a sentence only speaks of, once thinking is over and the answer is in its box, changes nothing:
    `\boxed{5}. Note: I wrote my <think> above.`
    """
    last_box = max((match.start() for match in _BOX.finditer(completion)), default=-1)
    start, thought, seen = 0, None, False
    for match in _MARKER.finditer(completion):
        if (kind := _kind(match)) is None:
            continue
        name, closes = kind
        # The first marker of all may close what the prompt opened, so it must not be taken for talk.
        is_talk = start <= last_box < match.start() and (seen or not closes) and _in_a_sentence(completion, match)
        if thought is None and not is_talk:
            start, thought = (match.end(), None) if closes else (start, name)
        elif closes and name == thought:
            start, thought = match.end(), None
        seen = True
    return completion[start:] if thought is None else None


def open_thinking(tail: str) -> str:
    """What of `tail`, the end of a prompt, leaves thinking open: from the marker on; "" where it opens none."""
    begin, thought = 0, None
    for match in _MARKER.finditer(tail):
        if (kind := _kind(match)) is None:
            continue
        name, closes = kind
        if thought is None and not closes:
            begin, thought = match.start(), name
        elif closes and name == thought:
            thought = None
    return "" if thought is None else tail[begin:]


def thinking_of(tail: str) -> str:
    """`tail` from its first marker on, which it may close again; "" where it has none."""
    starts = [match.start() for match in _MARKER.finditer(tail) if _kind(match)]
    return tail[starts[0] :] if starts else ""


def begins_thinking(text: str) -> bool:
    """Whether the first thing in `text` is a marker that opens thinking."""
    match = _MARKER.match(text.lstrip())
    return match is not None and (kind := _kind(match)) is not None and not kind[1]


def is_marker_token(token: str) -> bool:
    """Whether a special token is a marker or a piece of one, so that it must be seen by `after_thinking`."""
    match = _MARKER.fullmatch(token)
    return token in _PIECES or (match is not None and _kind(match) is not None)


def _kind(match: re.Match[str]) -> tuple[str, bool] | None:
    """What the marker opens or closes, and whether it closes; None for a tag about something else."""
    group = match.lastgroup or ""
    if group.startswith(("open", "close")):
        return group.removeprefix("open").removeprefix("close"), group.startswith("close")
    tag = match[group].lower()
    words = re.findall(r"[a-z]+", tag)
    if not _THINKING.search(" ".join(words)):
        return None
    closes = tag.lstrip("|").startswith("/") or not _CLOSING_WORDS.isdisjoint(words)
    return " ".join(word for word in words if word not in _OPENING_WORDS | _CLOSING_WORDS), closes


def _in_a_sentence(text: str, match: re.Match[str]) -> bool:
    before, after = text[max(0, match.start() - 12) : match.start()], text[match.end() : match.end() + 12]
    if before and after and _QUOTES.get(before[-1]) == after[0]:
        return True
    return bool(_SENTENCE_BEFORE.search(before) and _SENTENCE_AFTER.match(after))
