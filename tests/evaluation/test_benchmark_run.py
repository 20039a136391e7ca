"""`sgpo eval` on benchmarks with the built-in model: protocol, resumption, refusals, contamination, comparison."""

import json
import os
import shutil
import signal
import subprocess
import sys
from datetime import datetime

import pytest
from processes import wait_until
from transformers.utils import chat_template_utils

from sgpo import cli
from sgpo.builders.rollouts import build_rollouts
from sgpo.commands.eval import evaluate_benchmarks, evaluate_model, load_eval_config
from sgpo.data.builtin import CHAT_TEMPLATE, make_problems
from sgpo.data.prompt_template import PromptTemplate
from sgpo.evaluation.benchmark_run import model_fingerprint, protocol_of
from sgpo.evaluation.benchmarks import PAPER
from sgpo.model.loading import load_tokenizer
from sgpo.types import SgpoError

REWARD = """
import os, time

def even(completion, answer, problem):
    time.sleep(float(os.environ.get("REWARD_SLEEP_S", "0")))
    return float(len(completion.split()) % 2 == 0)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with two benchmarks and a reward that varies."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "plugin.py").write_text(REWARD)
    problems = make_problems("eval", seed=0, count=6)
    for name, rows in (("one", problems), ("two", problems[:2])):
        lines = [json.dumps({"id": p.id, "problem": p.problem, "answer": p.answer}) for p in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def words(model, *more):
    fixed = {
        "model.path": model, "model.dtype": "float32", "rollout.engine": "hf", "rollout.max_batch_tokens": 512,
        "reward.kind": "plugin:even", "reward.workers": 1, "eval.benchmarks": "one=one.jsonl,two=two.jsonl",
        "eval.benchmark_samples": 4, "eval.max_new_tokens": 12, "eval.temperature": 1.0, "run.seed": 5,
    }  # fmt: skip
    return [*(f"--{key}={value}" for key, value in fixed.items()), *more]


def run(model, out, *more):
    lines = []
    results = evaluate_benchmarks(load_eval_config(None, words(model, *more)), out, lines.append)
    return results, lines


@pytest.fixture
def requested(monkeypatch):
    """The requests that reach the engine."""
    seen = []
    build = build_rollouts

    def spy(*arguments, **options):
        engine = build(*arguments, **options)
        generate = engine.generate
        engine.generate = lambda requests, *rest: seen.extend(requests) or generate(requests, *rest)
        return engine

    monkeypatch.setattr("sgpo.builders.rollouts.build_rollouts", spy)
    return seen


def content(path):
    """Header and rows; rows in any order."""
    header, *rows = path.read_text().splitlines()
    return header, sorted(rows)


def test_a_killed_evaluation_goes_on_and_ends_as_the_undisturbed_one(folder, builtin_folder, requested):
    whole, _ = run(builtin_folder, folder / "whole")
    assert len(requested) == 8 * 4
    command = [sys.executable, "-m", "sgpo.cli", "eval", *words(builtin_folder), "--out", "killed"]
    slow = {
        **os.environ,
        "REWARD_SLEEP_S": "0.2",
    }  # not over before it is killed, on a busy machine too
    process = subprocess.Popen(command, env=slow, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = folder / "killed" / "one.jsonl"

    def under_way():
        assert process.poll() is None
        return first.exists() and first.read_bytes().count(b"\n") > 4

    wait_until(under_way, "four rows")
    process.send_signal(signal.SIGKILL)
    process.wait()
    rows = first.read_bytes()
    there = rows.count(b"\n") - 1
    first.write_bytes(rows[: rows.rfind(b"\n") + 1] + b'{"id": "torn')
    second = folder / "killed" / "two.jsonl"
    there += max(0, second.read_bytes().count(b"\n") - 1) if second.exists() else 0

    requested.clear()
    resumed, lines = run(builtin_folder, folder / "killed")
    assert 4 <= there < 32
    assert len(requested) == 32 - there
    assert any("of 24 samples are there" in line for line in lines)
    for name in ("one.jsonl", "two.jsonl"):
        assert content(folder / "killed" / name) == content(folder / "whole" / name)
    assert [result.score for result in resumed] == [result.score for result in whole]
    assert 0 < whole[0].score.accuracy < 1  # the samples do differ

    requested.clear()
    assert [result.score for result in run(builtin_folder, folder / "killed")[0]] == [r.score for r in whole]
    assert not requested


def test_another_setting_is_refused_and_names_what_differs(folder, builtin_folder, tmp_path_factory):
    out = folder / "out"
    small = ("--eval.benchmarks=two=two.jsonl", "--eval.benchmark_samples=1", "--eval.max_new_tokens=2")
    run(builtin_folder, out, *small)
    before = (out / "two.jsonl").read_bytes()
    for other, named in (
        ("--eval.temperature=0.5", "temperature: 1.0, now 0.5"),
        ("--eval.benchmark_samples=2", "samples: 1, now 2"),
        ("--run.seed=6", "seed: 5, now 6"),
        ("--eval.benchmark_limit=1", "problem_count: 2, now 1"),
        ("--reward.kind=exact", 'reward: "plugin:even", now "exact"'),
    ):
        with pytest.raises(SgpoError, match="another setting") as caught:
            run(builtin_folder, out, *small, other)
        assert named in str(caught.value)
    (folder / "template.yaml").write_text("system: null\nplain: '{problem}'\nguided: '{strategy} {problem}'\n")
    with pytest.raises(SgpoError, match="prompts: "):
        run(builtin_folder, out, *small, "--data.template=template.yaml")
    rows = (folder / "two.jsonl").read_text()
    (folder / "two.jsonl").write_text(rows.replace('"answer": "', '"answer": "1'))
    with pytest.raises(SgpoError, match="problems: "):
        run(builtin_folder, out, *small)
    assert (out / "two.jsonl").read_bytes() == before


def test_a_model_of_ours_is_evaluated_with_the_prompts_of_its_training(folder, builtin_folder, requested):
    small = ("--eval.benchmarks=two=two.jsonl", "--eval.benchmark_samples=1", "--eval.max_new_tokens=2")
    run(builtin_folder, folder / "packaged", *small)
    trained = folder / "best"
    shutil.copytree(builtin_folder, trained)
    own = PromptTemplate(system=None, plain="type : {problem}", guided="{strategy} {problem}")
    (trained / "prompt_template.yaml").write_text(own.as_yaml())
    _, lines = run(trained, folder / "own", *small)
    assert f"prompts: as the model was trained, by {trained}/prompt_template.yaml" in lines
    words = load_tokenizer(builtin_folder)
    assert [words.decode(r.prompt_ids).count("user type :") for r in requested] == [0, 0, 1, 1]
    (folder / "template.yaml").write_text(PromptTemplate.load().as_yaml())
    _, lines = run(trained, folder / "other", *small, "--data.template=template.yaml")
    assert lines[0].startswith("prompts: not as the model was trained")
    assert requested[-1].prompt_ids == requested[1].prompt_ids
    assert json.loads((folder / "other" / "summary.json").read_text())["prompt_template"] == "template.yaml"


def test_what_the_prompt_opens_is_judged_and_the_day_does_not_matter(folder, builtin_folder, requested, monkeypatch):
    model = folder / "thinker"
    shutil.copytree(builtin_folder, model)
    for path in model.glob("chat_template*"):
        path.unlink()
    settings = json.loads((model / "tokenizer_config.json").read_text())
    dated = "{{ '<|im_start|>system\n' + strftime_now('%d') + '<|im_end|>\n' }}"
    settings["chat_template"] = dated + CHAT_TEMPLATE.replace("assistant\n", "assistant\n<think>\n")
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "plugin.py").write_text(
        "def even(completion, answer, problem):\n    return float(completion.startswith('<think>\\n'))\n"
    )
    small = ("--eval.benchmarks=two=two.jsonl", "--eval.benchmark_samples=1", "--eval.max_new_tokens=2")
    (first,), lines = run(model, folder / "out", *small)
    assert first.score.accuracy == 1.0
    assert any("writes the date into the prompt" in line for line in lines)
    held_out = evaluate_model(
        load_eval_config(None, words(model, "--eval.benchmarks=", "--data.eval=two.jsonl", "--eval.samples=1"))
    )
    assert held_out["auto"].accuracy == 1.0

    monkeypatch.setattr(
        chat_template_utils, "datetime", type("Later", (datetime,), {"now": lambda: datetime(2031, 1, 2)})
    )
    requested.clear()
    (again,), _ = run(model, folder / "out", *small)
    assert again.score == first.score
    assert requested == []  # the samples of another day are those of this one


def test_the_fingerprint_follows_the_weights_and_not_the_path(builtin_folder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in builtin_folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert model_fingerprint(copy) == model_fingerprint(builtin_folder)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert model_fingerprint(copy) != model_fingerprint(builtin_folder)


def test_the_default_protocol_is_the_papers():
    config = load_eval_config(None, ["--model.path=m", "--eval.benchmarks=math500,amc23", "--rollout.engine=hf"])
    assert config.eval.benchmarks == ("math500", "amc23")
    assert (config.eval.temperature, config.eval.top_p, config.eval.max_new_tokens) == (0.6, 0.95, 32768)
    assert (PAPER.temperature, PAPER.top_p, PAPER.max_new_tokens) == (0.6, 0.95, 32768)
    names = ("math500", "amc23", "aime24", "olympiadbench", "gsm8k")
    assert protocol_of(config, list(zip(names, (4, 32, 32, 4, 4), strict=True))) == "paper"
    assert protocol_of(config, [("amc23", 4)]) == "paper, but amc23 avg@4"
    changed = load_eval_config(None, ["--model.path=m", "--eval.temperature=0", "--rollout.engine=hf"])
    assert protocol_of(changed, [("math500", 4)]) == "paper, but temperature 0.0"


def test_contaminated_rows_are_reported_scored_apart_or_refused(folder, builtin_folder):
    rows = [json.loads(line) for line in (folder / "two.jsonl").read_text().splitlines()]
    rows[0]["id"] = "seen"
    (folder / "train.jsonl").write_text(json.dumps(rows[0]))
    small = ("--eval.benchmarks=two=two.jsonl", "--eval.benchmark_samples=1", "--eval.max_new_tokens=2")
    (result,), lines = run(builtin_folder, folder / "out", *small, "--data.train=train.jsonl")
    assert lines[0].startswith("two: 1 of 2 problems are in the training data:")
    assert [(m.train_id, m.how) for m in result.contaminated] == [("seen", "exact")]
    assert result.clean is not None
    assert (result.score.problems, result.clean.problems) == (2, 1)
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert summary["benchmarks"]["two"]["contaminated"][0]["train_id"] == "seen"
    with pytest.raises(SgpoError, match="1 of 2 problems are in the training data"):
        run(builtin_folder, folder / "out", *small, "--data.train=train.jsonl", "--eval.contamination=refuse")
    (result,), lines = run(
        builtin_folder, folder / "out", *small, "--data.train=train.jsonl", "--eval.contamination=off"
    )
    assert result.clean is None
    assert lines == ["two: 2 of 2 samples are there"]


def test_a_reward_that_never_works_is_an_error(folder, builtin_folder):
    (folder / "plugin.py").write_text("def even(completion, answer, problem):\n    raise KeyError('x')\n")
    with pytest.raises(SgpoError, match=r"no result on any of the 2 new samples .*KeyError"):
        run(builtin_folder, folder / "out", "--eval.benchmarks=two=two.jsonl", "--eval.benchmark_samples=1")


def test_the_command_evaluates_and_compares(folder, builtin_folder, capsys):
    small = ("--eval.benchmark_samples=2", "--eval.max_new_tokens=4")
    for name, seed in (("a", 1), ("b", 2)):
        assert cli.main(["eval", *words(builtin_folder, *small, f"--run.seed={seed}"), "--out", name]) == 0
    printed = capsys.readouterr().out
    assert "one: avg@2 " in printed
    assert "pass@2 " in printed
    assert "average: " in printed
    assert "protocol: paper, but temperature 1.0, max_new_tokens 4, one avg@2, two avg@2" in printed
    assert cli.main(["eval", "--compare", "a", "b", "--out", "comparison.json"]) == 0
    printed = capsys.readouterr().out
    assert "permutation p = " in printed
    assert "settings differ: seed: 1, now 2" in printed
    assert [row["benchmark"] for row in json.loads((folder / "comparison.json").read_text())] == ["one", "two"]
    assert cli.main(["eval", "--compare", "a/one.jsonl", "b/two.jsonl"]) == 2
    assert "only the same problems can be compared" in capsys.readouterr().err
    assert cli.main(["eval", *words(builtin_folder, "--eval.benchmarks=math50")]) == 2
    assert "did you mean 'math500'?" in capsys.readouterr().err
    assert cli.main(["eval", *words(builtin_folder, "--eval.benchmarks=one=one.jsonl,one=two.jsonl")]) == 2
    assert "names one twice" in capsys.readouterr().err
    assert cli.main(["eval", *words(builtin_folder, "--eval.benchmarks=")]) == 2
    assert "needs data.eval or eval.benchmarks" in capsys.readouterr().err
