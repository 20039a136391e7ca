"""Unicode as models and Chinese data sets write it, rewritten as LaTeX. Linear in the text; ASCII is left alone."""

from __future__ import annotations

import re
import unicodedata

# What has a meaning of its own in an answer. Everything else is left to NFKC: full-width and mathematical letters.
_COMMANDS = str.maketrans(
    {
        "−": "-", "×": r"\times ", "✕": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "•": r"\cdot ",
        "∗": "*", "÷": "/", "∕": "/", "⁄": "/", "∶": ":", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ",
        "≦": r"\le ", "≧": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "≡": r"\equiv ",
        "±": r"\pm ", "∓": r"\mp ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "∖": r"\setminus ",
        "∣": "|", "∠": r"\angle ", "△": r"\triangle ", "∴": r"\therefore ", "⇒": r"\Rightarrow ", "→": r"\to ",
        "°": r"^{\circ}", "º": r"^{\circ}", "˚": r"^{\circ}", "∘": r"^{\circ}", "℃": r"^{\circ}\text{C}",
        "℉": r"^{\circ}\text{F}", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}",
        "ℂ": r"\mathbb{C}", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "⟨": r"\langle ",
        "⟩": r"\rangle ", "〈": r"\langle ", "〉": r"\rangle ", "，": ", ", "、": ", ", "。": ".", "％": r"\%",
        "＄": r"\$", "～": r"\sim ", "【": "", "】": "", "「": "", "」": "", "“": '"', "”": '"', "‘": "'", "’": "'",
        "′": "'", "″": '"',
    }
)  # fmt: skip
_SCRIPTS = {"<super>": "^", "<sub>": "_"}
_RADICALS = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}
_RADICAL = re.compile(r"([√∛∜])\s?(\d+(?:\.\d+)?|[^\W\d_]|\\pi(?![A-Za-z]))?")
_THOUSANDS = re.compile(r"(?<=[\d０-９])，(?=[\d０-９]{3}(?![\d０-９]))")
_OVERLINED = re.compile("((?:\\d[\u0304\u0305\u0307])+)")


def as_latex(text: str) -> str:
    r"""`１２` as `12`, `x²` as `x^{2}`, `2½` as `2\frac{1}{2}`, `①③` as `1,3`, `√13` as `\sqrt{13}`, no zero width."""
    if text.isascii():
        return text
    text = _THOUSANDS.sub(",", text)
    text = _OVERLINED.sub(lambda match: rf"\overline{{{''.join(filter(str.isdigit, match[1]))}}}", text)
    pieces, open_mark = [], ""
    for character in text.translate(_COMMANDS):
        mark, piece = ("", character) if character.isascii() else _read(character)
        if mark != open_mark:
            pieces.append(("}" if open_mark in ("^", "_") else "") + (mark + "{" if mark in ("^", "_") else ""))
            open_mark = mark
        elif mark == ",":
            pieces.append(",")
        pieces.append(piece)
    text = "".join(pieces) + ("}" if open_mark in ("^", "_") else "")
    return _RADICAL.sub(_as_root, text)


def _read(character: str) -> tuple[str, str]:
    """The mark under which a run of such characters stands ("^", "_", "," for circled digits or ""), and its text."""
    kind = unicodedata.decomposition(character).partition(" ")[0]
    plain = unicodedata.normalize("NFKC", character)
    if kind in _SCRIPTS:
        return _SCRIPTS[kind], plain.translate(_COMMANDS)
    if kind == "<fraction>":
        top, _, bottom = plain.partition("\u2044")
        return "", rf"\frac{{{top}}}{{{bottom}}}" if top and bottom else plain
    if kind == "<circle>":
        return ",", plain
    category = unicodedata.category(character)
    if category == "Cf":
        return "", ""
    if category == "Pd":
        return "", "-"
    return "", " " if category == "Zs" else plain


def _as_root(match: re.Match[str]) -> str:
    return _RADICALS[match[1]] + (f"{{{match[2]}}}" if match[2] else "")
