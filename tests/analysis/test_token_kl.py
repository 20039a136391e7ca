"""Token KL by position, step and token, against hand-made completions."""

import pytest

from sgpo.analysis.token_kl import TokenKl, step_of_tokens, summarize, token_pieces
from sgpo.data import builtin

LINES = r"\n+|(?<=[.!?])\s+"


def test_pieces_are_what_each_token_adds():
    tokenizer = builtin.make_tokenizer()
    text = "left farm first 3 \\boxed{10}"
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = token_pieces(ids, tokenizer.decode)
    assert "".join(pieces) == text
    assert pieces[:2] == ("left", " farm")
    assert len(pieces) == len(ids)


def test_pieces_of_a_character_over_several_tokens_come_with_its_last():
    data = "a\u00e9b".encode()
    pieces = token_pieces(list(data), lambda ids: bytes(ids).decode("utf-8", errors="ignore"))
    assert pieces == ("a", "", "\u00e9", "b")


@pytest.mark.parametrize(
    ("pieces", "pattern", "expected"),
    [
        (["Add", " them", ".", " Then", " halve", ".\n", "\n", "Done"], LINES, [0, 0, 0, 1, 1, 1, 1, 2]),
        (["3", ".", "5", " is", " it", "."], LINES, [0, 0, 0, 0, 0, 0]),
        (["left", " farm", " right", " farm", " join"], "(?=right|join)", [0, 0, 1, 1, 2]),
        (["\n", "x", "\n"], LINES, [0, 1, 1]),
        ([], LINES, []),
    ],
)
def test_steps(pieces, pattern, expected):
    assert step_of_tokens(pieces, pattern) == expected


def _row(problem: int, sample: int, pieces: list[str], kl: list[float]) -> TokenKl:
    return TokenKl(problem, f"p{problem}", sample, tuple(pieces), tuple(kl))


def test_summary_by_hand():
    rows = [
        _row(0, 0, ["a", "\n", "b", "b"], [0.0, 0.2, 3.0, 0.4]),
        _row(0, 1, ["a", "a"], [1.0, 0.0]),
        _row(1, 0, ["b"], [0.6]),
    ]
    found = summarize(rows, limit=1.0, pattern=LINES)
    assert (found["rollouts"], found["problems"], found["tokens"]) == (3, 2, 7)
    assert found["mean"] == pytest.approx(5.2 / 7)
    assert found["mean_after_mask"] == pytest.approx(2.2 / 7)  # 1.0 is not above the limit
    assert found["above_share"] == pytest.approx(1 / 7)
    assert found["mean_per_problem"].mean == pytest.approx(((0.9 + 0.5) / 2 + 0.6) / 2)
    first, second = found["by_step"]
    assert (first.tokens, second.tokens) == (5, 2)
    assert first.kl.mean == pytest.approx(((0.1 + 0.5) / 2 + 0.6) / 2)
    assert second.kl.mean == pytest.approx(1.7)
    assert second.above_share == 0.5
    assert found["steps_per_rollout"] == pytest.approx(4 / 3)
    # Of 4 tokens the first lies in decile 0, the others in 2, 5 and 7; of 2 in 0 and 5; the single one in 0.
    assert [part.name for part in found["by_decile"]] == ["0-10 %", "20-30 %", "50-60 %", "70-80 %"]
    assert found["by_decile"][2].kl.mean == pytest.approx((3.0 + 0.0) / 2)
    (b, a) = found["top_tokens"]
    assert (b.text, b.count, a.text) == ("b", 3, "a")  # the line break stands once and is left out
    assert b.mean == pytest.approx(4.0 / 3)
    assert b.share_of_all == pytest.approx(4.0 / 5.2)
