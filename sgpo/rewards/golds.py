"""What a gold answer must be for a completion to reach it; looked at before a run, since a bad row only costs time."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from sgpo.rewards.answers import bare_answer
from sgpo.rewards.pool import RewardItem, RewardPool

MAX_GOLD_CHARS = 500
MAX_GOLD_WORDS = 30

_NUMBER = re.compile(r"-?(?:[0-9]{1,18}(?:\.[0-9]{1,18})?|\\[dt]?frac\{[0-9]{1,9}\}\{[1-9][0-9]{0,8}\})")
_MATH_ENDS = re.compile(r"^(?:\$\$?|\\\[|\\\()\s*|\s*(?:\$\$?|\\\]|\\\))$")
_BOX = re.compile(r"\\boxed\{[^{}]*\}")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_ENVIRONMENT = re.compile(r"\\begin\{(\w+\*?)\}.*?\\end\{\1\}", re.DOTALL)
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")

# What data sets write where they have no answer. Not here: what can be an answer, as "undefined", "no solution", "does
# not exist", "impossible", "infinite", "empty".
_PLACEHOLDER = re.compile(
    r"(?:see|refer to|as in|cf) .{1,40}|.{0,12}\b(?:proof|proofs|prove|proved|proven|qed|q e d)\b.{0,12}|"
    r"not ?(?:found|available|given|provided|applicable|specified|known)|(?:answer|solution|result)s? not \w+|"
    r"n ?/ ?a|n a n|nan|null|unknown|todo|tbd|tba|omitted|missing|placeholder|unanswerable|"
    r"no (?:final )?answer(?: \w+)?|(?:final )?(?:answer|solution|result)|answers? (?:may )?var(?:y|ies)|various|"
    r"as (?:above|below|shown|stated|desired|required)(?: .{0,20})?|left to the reader|open ended|error"
)
_NO_WORD = re.compile(r"[\s~.,;:!?()\[\]{}<>\"'`*_\\-]+")
_DASHES = re.compile(r"[\s?.…_–—-]*")
_WORKING = (
    (re.compile(r"####|<<[^<>]*>>"), "has the marks of a worked solution (#### or <<...>>)"),
    (
        re.compile(r"(?i)\b(?:answer|solution|result)\s+is\b|\b(?:therefore|thus|hence|because|so the|step 1)\b"),
        "is a sentence of a solution",
    ),
    (re.compile(r"(?:[a-z]{4}|[0-9)}$])[.!?]\s+[A-Z][a-z]*\s+[a-z]"), "is several sentences"),
)


def text_fault(gold: str) -> str | None:
    """Why no completion will end with `gold`, going by its text alone; None where nothing speaks against it."""
    if _is_placeholder(bare_answer(gold)):
        return "stands for no answer"
    if len(gold) > MAX_GOLD_CHARS:
        return f"has {len(gold)} characters, more than {MAX_GOLD_CHARS}"
    text = _MATH_ENDS.sub("", gold.strip())
    if len(_ENVIRONMENT.sub("", text).splitlines()) > 1:
        return "has several lines"
    outside = _BOX.sub("", text)
    words = len(_WORD.findall(outside))
    if words > MAX_GOLD_WORDS or (outside != text and words > 2):
        return "is the text of a solution"
    return next((fault for pattern, fault in _WORKING if pattern.search(text)), None)


def gold_faults(golds: Iterable[str], *, reward: str, workers: int, timeout_s: float) -> dict[str, str]:
    """The golds that cannot be reached, each with the reason.

    Args:
        reward: reward.kind. A function of the user's own has answers of its own, and nothing is looked at.
        workers: processes that try, for "math_verify", whether a gold can be read and equals itself; any may hang.
        timeout_s: for one gold.
    """
    if reward not in ("math_verify", "exact"):
        return {}
    golds = list(dict.fromkeys(golds))
    faults = {gold: fault for gold in golds if (fault := text_fault(gold))}
    unsure = [gold for gold in golds if gold not in faults and not _NUMBER.fullmatch(gold.strip())]
    if reward == "exact" or not unsure:
        return faults
    with RewardPool("sgpo.rewards.golds:readable", workers=workers, timeout_s=timeout_s) as pool:
        results = [pool.submit(RewardItem("", gold)) for gold in unsure]
        for gold, future in zip(unsure, results, strict=True):
            result = future.result()
            if result.status != "ok":
                faults[gold] = f"cannot be compared with itself by Math-Verify ({result.status})"
            elif not result.reward:
                faults[gold] = "cannot be read by Math-Verify"
    return faults


def readable(completion: str, gold: str, problem: str) -> float:
    """A reward for `RewardPool`: 1 where Math-Verify can read `gold`, whatever the completion."""
    from sgpo.rewards.verifier import gold_is_verifiable  # sympy is slow to import, and only the workers need it

    return float(gold_is_verifiable(gold))


def _is_placeholder(answer: str) -> bool:
    # In capitals only: na may be n times a. And \text{none} was written as an answer.
    if answer.strip() in ("NA", "N.A.") or answer.strip(" .()*").casefold() == "none":
        return True
    text = unicodedata.normalize("NFKC", _TEXT_COMMAND.sub(r"\1", answer)).casefold()
    words = " ".join(_NO_WORD.sub(" ", text).split())
    return _PLACEHOLDER.fullmatch(words) is not None or _DASHES.fullmatch(text) is not None
