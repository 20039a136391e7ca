"""Whose strategy goes to which problem, and placeholders as long as the strategy they stand for."""

from dataclasses import replace
from pathlib import Path

import pytest

from sgpo.analysis.transfer import (
    ARMS,
    assign,
    assign_matrix,
    matrix_types,
    placeholder,
    stated_type,
    types_of,
    with_guidance_of,
)
from sgpo.data import builtin
from sgpo.data.prompts import PromptBuilder, PromptTemplate
from sgpo.strategies.calculator import strategy_from_calculator_trace
from sgpo.strategies.questions import parse_strategy
from sgpo.types import ChatTurn, Problem, SgpoError

IDS = [f"p{i}" for i in range(7)]
TYPES = ["a", "b", "a", "a", "c", None, "b"]


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (
            parse_strategy("**Problem type:** Linear  equations.\nStrategy: isolate\nSteps:\n1. move"),
            "linear equations",
        ),
        (builtin.strategy_text(builtin.PROCEDURES[0]), "digits"),
        ("type: ages\nstrategy: add", "ages"),
        ("Problem type: choosing a strategy\nStrategy: minimax", "choosing a strategy"),
        ("First add the two numbers.", None),
        (None, None),
    ],
)
def test_the_stated_type_is_the_first_part(strategy, expected):
    assert stated_type(strategy) == expected


def test_strategies_from_calculator_marks_state_their_type():
    strategy = strategy_from_calculator_trace("He pays 4*5 = $<<4*5=20>>20.\n#### 20", "4 pens at $5. How much?")
    assert stated_type(strategy) == "a single-step arithmetic word problem about money"


def test_types_from_a_field_from_clusters_or_not_at_all():
    problems = [Problem("x", "?", "1", extra={"level": 3}), Problem("y", "?", "1")]
    assert types_of(problems, "level", [0, 0]) == ["3", None]
    assert types_of(problems, "clusters", [1, 0]) == ["cluster 2", "cluster 1"]
    with pytest.raises(SgpoError, match="no strategy states its problem type"):
        types_of(problems, "stated", [0, 0])
    with pytest.raises(SgpoError, match="no row has a field 'topic'"):
        types_of(problems, "topic", [0, 0])


def test_partners_are_of_the_right_type_and_take_turns():
    draws = assign(IDS, TYPES, samples=6, partners=2, seed=0)
    assert {draw.arm for draw in draws} == set(ARMS)
    assert len(draws) == len(set(draws))
    by_arm = {arm: [draw for draw in draws if draw.arm == arm] for arm in ARMS}
    for arm in ("none", "own", "placeholder"):
        assert [(d.problem, d.sample) for d in by_arm[arm]] == [(i, k) for i in range(7) for k in range(6)]
    # p4 is alone in its type, p5 has none.
    assert {d.problem for d in by_arm["same_type"]} == {0, 1, 2, 3, 6}
    assert {d.problem for d in by_arm["other_type"]} == {0, 1, 2, 3, 4, 6}
    for draw in (*by_arm["same_type"], *by_arm["other_type"]):
        assert draw.source not in (draw.problem, 5, None)
        assert (TYPES[draw.source] == TYPES[draw.problem]) == (draw.arm == "same_type")
    for arm in ("same_type", "other_type"):
        of_p0 = [draw.source for draw in by_arm[arm] if draw.problem == 0]
        assert of_p0 == of_p0[:2] * 3
        assert len(set(of_p0)) == 2
    assert [d.source for d in by_arm["same_type"] if d.problem == 1] == [6] * 6


def test_assignments_depend_on_the_seed_and_the_ids_alone():
    def sources(ids, types, seed):
        draws = assign(ids, types, samples=2, partners=2, seed=seed)
        return {(ids[d.problem], d.arm, d.sample): d.source for d in draws if d.arm == "other_type"}

    assert sources(IDS, TYPES, 0) == sources(IDS, TYPES, 0)
    assert sources(IDS, TYPES, 0) != sources(IDS, TYPES, 1)
    assert len({sources(IDS, TYPES, seed)["p0", "other_type", 0] for seed in range(30)}) == 3


def test_the_matrix_never_gives_a_problem_its_own_strategy():
    names = matrix_types(TYPES, 2)
    assert names == ["a", "b"]  # c is rarer
    cells = assign_matrix(TYPES, names, draws=5, seed=0)
    assert set(cells) == {("a", "a"), ("a", "b"), ("b", "a"), ("b", "b")}
    for (source, target), draws in cells.items():
        assert len(draws) == len(set(draws)) == 5
        assert {TYPES[d.problem] for d in draws} == {target}
        assert {TYPES[d.source or 0] for d in draws} == {source}
        assert all(draw.source != draw.problem for draw in draws)
        problems = [draw.problem for draw in draws]
        assert max(map(problems.count, problems)) - min(map(problems.count, set(problems))) <= 1
    assert assign_matrix(TYPES, ["a", "c"], draws=5, seed=0)["c", "c"] == []


@pytest.fixture(scope="module")
def builder() -> PromptBuilder:
    template = Path(builtin.__file__).parent / "templates" / "builtin.yaml"
    return PromptBuilder(builtin.make_tokenizer(), PromptTemplate.load(str(template)), max_prompt_tokens=200)


def _empty(builder: PromptBuilder, problem: Problem, unit: str) -> tuple[Problem, int]:
    tokenizer = builtin.make_tokenizer()
    return placeholder(
        problem,
        unit,
        len(builder.build(problem).guided or ()),
        count_of=lambda text: len(tokenizer.encode(text, add_special_tokens=False)),
        length_of=lambda candidate: len(builder.build(candidate).guided or ()),
    )


def test_a_placeholder_has_the_tokens_of_its_strategy_and_no_word_of_it(builder):
    problem = builtin.make_problems("eval", seed=0, count=1)[0]
    empty, excess = _empty(builder, problem, ".")
    assert excess == 0
    assert set((empty.strategy or "").split()) == {"."}
    own, other = builder.build(problem), builder.build(empty)
    assert len(other.guided or ()) == len(own.guided or ())
    assert other.plain == own.plain


def test_a_placeholder_that_cannot_be_exact_says_by_how_much(builder):
    problem = builtin.make_problems("eval", seed=0, count=1)[0]  # its strategy has 23 tokens
    empty, excess = _empty(builder, problem, ": .")
    assert abs(excess) == 1
    assert len(builder.build(empty).guided or ()) == len(builder.build(problem).guided or ()) + excess


def test_a_placeholder_is_lengthened_until_it_fits():
    def length_of(problem: Problem) -> int:
        return 5 + len((problem.strategy or "").split()) * 2 // 3  # three repetitions make two tokens

    problem = Problem("x", "?", "1", strategy=" ".join(["word"] * 30))
    empty, excess = placeholder(problem, ".", 35, count_of=lambda text: len(text.split()), length_of=length_of)
    assert excess == 0
    assert (empty.strategy or "").count(".") == 45


def test_chat_turns_are_emptied_one_by_one(builder):
    turns = (ChatTurn("user", "farm : 3 . how many boxes ?"), ChatTurn("assistant", "take sum \\boxed{3}"))
    problem = Problem("x", "farm : 5 .", "1", guidance_turns=turns)
    empty, excess = _empty(builder, problem, ".")
    assert excess == 0
    assert empty.strategy is None
    assert [turn.content.split() for turn in empty.guidance_turns] == [["."] * 8, ["."] * 5]


def test_the_guidance_of_another_problem_is_all_of_it():
    mine = Problem("x", "mine", "1", strategy="s", guidance_turns=(ChatTurn("user", "u"), ChatTurn("assistant", "a")))
    other = Problem("y", "other", "2", strategy="t")
    mixed = with_guidance_of(mine, other)
    assert (mixed.problem, mixed.answer, mixed.strategy, mixed.guidance_turns) == ("mine", "1", "t", ())
    assert replace(mixed, id="x", strategy="s", guidance_turns=mine.guidance_turns) == mine
