"""What a step is for, out of the words around its mark: "how many clips she sold in May"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from sgpo.strategies.calculator_marks import CARDINALS, FACTORS, NUM, Mark, has_number, split_words, value_of
from sgpo.strategies.calculator_names import NP_STOP, is_plural

_UNITS = split_words("kg km cm mm m g lb lbs oz ml l mph ft sq percent fruit money water time food pizza")
_DIMENSIONS = split_words("old tall long wide deep high older taller longer shorter younger farther faster")
_LEADS = re.compile(
    r"^(?:\s|[-*•]|(?:so|then|thus|hence|therefore|now|next|also|finally|and|but|first|firstly|second|secondly|lastly|"
    r"meanwhile|this means(?: that)?|that means(?: that)?|we know that|accordingly|however|initially|"
    r"as a result|right now|in all|overall|consequently|in conclusion|afterwards?)\b[ ,:]*)+",
    re.IGNORECASE,
)
_TOGETHER = re.compile(r"\b(?:in total|altogether|together|combined|in all)\b,?\s*", re.IGNORECASE)
_CLAUSE = re.compile(
    r",\s+|;\s*|\b(?:which )?means(?: that)?\b|\bmeaning(?: that)?\b|\bso(?: that)?\b|\bthen\b|\bthus\b"
)
_TOTAL_OF = re.compile(
    r"\b(?:for |giving |makes |make |is |are )?(?:an?|the|his|her|their) (?:grand |combined )?total of$"
)
_COPULA = re.compile(
    r"\s*\b(?:is|are|was|were|be|will be|would be|equals|becomes|came to|comes to|is equal to|of)$|:$|=$"
)
_PRONOUN = re.compile(
    r"^(?:this|that|it|which|these|those|that['’]s|it['’]s|i\.e\.?|he|she|they|we|and|or|by|for)\b", re.IGNORECASE
)
_HEADED = re.compile(
    r"^(?:the|an?|his|her|their|its|my|our|your|each|every|all|both|total|[A-Z]?\w+['’]s?)\s", re.IGNORECASE
)
_VERB = split_words(
    "is are was were be been has have had cost costs spent spend spends need needs made make makes bought buy "
    "buys paid pay pays take takes took sold sell sells got get gets ate eat eats earn earns used use uses read "
    "reads received receive receives weigh weighs save saves gave give gives saw sees see leave leaves left "
    "caught catch catches pick picks drink drinks drank walk walks won win wins lost lose loses run runs ran "
    "reads write writes wrote drive drives drove work works produce produces contain contains keep keeps kept "
    "bring brings brought bake bakes travel travels score scores collect collects plant plants found find finds "
    "sleep sleeps slept swim swims swam grow grows grew add adds build builds built carry carries charge charges "
    "consume consumes put puts hold holds held want wants watch watches share shares donate donates draw draws "
    "drew feed feeds fed fill fills go goes went lay lays live lives lived play plays ride rides rode send sends "
    "sent sing sings start starts teach teaches throw throws threw wear wears order orders print prints pass "
    "passes practice practices solve solves study studies do does did jump jumps complete completes burn burns "
    "owe owes require requires perform performs type types"
)
_CUT = re.compile(
    r"[.;:!?,()=*+]|\bbecause\b|\bso\b|\bwhich\b|\bsince\b|\band (?=he|she|they|the|his|her|their|then)|\s[-–/x]\s|\$"
)


def goal_of(mark: Mark, *, is_last: bool) -> str | None:
    """What a mark computes, as an object of "find": "how many clips she sold in May", or None."""
    lead, after = _main_clause(mark)
    noun, rest = _object(after)
    candidates = [_question(lead, noun, rest, mark.is_money)]
    if is_last and not rest:
        candidates.append("what the question asks for")
    candidates.append(_quantity(noun, rest, mark.is_money))
    for candidate in candidates:
        phrase = _without_numbers(candidate) if candidate else None
        if phrase and 2 <= len(phrase.split()) <= 26:
            return phrase
    return None


def short_name_of(mark: Mark) -> str:
    """A short name for the value of a mark, for the steps that use it."""
    lead, after = _main_clause(mark)
    noun, _ = _object(after)
    phrase = "the amount of money" if mark.is_money else f"the number of {noun.removeprefix('more ')}" if noun else None
    if phrase is None and _HEADED.match(lead) and (copula := _COPULA.search(lead)):
        phrase = _lower_first(lead[: copula.start()])
    phrase = _without_numbers(phrase) if phrase else None
    return phrase if phrase and len(phrase.split()) <= 8 and "," not in phrase else "the result"


def _main_clause(mark: Mark) -> tuple[str, str]:
    """The words in front of the value and behind it, where "X is 9 because <<...>>9" has them before the mark."""
    lead, after = mark.before.strip(), mark.after
    reason = re.search(r"\b(?:because|since|as)$", lead)
    if reason and mark.value is not None:
        for number in re.finditer(NUM, lead):
            if value_of(number[0]) == mark.value:
                return _clause(lead[: number.start()].rstrip(" $")), lead[number.end() : reason.start()]
        return "", ""
    return _clause(lead), after


def _clause(lead: str) -> str:
    """The last clause, without what leads to it; a leading "In total" moves to its end."""
    together = _TOGETHER.match(_LEADS.sub("", lead))
    parts = [part for part in _CLAUSE.split(lead) if part and part.strip()]
    if not parts:
        return ""
    opening = _LEADS.sub("", lead)
    is_list = re.match(r"(?:and|or)\b", parts[-1].strip()) and not re.match(r"(?:since|if|after|when)\b", opening, re.I)
    clause = _LEADS.sub("", opening if is_list else parts[-1]).strip()
    clause = _TOGETHER.sub("", clause, count=1) if together and _TOGETHER.match(clause) else clause
    asked = re.search(r"\b(?:find|calculate|determine|compute|figure out)\b (?:out )?(.*?):?$", clause)
    if asked:
        return f"find {asked[1]}"
    return f"{clause}|in total" if together else clause


def _object(after: str) -> tuple[str, str]:
    """What is counted and the words that follow: " clips in May." gives ("clips", "in May")."""
    words = _CUT.split(after.strip(), maxsplit=1)[0].split()
    start = 1 if words[:1] == ["more"] and len(words) > 1 else 0
    stop = start
    while stop < len(words) and words[stop].lower() not in NP_STOP:
        stop += 1
        if is_plural(words[stop - 1]):
            break
    if stop == start or (not is_plural(words[stop - 1]) and words[stop - 1].lower() not in _UNITS):
        return "", " ".join(words)
    stop += _extension(words[stop:])
    return " ".join(words[:stop]), " ".join(words[stop:])


def _extension(words: Sequence[str]) -> int:
    """How many words still belong to the counted noun before them: "of sugar", "and nieces", "old"."""
    if words[:1] == ["of"] and words[1:2] and words[1].lower() not in NP_STOP:
        return next((i for i, word in enumerate(words) if i and word.lower() in NP_STOP), len(words))
    if words[:1] in (["and"], ["or"]) and len(words) > 1 and is_plural(words[1]):
        return 2
    return int(bool(words) and words[0].lower() in _DIMENSIONS)


def _question(lead: str, noun: str, rest: str, is_money: bool) -> str | None:
    lead, _, together = lead.partition("|")
    lead = re.sub(r"\s+(?:another|an additional|additional|an extra|extra|an?|the|only|about|x)$", "", lead)
    if lead.startswith("find "):
        return lead.removeprefix("find ").strip()
    tail = " ".join(part for part in (rest, together) if part)
    if total := _TOTAL_OF.search(lead):
        subject = lead[: total.start()].strip(" ,")
        if not _has_verb(subject):
            return None
        return _how_many(subject, noun, f"{tail} in total".strip(), is_money)
    copula = _COPULA.search(lead)
    if copula and _HEADED.match(lead) and not _PRONOUN.match(lead):
        subject = re.sub(r"^[Tt]otal\b", "the total", _lower_first(lead[: copula.start()].strip()))
        if noun.startswith("years old"):
            return f"how old {subject} {copula[0].strip()} {tail}".strip()
        if copula[0].strip() in (":", "=") or len(noun.split()) <= 1 or is_money:
            return None if copula[0].strip() == "of" else f"{subject} {tail}".strip()
    if not _has_verb(lead) or re.match(r"(?:this|that|it|which|these|those|that['’]s)\b", lead, re.IGNORECASE):
        return None
    if noun.startswith("years old"):
        return f"how old {_lower_first(lead)} {tail}".strip()
    return _how_many(lead, noun, tail, is_money)


def _how_many(subject: str, noun: str, rest: str, is_money: bool) -> str:
    amount = "how much money" if is_money else f"how many {noun}" if noun else "how much"
    return f"{amount} {_lower_first(subject)} {rest}".strip()


def _quantity(noun: str, rest: str, is_money: bool) -> str | None:
    if noun and rest.split(" ")[0] in _VERB:
        return f"how many {noun} {rest}"
    if is_money:
        return f"the amount of money {rest}".strip()
    return f"the number of {noun} {rest}".strip() if noun else None


def _has_verb(text: str) -> bool:
    """Whether the text is a clause: a verb after the first word, and no loose end."""
    words = re.findall(r"[A-Za-z'’]+", text.lower())
    if not 1 < len(words) <= 16 or words[-1] in _LOOSE_ENDS:
        return False
    pairs = list(pairwise(words))
    ends_in_s = re.fullmatch(r"[a-z]+[^s'’]s", words[-1]) and pairs[-1][0] not in _ARTICLES
    if ends_in_s or re.search(r"['’](?:ll|ve|d|re)\b", text):
        return True
    return any(
        word in _VERB or (word.endswith("ed") and len(word) > 4 and before not in _ARTICLES) for before, word in pairs
    )


_FRONT_WORDS = split_words(
    "the a an he she they it we you i his her their its my our your this that these those there each every all "
    "both if when after before in at on for since with by to from and as per total during together"
)
_ARTICLES = split_words("the a an his her its their my our your total of and these those same")
_LOOSE_ENDS = split_words("and or because since as if that which of than but so the a an total")


def _lower_first(text: str) -> str:
    first, space, rest = text.strip().partition(" ")
    return f"{first.lower() if first.lower() in _FRONT_WORDS else first}{space}{rest}"


def _without_numbers(phrase: str) -> str | None:
    """The phrase with its numbers paraphrased, or None where that would distort it."""
    if re.search(
        rf"(?<![A-Za-z])(?:{FACTORS})(?![A-Za-z])|\d\s*[-+*/x=]\s*\d|\btimes (?:as|more)\b|[=*+<>]", phrase, re.I
    ):
        return None
    number = rf"(?<![A-Za-z\d])(?:{NUM}|{CARDINALS})(?:[ -](?:{CARDINALS}))*(?![A-Za-z\d])"
    article = r"\b(the|an?|his|her|their|its|other|first|last|next|these|those|all|my|our|your|another)"
    for pattern, paraphrase in (
        (rf"{number}\s?(?:%|percent\b)", "the given percentage"),
        (rf"[$€£]\s?{number}", "the given price"),
        (rf"{article} {number}[ -](?=[a-z])", r"\1 "),
        (r"(?i:\bone) (?!of\b|that\b)(?=[aeiou]|hour)", "an "),
        (r"(?i:\bone) (?!of\b|that\b)(?=[a-z])", "a "),
        (rf"(?i:{number})[ -](?=[a-z])", "the given "),
    ):
        phrase = re.sub(pattern, paraphrase, phrase)
    phrase = re.sub(r"\b(?:the given|the|a|an) (?=the\b)", "", re.sub(r"\s+", " ", phrase)).strip(" ,.:;-–")
    return None if not phrase or has_number(phrase) or re.search(r"[$€£%]", phrase) else phrase
