"""`sgpo strategies extract` as a user runs it: a server that misbehaves, a kill in the middle, bad input."""

import json
import os
import re
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from chat_server import ChatServer
from engine_builders import NO_VLLM
from processes import PATIENCE_S, scaled, start_ranks, wait_until

from sgpo.cli import main
from sgpo.data.problems import load_problems
from sgpo.rewards.thinking import after_thinking
from sgpo.strategies.asking import Answer, AnswerCache, Asker, Failure, Question, Sampling
from sgpo.strategies.extraction import Extraction, Settings, Source
from sgpo.strategies.local import LocalBackend
from sgpo.strategies.questions import Templates
from sgpo.strategies.settings import ExtractConfig
from sgpo.types import Problem, Rollout
from sgpo.utils.config_file import known_keys

TRACES = Path(__file__).parents[2].parent / "shared" / "data" / "traces_r1_rasbt.jsonl"

CLEAN = (
    "Problem type: a quantity determined by stated conditions.\nStrategy: Translate every condition into a relation "
    "and solve for what is asked.\nSteps:\n1. Name the unknown quantities.\n2. Write one relation per condition.\n"
    "3. Solve and check against the conditions.",
    "**Problem type:** a task with one well-defined procedure.\n**Strategy:** Simplify from the inside out.\n"
    "**Steps:**\n- Work out the innermost part.\n- Apply the outer operations in their order.",
    "Problem type: evaluating what the statement defines.\nStrategy: Reduce it to a known form.\nSteps:\n"
    "- Identify the defining property.\n- Use it to set up a comparison.\n- Conclude.",
)
MALFORMED = ("I think the trick is to count carefully.", "", CLEAN[0] + "\n\nHope it helps!", "Steps:\n- none")


def scripted(request, dice):
    """What a strong model might answer: mostly usable, sometimes malformed, sometimes giving the result away."""
    text = request["messages"][-1]["content"]
    kind = dice.random()
    if "<strategy>" in text:
        if kind < 0.2:
            return dice.choice(["quite good", '{"problem_type": 1}', '{"problem_type": 2, "strategy": 1}'])
        scores = {key: dice.randrange(21) / 20 for key in ("problem_type", "strategy", "steps", "no_results")}
        return f"<think>Let me see.</think>\n{json.dumps(scores)}"
    if kind < 0.2:
        return dice.choice(MALFORMED)
    if kind < 0.4:
        return f"{CLEAN[0]}\n4. Find {re.findall(r'boxed{([^}]*)}', text)[-1]}."
    return dice.choice(CLEAN)


def write_rows(path, count=10):
    with path.open("w") as file:
        for i in range(count):
            a, b, c = 7 + i, 13 + 2 * i, 3 + i
            text = f"{a} * {b} = {a * b}. Then {a * b} - {c} = {a * b - c}. \\boxed{{{a * b - c}}}"
            row = {
                "id": f"p{i}",
                "problem": f"A shop has {a} boxes of {b} pens and loses {c} pens. How many are left?",
                "answer": str(a * b - c),
                "response": f"<think>Hm, {a} boxes.</think>\n{text}",
                "level": i,
            }
            file.write(json.dumps(row) + "\n")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    write_rows(tmp_path / "in.jsonl")
    return tmp_path


def arguments(server, output="out.jsonl", **more):
    knobs = {
        "input": "in.jsonl",
        "output": output,
        "endpoint.base_url": server.url,
        "endpoint.model": "strong",
        "endpoint.backoff_s": 0.01,
        "endpoint.max_backoff_s": 0.05,
        "endpoint.timeout_s": scaled(1.5),
        "endpoint.concurrency": 4,
        "max_asks": 4,
        "leaks.workers": 1,
        **more,
    }
    return ["strategies", "extract", *(word for key, value in knobs.items() for word in (f"--{key}", str(value)))]


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def report_of(path):
    return json.loads(Path(f"{path}.report.json").read_text())


def test_a_run_against_a_server_that_misbehaves(folder, capsys):
    prices = {"endpoint.price_prompt": 0, "endpoint.price_completion": 2.5}
    with ChatServer(scripted, faults=0.3, slow_s=scaled(30.0)) as server:
        assert main(arguments(server, **prices)) == 0
        outcomes = server.outcomes()
    rows, report = rows_of("out.jsonl"), report_of("out.jsonl")
    problems = load_problems("out.jsonl")
    assert [row["id"] for row in rows] == [f"p{i}" for i in range(10)]
    assert all(problem.strategy and problem.has_guidance for problem in problems)
    assert all("response" not in row and row["level"] == i for i, row in enumerate(rows))
    assert not any(re.search(r"\d", row["strategy"]) for row in rows)
    assert all(row["strategy"].startswith("Problem type: ") and "\nSteps:\n- " in row["strategy"] for row in rows)
    assert (report["with_strategy"], report["without_strategy"]) == (10, {})
    assert report["candidates"]["wanted"] == 50
    assert report["leaks"]["answers_by_kind"]["answer"] == report["leaks"]["leaking_answers"] > 5
    assert {example["kind"] for example in report["leaks"]["examples"]} == {"answer"}
    assert report["malformed"]["answers"] > 5
    cache = rows_of("out.jsonl.cache.jsonl")
    assert report["requests"]["answered"] == len(cache) == len(cached_numbers("out.jsonl.cache.jsonl")) > 100
    faults = outcomes.total() - outcomes["answered"]
    assert sum(report["requests"]["retries"].values()) >= faults > 10  # a busy machine adds time-outs of its own
    tokens = sum(row["completion_tokens"] for row in cache)
    assert report["tokens"]["completion"] == tokens
    assert report["cost"] == pytest.approx(tokens * 2.5e-6)
    printed = capsys.readouterr().out
    assert "a strategy for 10 of 10 problems" in printed
    assert "cost 0.0" in printed
    assert not any("sk-secret" in path.read_text() for path in folder.iterdir())


def test_the_best_scored_candidate_is_kept_and_the_first_of_equals(folder):
    drawn = {}

    def reply(request, dice):
        text = request["messages"][-1]["content"]
        if "<strategy>" not in text:
            return CLEAN[request["seed"] % 3]
        problem = re.search(r"has (\d+) boxes", text)[1]
        value = dice.randrange(3) / 2
        drawn.setdefault(problem, []).append((value, re.search(r"Strategy: (.*)", text)[1]))
        return json.dumps(dict.fromkeys(("problem_type", "strategy", "steps", "no_results"), value))

    with ChatServer(reply) as server:
        assert main(arguments(server, **{"endpoint.concurrency": 1})) == 0
    for row in rows_of("out.jsonl"):
        candidates = drawn[re.search(r"has (\d+) boxes", row["problem"])[1]]
        assert len(candidates) == 5
        highest = max(value for value, _ in candidates)
        first = next(k for k, (value, _) in enumerate(candidates) if value == highest)
        assert (row["strategy_score"], row["strategy_candidate"]) == (highest, first)
        assert f"Strategy: {candidates[first][1]}" in row["strategy"]
        assert set(row["strategy_scores"].values()) == {highest}


def cached_numbers(path):
    """The requests that whole lines of the cache answer."""
    data = Path(path).read_bytes() if Path(path).exists() else b""
    return {json.loads(line)["prompt_tokens"] for line in data.splitlines(keepends=True) if line.endswith(b"\n")}


@pytest.mark.parametrize(("how", "kill_at"), [("SIGKILL", 1), ("SIGINT", 30), ("SIGKILL", 45), ("SIGKILL", 85)])
def test_killed_and_started_again(folder, how, kill_at):
    with ChatServer(scripted) as server:
        assert main(arguments(server, "straight.jsonl")) == 0
    with ChatServer(scripted, faults=0.2, delay_s=0.02, slow_s=scaled(30.0)) as server:
        command = ["-m", "sgpo.cli", *arguments(server)]
        # A shell's background job, a CI run for one, ignores SIGINT and hands that down.
        [process] = start_ranks(command, folder=folder, preexec=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))

        def under_way():
            assert process.poll() is None, process.communicate()[0]
            return len(cached_numbers("out.jsonl.cache.jsonl")) >= kill_at

        wait_until(under_way, f"{kill_at} answers")
        os.kill(process.pid, signal.Signals[how])
        output = process.communicate(timeout=PATIENCE_S)[0]
        assert process.returncode == (130 if how == "SIGINT" else -signal.SIGKILL), output
        assert not Path("out.jsonl").exists()
        time.sleep(0.1)  # requests that were under way reach the log
        kept, asked_before = cached_numbers("out.jsonl.cache.jsonl"), len(server.log)
        assert len(kept) >= kill_at
        [process] = start_ranks(command, folder=folder)
        output = process.communicate(timeout=PATIENCE_S)[0]
        assert process.returncode == 0, output
        asked_again = {number for number, _ in server.log[asked_before:]}
        assert asked_again
        assert not asked_again & kept
        answered_before = {number for number, outcome in server.log[:asked_before] if outcome == "answered"}
        assert len(asked_again & answered_before) <= 4  # no more than were under way
        asked_in_all = len(server.log)
        assert main(arguments(server)) == 0  # everything is in the cache now
        assert len(server.log) == asked_in_all
    assert Path("out.jsonl").read_bytes() == Path("straight.jsonl").read_bytes()
    assert report_of("out.jsonl")["requests"]["answered"] == 0


def test_a_full_cache_needs_no_endpoint(folder):
    with ChatServer(scripted) as server:
        assert main(arguments(server)) == 0
    before = Path("out.jsonl").read_bytes()
    assert main(arguments(server)) == 0  # the server is gone
    assert Path("out.jsonl").read_bytes() == before


def test_what_is_never_usable_is_reported_by_id_and_never_guessed(folder, capsys):
    def reply(request, dice):
        text = request["messages"][-1]["content"]
        if "has 7 boxes" in text:
            return MALFORMED[0]
        if "has 8 boxes" in text:
            return f"{CLEAN[0]}\n4. It is {8 * 15 - 4}."
        if "has 9 boxes" in text and "<strategy>" in text:
            return "It deserves full marks."
        return scripted_well(request)

    with ChatServer(reply) as server:
        assert main(arguments(server, max_asks=2)) == 1
        reasked = [body for body in server.bodies if "could not be used" in body["messages"][-1]["content"]]
    report = report_of("out.jsonl")
    assert list(report["without_strategy"]) == ["p0", "p1", "p2"]
    assert "three parts" in report["without_strategy"]["p0"][0]
    assert "gave results away: 116" in report["without_strategy"]["p1"][4]
    assert "scores: it must be one JSON object" in report["without_strategy"]["p2"][0]
    assert [row["id"] for row in rows_of("out.jsonl")] == [f"p{i}" for i in range(3, 10)]
    assert report["malformed"]["answers"] == 20
    assert report["leaks"]["leaking_answers"] == 10
    assert report["candidates"] == {
        "wanted": 50,
        "scored": 35,
        "without_usable_strategy": 10,
        "clean_but_unscored": 5,
    }
    assert len(reasked) == 15
    assert any("gave results away: 116" in body["messages"][-1]["content"] for body in reasked)
    assert "none for p0: " in capsys.readouterr().out


def scripted_well(request):
    if "<strategy>" in request["messages"][-1]["content"]:
        return '{"problem_type": 1, "strategy": 0.5, "steps": 0.5, "no_results": 1}'
    return CLEAN[1]


def test_questions_that_get_no_answer_are_reported_and_asked_next_time(folder):
    class Refusing(ChatServer):
        refuse = True

        def fault(self, number, tried, request):
            return "400" if self.refuse and "has 7 boxes" in request["messages"][-1]["content"] else ""

    with Refusing(lambda request, dice: scripted_well(request)) as server:
        assert main(arguments(server, candidates=2)) == 1
        report = report_of("out.jsonl")
        assert report["without_strategy"] == {"p0": [f"candidate {k}: HTTP 400: not today" for k in (1, 2)]}
        assert report["requests"]["failed"] == 2
        server.refuse = False
        assert main(arguments(server, candidates=2)) == 0
    assert report_of("out.jsonl")["requests"] == {"answered": 4, "from_cache": 36, "failed": 0, "retries": {}}


def test_thinking_is_stripped_or_kept(folder):
    with ChatServer(lambda request, dice: scripted_well(request)) as server:
        assert main(arguments(server, candidates=1)) == 0
        assert not any("Hm," in body["messages"][-1]["content"] for body in server.bodies)
        assert main(arguments(server, "kept.jsonl", candidates=1, thinking="keep")) == 0
        assert any("Hm," in body["messages"][-1]["content"] for body in server.bodies)


def test_a_response_that_never_stops_thinking_is_reported(folder):
    rows = rows_of("in.jsonl")
    rows[4]["response"] = "<think>and on and on"
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with ChatServer(lambda request, dice: scripted_well(request)) as server:
        assert main(arguments(server, candidates=1)) == 1
    assert report_of("out.jsonl")["without_strategy"] == {"p4": ["the response has nothing after its thinking part"]}


@pytest.mark.skipif(not TRACES.is_file(), reason="needs ../shared/data")
def test_the_ten_real_responses(folder):
    with ChatServer(scripted, faults=0.3, slow_s=scaled(30.0)) as server:
        assert main(arguments(server, input=TRACES)) == 0
        assert not any("<think>" in body["messages"][-1]["content"] for body in server.bodies)
    rows, report = rows_of("out.jsonl"), report_of("out.jsonl")
    assert [row["id"] for row in rows] == [row["id"] for row in rows_of(TRACES)]
    assert report["leaks"]["answers_by_kind"]["answer"] > 5
    for row in rows:
        assert not re.search(rf"\b{row['answer']}\b|\d", row["strategy"])
        assert set(row["strategy_scores"]) == {"problem_type", "strategy", "steps", "no_results"}


# ---- without an endpoint -------------------------------------------------------------------------------------------


def test_calculator_traces(folder):
    lines = [
        {"id": "a", "problem": "Two boxes of 5?", "answer": "10", "response": "2*5 = <<2*5=10>>10 eggs in total."},
        {"id": "b", "problem": "What?", "answer": "1", "response": "No marks."},
        {"id": "c", "problem": "Who?", "answer": "fitting", "response": "2*5 = <<2*5=10>>10"},
    ]
    Path("in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["strategies", "extract", "--input", "in.jsonl", "--output", "out.jsonl", "--backend", "calculator_trace"]
    assert main(command) == 1
    [problem] = load_problems("out.jsonl")
    assert problem.id == "a"
    assert problem.strategy.startswith("Problem type: ")
    report = report_of("out.jsonl")
    assert "no <<...>> calculator marks" in report["without_strategy"]["b"][0]
    assert "gave results away: fitting" in report["without_strategy"]["c"][0]
    assert report["leaks"]["leaking_answers"] == 1


SHORT = {
    "system": None,
    "extract": "{problem} {solution}",
    "score": "{problem} {solution} {strategy}",
    "again": "{reason}",
}


@pytest.mark.parametrize("engine", ["hf", pytest.param("vllm", marks=NO_VLLM)])
def test_a_local_model_whose_answers_are_malformed_is_reported(folder, builtin_folder, capsys, engine):
    shutil.copytree(builtin_folder, "model")
    Path("short.yaml").write_text(yaml.safe_dump(SHORT))
    rows = [
        {"id": f"p{i}", "problem": f"farm : {i} 2 3 4 . how many boxes ?", "answer": "9", "response": "pick first ."}
        for i in range(3)
    ]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "input": "in.jsonl",
        "output": "out.jsonl",
        "backend": "local",
        "template": "short.yaml",
        "candidates": 2,
        "max_asks": 2,
        "max_tokens": 12,
        "local": {"model": {"path": "model", "dtype": "float32"}, "rollout": {"engine": engine}},
        "local_batch": 4,
    }
    Path("extract.yaml").write_text(yaml.safe_dump(settings))
    assert main(["strategies", "extract", "extract.yaml"]) == 1
    report = report_of("out.jsonl")
    assert Path("out.jsonl").read_text() == ""
    assert list(report["without_strategy"]) == ["p0", "p1", "p2"]
    assert report["malformed"]["answers"] == report["requests"]["answered"] == 12
    assert (
        report["tokens"]["completion"] == sum(row["completion_tokens"] for row in rows_of("out.jsonl.cache.jsonl")) > 0
    )
    assert main(["strategies", "extract", "extract.yaml"]) == 1
    assert report_of("out.jsonl")["requests"]["answered"] == 0
    # Other weights are another model.
    os.utime("model/model.safetensors", ns=(1, 1))
    assert main(["strategies", "extract", "extract.yaml", "--limit", "1"]) == 1
    assert report_of("out.jsonl")["requests"]["answered"] == 4
    assert main(["strategies", "extract", "extract.yaml", "--max_tokens", "250"]) == 1
    assert "exceed the model's 256 positions" in report_of("out.jsonl")["without_strategy"]["p0"][0]


class Cut:
    """A backend whose first answers are well-formed but cut off, and whose next ones never stop thinking."""

    identity, retries = {}, Counter()

    def answer(self, questions, on_result):
        for question in questions:
            text = CLEAN[1] if question.attempt == 0 else f"<think>{CLEAN[1]}"
            on_result(question, Answer(text, "length" if question.attempt == 0 else "stop"))


def test_cut_and_unfinished_answers_are_malformed(tmp_path):
    sampling = Sampling(1.0, 1.0, 9)
    source = Source(Problem("p", "How many?", "7"), "It is 7.", "It is 7.")
    with AnswerCache(tmp_path / "c.jsonl") as cache:
        asker = Asker(Cut(), cache, lambda count: None)
        extraction = Extraction(
            [source],
            Settings(candidates=2, max_asks=2, sampling=sampling, scoring=sampling, seed=0),
            Templates.load(),
            asker,
            after_thinking=after_thinking,
            equal=lambda pairs: [False] * len(pairs),
        )
        [candidates] = extraction.run()
    assert [candidate.strategy for candidate in candidates] == [None, None]
    assert {reason[:16] for reason in extraction.tally.malformed} == {"it was cut off a", "its thinking par"}
    assert asker.usage.without_token_count == 4


class Letters:
    """A tokenizer whose ids are code points."""

    chat_template = "x"

    def apply_chat_template(self, turns, **options):
        assert options == {"tokenize": True, "add_generation_prompt": True, "return_dict": False}
        return [ord(letter) for letter in "".join(f"{turn['role']}>{turn['content']};" for turn in turns)]

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return "".join(map(chr, ids))


class Parrot:
    """A rollout engine that repeats the prompt; it stops early where the prompt is short."""

    def __init__(self):
        self.calls = []

    def generate(self, requests, sampling, on_progress=None, on_rollout=None):
        self.calls.append((len(requests), sampling.temperature))
        for r in reversed(requests):
            cut = len(r.prompt_ids) > sampling.max_new_tokens
            on_rollout(Rollout(r, r.prompt_ids[: sampling.max_new_tokens], (), cut, 0))


def test_the_local_backend_batches_and_keeps_the_order():
    engine = Parrot()
    backend = LocalBackend(engine, Letters(), identity={}, max_positions=60, batch=2)
    questions = [Question((("user", f"{i}" * n),), Sampling(t, 1.0, 20), i, 0, i) for i, (n, t) in enumerate(SIZES)]
    results = {}
    backend.answer(questions, lambda question, result: results.setdefault(question.index, result))
    assert results[0] == Answer("user>0;", "stop", 7, 7)
    assert results[1] == Answer("user>" + "1" * 15, "length", 36, 20)
    assert isinstance(results[2], Failure)
    assert [results[i].text for i in (3, 4)] == ["user>3;", "user>4;"]
    assert engine.calls == [(2, 0.5), (1, 0.5), (1, 0.0)]


SIZES = [(1, 0.5), (30, 0.5), (99, 0.5), (1, 0.5), (1, 0.0)]


# ---- bad input -----------------------------------------------------------------------------------------------------

BAD = [
    (["--input", "none.jsonl"], "No data file at none.jsonl"),
    (["--response_key", "trace"], "10 rows lack a text under 'trace' (first: p0, p1, p2)"),
    (["--endpoint.model", "''"], "endpoint.model is required"),
    (["--endpoint.api_key_env", "NO_SUCH_KEY"], "NO_SUCH_KEY holds no key"),
    (["--endpoint.base_url", "http://127.0.0.1:9/v1"], "cannot be reached"),
    (["--endpoint.base_url", "nowhere"], "must be like https://"),
    (["--endpoint.concurency", "3"], "did you mean 'endpoint.concurrency'"),
    (["--candidates", "0"], "candidates"),
    (["--candidates"], "lacks a value"),
    (["--thinking", "maybe"], "thinking"),
    (["--template", "none.yaml"], "the strategy template none.yaml cannot be read"),
    (["--backend", "local"], "local: model is required"),
    (["--backend", "local", "--local.model.path", "nowhere"], "model folder nowhere does not exist"),
    (["--backend", "local", "--local.model.pth", "x"], "local: model.path is required; local: unknown key 'model.pth'"),
    (["--backend", "local", "--local.rollout", "hf"], "local.rollout must be a section"),
    (["--output", "in.jsonl/out.jsonl"], "cannot be made"),
    (["stray"], "stray"),
]


@pytest.mark.parametrize(("words", "expected"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_bad_input_is_one_sentence_before_anything_is_asked(folder, capsys, words, expected):
    with ChatServer(scripted) as server:
        assert main([*arguments(server), *words]) == 2
        assert server.log == []
    errors = capsys.readouterr().err
    assert errors.count("sgpo: ") == 1
    assert expected in errors
    assert "Traceback" not in errors
    assert not Path("out.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "command line: input is required; command line: output is required"),
        (["none.yaml"], "config none.yaml does not exist"),
        (["bad.yaml"], "bad.yaml: unknown key 'inptu'; did you mean 'input'"),
    ],
)
def test_missing_settings(folder, capsys, words, expected):
    Path("bad.yaml").write_text("inptu: x")
    assert main(["strategies", "extract", *words]) == 2
    assert expected in capsys.readouterr().err


def test_a_row_without_response_is_named(folder, capsys):
    rows = rows_of("in.jsonl")
    del rows[3]["response"]
    rows[5]["response"] = " "
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with ChatServer(scripted) as server:
        assert main(arguments(server)) == 2
    assert "2 rows lack a text under 'response' (first: p3, p5)" in capsys.readouterr().err


def test_help_lists_every_knob(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["strategies", "extract", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for key in known_keys(ExtractConfig):
        assert f"--{key} " in text
