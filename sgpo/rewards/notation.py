r"""Notation that Math-Verify does not read, rewritten into notation that it does; decoration taken off.

Plain text functions, linear in the text: nothing is evaluated here. They work on what stands inside a box.
"""

from __future__ import annotations

import re

from sgpo.rewards.characters import as_latex

_END = r"(?![A-Za-z])"
_SPACE = rf"(?:\s|~|\\[,;:! ]|\\q?quad{_END})"
_ARGUMENT = (
    r"\\left\s?\([^()]{1,60}\\right\s?\)|\([^()]{1,60}\)|\\frac\s?\{[^{}]{1,20}\}\s?\{[^{}]{1,20}\}"
    r"|\d{1,9}(?:\.\d{1,9})?(?:\^\{\\circ\})?|\\[a-z]{1,9}"
)
_DECORATION = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:tag|label|[vh]?phantom|[hv]space)\*?\s?\{[^{}]{0,40}\}", ""),
        (r"\\(?:color|textcolor|colorbox)\s?(?:\[[^\[\]]{0,20}\])?\s?\{[^{}]{0,40}\}", ""),
        (r"\\fcolorbox\s?\{[^{}]{0,40}\}\s?\{[^{}]{0,40}\}", ""),
        (r"\\mathbf(?=\s?\{\s?\(?[A-J][).])", r"\\textbf"),
        (
            r"\\(?:bold|boldsymbol|bm|pmb|underline|uline|emph|mathit|mathsf|mathbf|mathtt|mathnormal|framebox|ensuremath)(?=\s?\{)",
            "",
        ),
        (rf"\{{\s?\\rm{_END}\s?", r"\\mathrm{"),
        (
            rf"\\(?:displaystyle|(?:script|text)style|bf|it|rm|sf|tt|bfseries|itshape|[lL]arge|LARGE|[hH]uge|small|normalsize"
            rf"|centering|hfill|noindent|mathstrut|strut|[bB]igg?[lrm]?){_END}\s?",
            "",
        ),
        (r"\\(?:text\w{0,6}|mathrm|mbox)\s?\{([\d.,;:+/\s-]{0,200})\}", r"\1"),  # numbers, not words
        (r"(?<=.)\\(?:text\w{0,6}|mathrm|mbox)\s?\{\s?\((?![^(){}]*\bor\b)[^(){}]{2,200}\)[\s.]?\}$", ""),  # a remark
        (r"(\\(?:text\w{0,6}|mathrm|mbox)\s?\{[^{}]{0,60})\^\{(\d)\}([^{}]{0,60}\})", r"\1^\2\3"),
        (r"\\(?:text\w{0,6}|mathrm|mbox)\s?\{\s?(\\text\w{0,6}\s?\{[^{}]{0,200}\})\s?\}", r"\1"),
    )
)
_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (rf"\\degrees?{_END}|\^\s?\{{\s?\\circ\s?\}}|\^\s?\\circ{_END}|\^\s?\{{o\}}|(?<=\d)\^o{_END}", r"^{\\circ}"),
        (r"\\(?:nicefrac|sfrac|xfrac)(?=\s?\{)", r"\\frac"),
        (rf"\\varnothing{_END}", r"\\emptyset"),
        (rf"\\log_(?:\{{e\}}|e{_END})", r"\\ln"),
        (r"(?<=\d)(?:\{,\}|\\[,!; ]|,\\!\s?|~|(?<!\d{4})\s)(?=\d{3}(?!\d))(?!\d{3}\s?/)", ""),  # 1{,}000 and 1\,000
        (r"\\dot\s?\{?(\d)\}?(\d{0,20})\\dot\s?\{?(\d)\}?", r"\\overline{\1\2\3}"),
        (r"\\(?:bar|dot)(?=\{\d+\})", r"\\overline"),
        (r"_\{\\(max|min)\s?\}", r"_{\1}"),
        (rf"\\(?:langle|lbrack){_END}", "("),
        (rf"\\rangle{_END}", ")"),
        (r"^(?:\\text\{\s?)?[Aa]ll real numbers\.?\s?\}?$", r"(-\\infty, \\infty)"),
        (r"^([-+]?\d{1,20}(?:\.\d{1,20})?)[eE]([-+]?\d{1,3})$", r"\1 \\times 10^{\2}"),
        (r"^\](.{1,200}),(.{1,200})\[$", r"(\1,\2)"),  # ]0, 1[
        (
            r"[,;\s]{0,9}(?:\\text\s?\{[^{}]{0,40}\}\s{0,9})?\(?[A-Za-z]\s?\\in\s?\\mathbb\s?\{?[ZNR]\}?(?:\^?\+)?\)?$",
            "",
        ),
        (r"^(?:\\left)?\\\{\s?[a-z](?:\s?\\in\s?\\mathbb\{R\})?\s?(?:\\mid|\||:)(.{1,400}?)(?:\\right)?\\\}$", r"\1"),
        (r"\\(?:mathrm|text|operatorname|textrm)\s?\{\s?(i|e)\s?\}", r" \1 "),  # the constants, upright
        (rf"\\imath{_END}", " i "),
        (rf"\\(?:cis|(?:operatorname|text|mathrm)\s?\{{cis\}})\s?({_ARGUMENT})", r"(\\cos \1 + i \\sin \1)"),
        (r"(?<=\d)\s?percent\b", r"\\%"),
        (r"^([a-z])\s?(?:\||\\mid(?![A-Za-z]))\s?(?=.*(?:[<>=]|\\[lg]e))(?=.*\1)", ""),  # {x|x>1}
        (r"\s?\\(?:text\w{0,6}|mathrm|mbox)\s?\{\s?(?:percent|per cent|\\%)\s?\}", r"\\%"),
        (r"(?:\\|(?<![A-Za-z\\]))sqrt\s?(\[\d\])?\s?\(([^()]{0,200})\)", r"\\sqrt\1{\2}"),
        (r"\\sqrt\s?(\d{1,20})(?=\D|$)", r"\\sqrt{\1}"),
    )
)
_MIXED = re.compile(
    rf"(?<![\w.^}}\])/])(?!(?<=,)\d{{3}}(?!\d))(\d{{1,20}}){_SPACE}{{1,9}}(\d{{1,20}})\s?/\s?(\d{{1,20}})(?![\d./])"
)
_REPEATING = re.compile(r"(\d{0,20})\.(\d{0,20})\\overline\{(\d{1,20})\}")
_LEADING_TEXT = re.compile(
    r"\\(?:text\w{0,6}|mathrm|mbox)\{(?!\s?\(?[A-J]\)?\s?:)[^{}]*(?:\bis|[:=])\s*\}(?=.)"
)  # \text{The answer is }
_TRIGONOMETRY = re.compile(rf"\\(?:sin|cos|tan|cot|sec|csc){_END}")
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s?\^\{\\circ\}")
_EMPTY_SET = re.compile(r"(?:\\left)?\\\{\s*(?:\\right)?\\\}")

_START = re.compile(
    rf"(?:{_SPACE}|[=:,;&]|\\(?:therefore|because|implies|Rightarrow|Longrightarrow|rightarrow|to|approx|simeq|sim|equiv)"
    rf"{_END})*"
)
_FINISH = re.compile(
    rf"(?:{_SPACE}|[,;:&]|(?<!\\right)(?<!\\right )(?<!\.)\.|\\\\|\\(?:blacksquare|square|Box|qed|checkmark){_END})"
    r"{1,20}$"
)
_WRAPPERS = (
    ("**", "**"), ("__", "__"), ("*", "*"), ("``", "``"), ("`", "`"), ("'", "'"), ('"', '"'), ("$$", "$$"), ("$", "$"),
    ("\\(", "\\)"), ("\\[", "\\]"), ("\\left.", "\\right."),
)  # fmt: skip
_ENVIRONMENT = re.compile(
    r"(?P<brace>(?:\\left\s?)?\\\{\s*)?\\begin\{(?P<name>aligned|align\*?|gathered|gather\*?|split|cases|array)\}"
    r"(?:\[[^\[\]]{0,9}\])?(?:\{[^{}]{0,20}\})?(?P<rows>.*)\\end\{(?P=name)\}(?:\s*\\right\s?\.)?",
    re.DOTALL,
)
_ROW_END = re.compile(r"\\\\(?:\[[^\[\]]{0,9}\])?")
_RELATION = re.compile(r"\s*(?:[=<>]|\\(?:le|ge|leq|geq|leqslant|geqslant|ne|neq|approx|equiv)(?![A-Za-z]))")
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[{}]")


def tidy(answer: str) -> str:
    r"""The answer in characters and commands that Math-Verify knows: `90°`, `1{,}000` or `0.\overline{3}`."""
    answer = as_latex(answer)
    if "\\" in answer:
        for pattern, replacement in _DECORATION:
            answer = pattern.sub(replacement, answer)
    answer = _unwrapped(answer)
    for pattern, replacement in _REWRITES:
        answer = pattern.sub(replacement, answer)
    answer = _unwrapped(answer[match.end() :] if (match := _LEADING_TEXT.match(answer)) else answer)
    if _EMPTY_SET.fullmatch(answer):
        return r"\emptyset"
    if _TRIGONOMETRY.search(answer):
        answer = _DEGREES.sub(r"(\\frac{\1\\pi}{180})", answer)
    return _MIXED.sub(_as_mixed, _REPEATING.sub(_as_fraction, answer))


def _unwrapped(answer: str) -> str:
    """Without what stands around the whole: space, braces, signs such as "therefore", quotes, an environment."""
    before = None
    while answer != before and (before is None or len(answer) < len(before)):
        before = answer
        answer = answer[_START.match(answer).end() :]  # pyright: ignore[reportOptionalMemberAccess]
        while finish := _FINISH.search(answer, max(0, len(answer) - 100)):
            answer = answer[: finish.start()]
        answer = _without_braces(_rows(answer))
        for begin, end in _WRAPPERS:
            inner = answer[len(begin) : -len(end)]
            if answer.startswith(begin) and answer.endswith(end) and inner.strip() and begin not in inner:
                answer = inner
                break
    return answer


def _without_braces(answer: str) -> str:
    """Without a pair of braces that only groups the whole."""
    answer = answer.strip()
    depth = 0
    for token in _TOKEN.finditer(answer) if answer.startswith("{") else ():
        depth += {"{": 1, "}": -1}.get(token.group(), 0)
        if depth == 0:
            is_group = token.end() == len(answer) and "\\choose" not in answer
            return answer[1:-1].strip() if is_group else answer
    return answer


def _rows(answer: str) -> str:
    r"""The lines of `aligned`, or of `cases` that are equations, as a list; a piecewise definition stays as it is."""
    match = _ENVIRONMENT.fullmatch(answer)
    if match is None:
        return answer
    if match["name"] == "array" and not match["brace"]:  # a matrix, unless it has one entry
        return answer if "&" in match["rows"] or "\\\\" in match["rows"] else match["rows"].strip()
    is_system = match["name"] in ("cases", "array") or bool(match["brace"])
    rows: list[str] = []
    for row in _ROW_END.split(match["rows"]):
        parts = [part.strip() for part in row.strip(" \n\t,;.").split("&")]
        if is_system and any(part and not _RELATION.match(part) for part in parts[1:]) and parts[0]:
            return answer
        text = " ".join(part for part in parts if part)
        if rows and _RELATION.match(text) and not is_system:
            rows[-1] += " " + text
        elif text:
            rows.append(text)
    if is_system and not all("=" in row and "," not in row for row in rows):
        return answer
    return ", ".join(rows) if rows else answer


def _as_fraction(match: re.Match[str]) -> str:
    whole, fixed, repeating = match.groups()
    scale = 10 ** len(fixed)
    numerator = int(whole + fixed + repeating) - int((whole + fixed) or 0)
    return rf"\frac{{{numerator}}}{{{scale * (10 ** len(repeating) - 1)}}}"


def _as_mixed(match: re.Match[str]) -> str:
    whole, top, bottom = map(int, match.groups())
    return rf"\frac{{{whole * bottom + top}}}{{{bottom}}}" if 0 < top < bottom else match.group()
