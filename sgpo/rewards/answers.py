r"""Finds the final answer in a completion: plain text functions, linear in the length of the text.

Linear matters: they run in the trainer's own process, on whatever the policy wrote, so nothing here may backtrack or
recurse (100,000 open braces are just text).
"""

from __future__ import annotations

import re
import string

from sgpo.rewards.thinking import after_thinking

_MATH_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))

_PLAIN = r"(?:[^\s${}\\]|\\(?!boxed|fbox)[^\s{}])"  # a character or escape of a bare answer

# Order matters: a double backslash is a line break and does not escape what follows, yet models that imitate a
# program's string write `\\boxed{5}` and mean the box.
_TOKEN = re.compile(
    r"\\(?:boxed|fbox)\s*(?P<open>\{)"
    rf"|\\(?:boxed|fbox)[ \t]+(?P<bare>(?:{_PLAIN}|\{{{_PLAIN}*\}})+)"
    r"|\\\\(?!boxed|fbox)"
    r"|\\[{}]"
    r"|\{|\}"  # not [{}]: only where every branch starts with a literal can re skip plain text fast
)


def last_boxed(text: str) -> str | None:
    r"""The stripped content of the last complete, non-empty `\boxed{...}` or `\fbox{...}`, or of a bare `\boxed 5`.

    "Last" is the box that begins last, so of two nested boxes it is the inner one. Escaped braces do not count.
    """
    best_start, best = -1, None
    open_braces: list[re.Match[str] | None] = []  # the box that opened the brace, None for a brace of its own
    for token in _TOKEN.finditer(text):
        box = None
        if token["open"]:
            open_braces.append(token)
        elif token["bare"]:
            box = token
        elif token.group() == "{":
            open_braces.append(None)
        elif token.group() == "}" and open_braces:
            box = open_braces.pop()
        if box is None or box.start() < best_start:
            continue
        content = box["bare"].rstrip(".,;:") if box["bare"] else text[box.end() : token.start()].lstrip()
        content = content.rstrip(string.whitespace + "\\")  # a final `\ ` must not escape the brace put around it
        if content:
            best_start, best = box.start(), content
    return best


def wrap_boxed(answer: str) -> str:
    r"""`\boxed{answer}`: the one form that Math-Verify reads as a single answer (bare `3\sqrt{13}` reads as 3)."""
    return "\\boxed{" + answer + "}"


def condense(completion: str, require_box: bool = True) -> str:
    r"""The shortest text with the same reward: the last box after the thinking, re-wrapped; "" means no answer.

    Earlier boxes must go, because Math-Verify merges all boxes into one set. Without `require_box` a completion that
    has no box is represented by its whole text after the thinking. Idempotent.
    """
    text = after_thinking(completion)
    if text is None:
        return ""
    answer = last_boxed(text)
    if answer is not None:
        return wrap_boxed(answer)
    return "" if require_box else text


def bare_answer(gold: str) -> str:
    r"""The gold answer without an enclosing `\boxed{}` or math delimiters, stripped."""
    answer = last_boxed(gold) or gold.strip()
    for begin, end in _MATH_DELIMITERS:
        inner = answer[len(begin) : -len(end)]
        if answer.startswith(begin) and answer.endswith(end) and inner.strip() and begin not in inner:
            return inner.strip()
    return answer


def normalised(answer: str) -> str:
    """The answer for comparison as a string: no math delimiters, no white space, no final full stop."""
    return "".join(bare_answer(answer).split()).removesuffix(".")
