"""The question templates, the reading of answers, the cache of answers, the display."""

import io
import json
import multiprocessing
from collections import Counter

import pytest
import yaml
from processes import PATIENCE_S
from rich.console import Console

from sgpo.strategies.asking import Answer, AnswerCache, Asker, Failure, Question, Sampling
from sgpo.strategies.display import ExtractDisplay
from sgpo.strategies.questions import MAX_STRATEGY_CHARS, Malformed, Templates, parse_scores, parse_strategy
from sgpo.types import SgpoError

GOOD = "Problem type: counting.\nStrategy: Count twice.\nSteps:\n- Count one way.\n- Count the other way."


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"\n{GOOD}\n\n",
        f"```\n{GOOD}\n```",
        "**Problem type:** counting.\n\n**Strategy:** Count\ntwice.\n\n**Procedural steps:**\n1. Count one way.\n"
        "2) Count the\n   other way.",
        "## Problem Type: counting.\n## Strategy: Count twice.\n## Steps:\n* Count one way.\n• Count the other way.",
        "problem type: counting.\nSTRATEGY: Count twice.\nSteps:\nStep 1: Count one way.\nStep 2: Count the other way.",
    ],
)
def test_one_canonical_form(text):
    assert parse_strategy(text) == GOOD


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("I would count twice.", "three parts"),
        (GOOD.replace("Strategy:", "Idea:"), "three parts"),
        (GOOD + "\nStrategy: another", "three parts"),
        ("Strategy: Count.\nProblem type: counting.\nSteps:\n- Count.", "in this order"),
        (GOOD.replace("counting.", ""), "Problem type was empty"),
        (GOOD.replace("Count twice.", " "), "Strategy was empty"),
        (GOOD.partition("- ")[0], "no step"),
        (GOOD.replace("- Count one way.", "- "), "empty"),
        (f"Sure, here it is:\n{GOOD}", "before the first part"),
        (f"{GOOD}\n\nLet me know if it helps!", "nothing after it"),
        (GOOD.replace("- Count one way.", "Count one way."), "list"),
        (GOOD + "x" * MAX_STRATEGY_CHARS, "characters"),
    ],
)
def test_malformed_strategies(text, reason):
    with pytest.raises(Malformed, match=reason):
        parse_strategy(text)


SCORES = {"problem_type": 1, "strategy": 0.5, "steps": 0.25, "no_results": 0}


def test_scores():
    assert parse_scores(f"Here:\n```json\n{json.dumps(SCORES)}\n```") == SCORES


@pytest.mark.parametrize(
    "text",
    [
        "good",
        "{}",
        json.dumps({**SCORES, "extra": 1}),
        json.dumps({**SCORES, "steps": 1.01}),
        json.dumps({**SCORES, "steps": -0.1}),
        json.dumps({**SCORES, "steps": "1"}),
        json.dumps({**SCORES, "steps": True}),
        json.dumps({**SCORES, "steps": float("nan")}),
        json.dumps({**SCORES, "steps": None}),
        json.dumps(SCORES) * 2,
        json.dumps(SCORES)[:-1],
        "{'problem_type': 1}",
    ],
)
def test_malformed_scores(text):
    with pytest.raises(Malformed):
        parse_scores(text)


def test_placeholders_in_the_problem_are_left_alone():
    templates = Templates.load()
    [(_, system), (role, text)] = templates.extraction("a {solution} {x}", "b {problem}", "c {problem}")
    assert role == "user"
    assert "a {solution} {x}" in text
    assert "b {problem}" in text
    assert "c {problem}" in text
    assert "{" not in system
    assert "<strategy>\nS\n</strategy>" in templates.scoring("a", "b", "S")[1][1]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"extract": "only {problem}"}, "extract must hold {problem}, {solution}"),
        ({"score": ""}, "score must be a non-empty text"),
        ({"again": "{reason} {problem}"}, "again must hold {reason}"),
        ({"system": "{problem}"}, "no placeholder"),
        ({"sytem": "x"}, "exactly the keys"),
    ],
)
def test_bad_templates(tmp_path, change, expected):
    good = {
        "system": None,
        "extract": "{problem}{solution}",
        "score": "{problem}{solution}{strategy}",
        "again": "{reason}",
    }
    path = tmp_path / "t.yaml"
    path.write_text(yaml.safe_dump(good))
    assert Templates.load(str(path)).extraction("a", "b") == (("user", "ab"),)
    path.write_text(yaml.safe_dump({**good, **change}))
    with pytest.raises(SgpoError, match="strategy template") as error:
        Templates.load(str(path))
    assert expected in str(error.value)


# ---- the cache -----------------------------------------------------------------------------------------------------


def question(text="q", index=0, attempt=0, **sampling):
    return Question(
        (("user", text),),
        Sampling(**{"temperature": 1.0, "top_p": 1.0, "max_tokens": 9, **sampling}),
        index,
        attempt,
        0,
    )


class Echo:
    def __init__(self, **identity):
        self.identity = identity
        self.retries = Counter()
        self.asked = []

    def answer(self, questions, on_result):
        for item in reversed(questions):
            self.asked.append(item)
            text = item.messages[-1][1]
            on_result(item, Failure("no") if text == "fails" else Answer(f"{text}/{item.index}", "stop", 3, 2))


def ask(path, backend, questions):
    with AnswerCache(path) as cache:
        asker = Asker(backend, cache, lambda count: None)
        return asker.ask(questions), asker.usage


def test_answers_come_in_order_and_are_asked_for_once(tmp_path):
    path, backend = tmp_path / "c.jsonl", Echo()
    questions = [question("a"), question("a", 1), question("a"), question("b")]
    results, usage = ask(path, backend, questions)
    assert [answer.text for answer in results] == ["a/0", "a/1", "a/0", "b/0"]
    assert len(backend.asked) == usage.asked == 3
    again, usage = ask(path, backend, questions)
    assert again == results
    assert len(backend.asked) == 3
    assert (usage.asked, usage.cached, usage.cached_prompt_tokens) == (0, 4, 12)


@pytest.mark.parametrize(
    "other",
    [question("b"), question(index=1), question(attempt=1), question(temperature=0.5), question(max_tokens=8)],
)
def test_whatever_decides_an_answer_is_in_the_key(tmp_path, other):
    backend = Echo(model="m")
    ask(tmp_path / "c.jsonl", backend, [question()])
    ask(tmp_path / "c.jsonl", backend, [other])
    assert len(backend.asked) == 2


def test_another_model_is_another_key(tmp_path):
    ask(tmp_path / "c.jsonl", Echo(model="m"), [question()])
    other = Echo(model="n")
    ask(tmp_path / "c.jsonl", other, [question()])
    assert len(other.asked) == 1


def test_an_answer_is_in_the_file_before_it_is_used(tmp_path):
    path, seen = tmp_path / "c.jsonl", []
    with AnswerCache(path) as cache:
        asker = Asker(Echo(), cache, lambda count: seen.append(len(path.read_bytes().splitlines())))
        asker.ask([question("a"), question("b")])
    assert seen == [0, 1, 2]


def test_failures_are_not_kept(tmp_path):
    backend = Echo()
    for _ in range(2):
        results, usage = ask(tmp_path / "c.jsonl", backend, [question("fails")])
        assert results == [Failure("no")]
        assert usage.failed == 1
    assert len(backend.asked) == 2


@pytest.mark.parametrize("kept", range(0, 60, 7))
def test_a_torn_last_line_costs_that_answer_alone(tmp_path, kept):
    path, backend = tmp_path / "c.jsonl", Echo()
    ask(path, backend, [question("a"), question("b")])
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:kept])
    results, usage = ask(path, backend, [question("a"), question("b")])
    assert [answer.text for answer in results] == ["a/0", "b/0"]
    assert (usage.asked, usage.cached) == (1, 1)
    assert sorted(path.read_bytes().splitlines()) == sorted([first.strip(), second.strip()])


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"key": "k"}', '{"text": "a", "finish": "stop"}', '{"key": 1, "odd": 2}', "\xff"]
)
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "c.jsonl"
    ask(path, Echo(), [question()])
    with path.open("ab") as file:
        file.write(line.encode("latin-1") + b"\n")
    with pytest.raises(SgpoError, match=r"c\.jsonl:2"):
        AnswerCache(path)


def _hold(path, ready, release):
    with AnswerCache(path):
        ready.set()
        release.wait(PATIENCE_S)


def test_two_runs_do_not_share_a_cache(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path / "c.jsonl", ready, release))
    other.start()
    assert ready.wait(PATIENCE_S)
    with pytest.raises(SgpoError, match="in use by another run"):
        AnswerCache(tmp_path / "c.jsonl")
    release.set()
    other.join(PATIENCE_S)
    with AnswerCache(tmp_path / "c.jsonl") as cache:
        assert len(cache) == 0


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SgpoError, match="cannot be written"):
        AnswerCache(tmp_path / "file" / "c.jsonl")


# ---- the display ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terminal", [True, False])
def test_the_display_shows_rounds_counts_and_status(terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    done = []
    with ExtractDisplay(lambda: f"{len(done)} answers", console) as display:
        for name, total in (("candidates", 3), ("scores", 2)):
            display.start_round(name, total)
            for _ in range(total):
                done.append(name)
                display.advance(1)
    text = console.file.getvalue()
    assert "candidates" in text
    assert ("3/3" in text) != terminal  # a terminal that is repainted in time shows the round under way alone
    assert "scores" in text
    assert "2/2" in text
    assert "5 answers" in text
    assert ("\x1b[" in text) == terminal
