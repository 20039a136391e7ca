"""`sgpo strategies analyze` on a model whose answers are known: it does what the strategy says, and guesses without.

Four types of problem (the place), each with its move and its number; a strategy names the move. Trained here in two
seconds: guided prompts follow the named move, plain prompts are uniform over the four.
"""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from processes import wait_until
from transformers import AutoModelForCausalLM

from sgpo.cli import main
from sgpo.data import builtin
from sgpo.data.prompts import PromptBuilder, PromptTemplate
from sgpo.engine.batching import collate
from sgpo.types import Problem

TEMPLATE = Path(builtin.__file__).parent / "templates" / "builtin.yaml"
MOVES = dict(zip(builtin.PLACES, ("first", "second", "third", "fourth"), strict=True))
SAMPLES, PER_TYPE, DRAWS = 6, 4, 3
COMPLETIONS = 5 * SAMPLES * 4 * PER_TYPE + 16 * DRAWS


def strategy(move: str) -> str:
    return f"type : digits . strategy : pick {move} . steps : take {move} ."


def completion(move: str) -> str:
    return f"take {move} : \\boxed{{{list(MOVES.values()).index(move) + 1}}}"


def problem(place: str, digit: int) -> Problem:
    move = MOVES[place]
    answer = str(list(MOVES.values()).index(move) + 1)
    return Problem(f"{place}-{digit}", f"{place} : {digit} . how many boxes ?", answer, strategy=strategy(move))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    rng = random.Random(0)
    model, tokenizer = builtin.make_model(seed=0, hidden=32), builtin.make_tokenizer()
    builder = PromptBuilder(tokenizer, PromptTemplate.load(str(TEMPLATE)), max_prompt_tokens=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    steps = 160
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        prompts, completions = [], []
        for k in range(32):
            move = rng.choice(list(MOVES.values()))
            question = Problem("x", problem(rng.choice(list(MOVES)), rng.randint(1, 9)).problem, "1", strategy(move))
            pair = builder.build(question)
            prompts.append(pair.guided if k % 2 else pair.plain)
            completions.append([*tokenizer.encode(completion(move), add_special_tokens=False), tokenizer.eos_token_id])
        batch = collate(prompts, completions, tokenizer.pad_token_id)
        states = model.base_model(input_ids=batch.input_ids).last_hidden_state.flatten(0, 1)[batch.rows]
        loss = torch.nn.functional.cross_entropy(model.lm_head(states), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("follower") / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def config(tmp_path, model_folder) -> Path:
    """A config file in tmp_path, with four problems of each type beside it."""
    rows = [problem(place, digit) for digit in range(1, PER_TYPE + 1) for place in MOVES]
    lines = [
        json.dumps({
            "id": p.id, "problem": p.problem, "answer": p.answer, "strategy": p.strategy, "place": p.problem.split()[0],
            "strategy_score": 0.5 + 0.1 * (i % 4),
        })
        for i, p in enumerate(rows)
    ]  # fmt: skip
    (tmp_path / "problems.jsonl").write_text("\n".join(lines) + "\n")
    content = {
        "model": {"path": str(model_folder), "dtype": "float32"},
        "data": {"train": str(tmp_path / "problems.jsonl"), "template": str(TEMPLATE), "max_prompt_tokens": 64},
        "rollout": {"engine": "hf", "temperature": 0.8, "top_p": 1.0, "max_new_tokens": 12},
        "reward": {"kind": "exact", "workers": 1},
        "engine": {"micro_batch_tokens": 512},
        "analyze": {
            "output": str(tmp_path / "out"), "types": "place", "samples": SAMPLES, "matrix_draws": DRAWS,
            "step_pattern": "(?=: )",
        },
    }  # fmt: skip
    path = tmp_path / "analyze.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def run(config: Path, *overrides: str) -> dict:
    assert main(["strategies", "analyze", str(config), *overrides]) == 0
    return json.loads((config.parent / "out" / "analysis.json").read_text())


def samples(config: Path, output: str = "out") -> list[dict]:
    return [json.loads(line) for line in (config.parent / output / "samples.jsonl").read_text().splitlines()]


def test_the_known_outcome(config, model_folder, capsys):
    found = run(config)
    rate = {arm["arm"]: arm["rate"]["mean"] for arm in found["arms"]}
    assert rate["own"] > 0.95
    assert rate["same_type"] > 0.95
    assert rate["other_type"] < 0.05
    assert rate["placeholder"] < 0.5
    assert 0.1 < rate["none"] < 0.45  # a guess of four, 96 completions
    assert {arm["arm"]: arm["excluded_problems"] for arm in found["arms"]} == dict.fromkeys(rate, 0)
    assert found["placeholder_excess_tokens"] == {"exact": 16, "least": 0, "most": 0}
    _check_effects(found)
    _check_matrix_and_clusters(found)
    _check_token_kl(found, config, model_folder)
    _check_files(config, capsys.readouterr().out)


def _check_effects(found: dict) -> None:
    contrast = {(row["first"], row["second"]): row for row in found["contrasts"]}
    gain = contrast["own", "none"]
    assert gain["difference"]["low"] > 0.4
    assert gain["p_value"] < 1e-3
    assert abs(contrast["own", "same_type"]["difference"]["mean"]) < 0.05
    own = next(row for row in found["help_and_harm"] if row["arm"] == "own")
    assert own["higher"] >= 14
    assert own["lower"] == 0
    assert own["higher_by_chance"] < 8
    same = next(arm for arm in found["arms"] if arm["arm"] == "same_type")
    assert same["identical_guidance"] == 1.0  # problems of a type have one strategy here, and the report says so
    bands = found["quality"]["by_score"]
    assert [band["items"] for band in bands] == [4] * 4
    assert bands[0]["low"] == 0.5
    assert found["quality"]["by_leak"]["leaks"]["problems"] == 0


def _check_matrix_and_clusters(found: dict) -> None:
    assert len(found["matrix"]) == 16
    for cell in found["matrix"]:
        assert cell["draws"] == DRAWS
        rate = cell["rate"]["mean"]
        assert rate > 0.6 if cell["strategy_type"] == cell["problem_type"] else rate < 0.4
    assert found["clusters"]["adjusted_rand_index"] == 1.0
    assert found["clusters"]["different_texts"] == 4
    assert found["clusters"]["with_near_duplicate"] == 16
    alike = found["similarity_bands"][-1]
    assert alike["low"] == alike["high"] == 1.0
    assert alike["effect"]["low"] > 0.4
    assert found["similarity_bands"][0]["effect"]["high"] < 0


def _check_token_kl(found: dict, config: Path, model_folder: Path) -> None:
    """Guided the move is certain, plain it is one of four: ln 4 nats at that token, hardly anything elsewhere."""
    kl = found["token_kl"]
    assert kl["rollouts"] >= 90
    assert kl["problems"] == 16
    rows = [json.loads(line) for line in (config.parent / "out" / "token_kl.jsonl").read_text().splitlines()]
    correct = {(row["problem_id"], row["sample"]) for row in samples(config) if row["arm"] == "own" and row["reward"]}
    assert {(row["problem_id"], row["sample"]) for row in rows} == correct
    assert sorted(kl["by_step"][0]["kl"]) == ["high", "low", "mean", "problems"]
    clean = [row for row in rows if len(row["pieces"]) == 7]  # take MOVE : \boxed{ N } and the end
    assert len(clean) > 0.9 * len(rows)
    at_move = sum(row["kl"][1] for row in clean) / len(clean)
    assert at_move == pytest.approx(math.log(4), abs=0.25)
    assert sum(row["kl"][1] for row in clean) > 0.85 * sum(sum(row["kl"]) for row in clean)
    assert kl["above_share"] == pytest.approx(1 / 7, abs=0.04)
    assert kl["by_step"][0]["kl"]["mean"] > 8 * kl["by_step"][1]["kl"]["mean"]
    assert {row["text"].strip() for row in kl["top_tokens"][:4]} == set(MOVES.values())
    _recompute(rows[:6], config, model_folder)


def _recompute(rows: list[dict], config: Path, model_folder: Path) -> None:
    """KL of the whole distributions in plain torch, at the sampling temperature 0.8."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    builder = PromptBuilder(builtin.make_tokenizer(), PromptTemplate.load(str(TEMPLATE)), max_prompt_tokens=64)
    ids = {(row["problem_id"], row["sample"]): row["completion_ids"] for row in samples(config) if row["arm"] == "own"}
    for row in rows:
        completion_ids = ids[row["problem_id"], row["sample"]]
        place, digit = row["problem_id"].split("-")
        pair = builder.build(problem(place, int(digit)))
        logs = []
        for prompt in (pair.plain, pair.guided):
            logits = model(torch.tensor([[*prompt, *completion_ids]])).logits[0, len(prompt) - 1 : -1]
            logs.append((logits / 0.8).log_softmax(-1).detach())
        plain, guided = logs
        expected = (guided.exp() * (guided - plain)).sum(-1)
        torch.testing.assert_close(torch.tensor(row["kl"]), expected, atol=1e-5, rtol=1e-4)


def _check_files(config: Path, printed: str) -> None:
    rows = samples(config)
    assert len(rows) == COMPLETIONS == len({row["key"] for row in rows})
    by_id = {row["id"]: row for row in map(json.loads, (config.parent / "problems.jsonl").read_text().splitlines())}
    for row in rows:
        wanted = f"\\boxed{{{by_id[row['problem_id']]['answer']}}}"
        assert (row["reward"] > 0) == (wanted in row["text"])
        assert (row["strategy_of"] is None) == (row["arm"] in ("none", "own", "placeholder"))
        if row["strategy_of"] and row["arm"] != "matrix":
            same = by_id[row["strategy_of"]]["place"] == by_id[row["problem_id"]]["place"]
            assert same == (row["arm"] == "same_type")
            assert row["strategy_of"] != row["problem_id"]
    lengths = {(row["problem_id"], row["arm"]): row["prompt_tokens"] for row in rows}
    assert all(lengths[i, "own"] == lengths[i, "placeholder"] > lengths[i, "none"] for i in by_id)
    table = [json.loads(line) for line in (config.parent / "out" / "problems.jsonl").read_text().splitlines()]
    assert [row["id"] for row in table] == list(by_id)
    assert all(row["rate_own"] > 0.6 for row in table)
    page = (config.parent / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 7
    assert "left out" not in page
    assert "same_type: " in printed
    assert f"samples {COMPLETIONS}/{COMPLETIONS}" in printed


def test_a_second_run_samples_nothing_and_another_reward_judges_what_is_there(config, monkeypatch):
    small = ["--analyze.samples", "2", "--analyze.matrix_draws", "0"]
    first = run(config, *small)
    kept = samples(config)
    assert len(kept) == 5 * 2 * 16
    assert first["matrix"] == []
    monkeypatch.setattr("sgpo.analysis.samples.build_rollouts", lambda *_: pytest.fail("an engine was started"))
    again = run(config, *small)
    assert samples(config) == kept
    assert again["arms"] == first["arms"]
    assert again["token_kl"] == first["token_kl"]
    # Another reward judges the same completions; types by similarity here are the stated ones.
    other = run(config, *small, "--reward.kind", "math_verify", "--analyze.types", "clusters")
    assert len(samples(config)) == 2 * len(kept)
    assert {row["key"] for row in samples(config)} == {row["key"] for row in kept}
    assert [arm["rate"]["mean"] for arm in other["arms"]] == [arm["rate"]["mean"] for arm in first["arms"]]


def test_after_a_kill_it_goes_on_and_ends_as_if_undisturbed(config):
    slow = [
        "--rollout.max_batch_tokens",
        "1024",
        "--analyze.samples",
        "3",
    ]  # small batches, so that the kill comes between two of them
    assert main(["strategies", "analyze", str(config), "--analyze.output", str(config.parent / "straight"), *slow]) == 0
    command = [sys.executable, "-m", "sgpo.cli", "strategies", "analyze", str(config), *slow]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    file = config.parent / "out" / "samples.jsonl"

    def under_way():
        assert process.poll() is None
        return file.exists() and file.read_bytes().count(b"\n") >= 20

    wait_until(under_way, "twenty samples")
    process.kill()
    process.wait()
    left = samples_whole(file)
    completions = 5 * 3 * 4 * PER_TYPE + 16 * DRAWS
    assert 20 <= len(left) < completions
    resumed = run(config, *slow)
    rows, straight = samples(config), samples(config, "straight")
    assert rows[: len(left)] == left
    assert len(rows) == completions
    assert {row["key"]: row["text"] for row in rows} == {row["key"]: row["text"] for row in straight}
    whole = json.loads((config.parent / "straight" / "analysis.json").read_text())
    assert resumed["arms"] == whole["arms"]
    assert resumed["contrasts"] == whole["contrasts"]


def samples_whole(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--analyze.split", "eval"], "analyze.split: eval needs data.eval"),
        (["--analyze.types", "topic"], "no row has a field 'topic'"),
        (["--data.train_limit", "1"], "has 1 problems with a strategy; transfer needs at least two"),
        (["--rollout.max_new_tokens", "250"], "more than 256, the positions of"),
        (["--analyze.step_pattern", "("], "analyze.step_pattern: not a regular expression"),
        (["--analyze.sample", "3"], "did you mean 'analyze.samples'?"),
    ],
)
def test_mistakes_are_told_before_anything_is_sampled(config, capsys, overrides, message):
    assert main(["strategies", "analyze", str(config), *overrides]) == 2
    assert message in capsys.readouterr().err
    assert not (config.parent / "out").exists()


SHORT = ("--analyze.samples", "1", "--analyze.matrix_draws", "0", "--analyze.kl_rollouts", "0")


def test_hidden_states_tell_the_types_as_well(config):
    found = run(config, *SHORT, "--analyze.similarity", "hidden")
    assert found["clusters"]["adjusted_rand_index"] == 1.0
    assert found["token_kl"] is None
    page = (config.parent / "out" / "report.html").read_text()
    assert "analyze.matrix_draws is 0" in page
    assert "analyze.kl_rollouts is 0" in page


def test_one_type_leaves_the_other_type_out(config):
    found = run(config, *SHORT, "--analyze.types", "stated")  # all of them state "digits"
    arms = {arm["arm"]: arm for arm in found["arms"]}
    assert arms["other_type"]["rate"]["mean"] is None
    assert (arms["other_type"]["excluded_problems"], arms["same_type"]["excluded_problems"]) == (16, 0)
    assert arms["same_type"]["rate"]["mean"] < 0.7  # a type too coarse: most partners name another move
    assert ("same_type", "other_type") not in {(row["first"], row["second"]) for row in found["contrasts"]}
