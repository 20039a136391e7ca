"""The built-in task: splits, what the demonstrations teach and hide, tokenizer round trips, the saved folder."""

import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

from sgpo.data import builtin
from sgpo.data.builtin import FAMILIES, PROCEDURES, make_demonstrations, make_problems
from sgpo.types import SgpoError

TEMPLATE = Path(builtin.__file__).parent / "templates" / "builtin.yaml"


def _digits(text: str) -> tuple[int, ...]:
    return tuple(int(digit) for digit in re.findall(r"\d", text))


def _boxed(text: str) -> str:
    return re.findall(r"\\boxed\{(\d+)\}", text)[-1]


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("transformers")
    return builtin.make_tokenizer()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("builtin")
    builtin.save_builtin(folder, seed=3)
    return folder


def test_procedures_by_hand():
    assert builtin.run_procedure(("first", "third", "sum", "double"), (3, 8, 2, 5)) == (3, 2, 5, 10)
    assert builtin.run_procedure(("second", "fourth", "gap", "triple"), (3, 4, 2, 9)) == (4, 9, 5, 15)


def test_every_family_has_a_procedure_of_its_own_and_the_problem_its_answer():
    assert len(FAMILIES) == 16
    assert {family.procedure for family in FAMILIES} == set(PROCEDURES)
    by_name = {f"{family.place} {family.thing}": family for family in FAMILIES}
    for problem in make_problems("train", seed=0, count=160):
        family = by_name[problem.extra["family"]]
        assert problem.strategy == builtin.strategy_text(family.procedure)
        answers = [builtin.run_procedure(other, _digits(problem.problem))[-1] for other in PROCEDURES]
        assert problem.answer == str(answers[PROCEDURES.index(family.procedure)])
        assert answers.count(int(problem.answer)) == 1, "another procedure reaches the same answer"


def test_worked_chain_by_hand():
    family = builtin.Family("farm", "boxes", ("first", "third", "sum", "double"))
    chain = builtin.worked_chain(family, family.procedure, (3, 8, 2, 5))
    assert chain == "left farm first 3 right farm third 2 join boxes sum 5 scale boxes double 10 \\boxed{10}"


def test_evaluation_digits_occur_in_no_training_problem_and_no_demonstration():
    held_out = {_digits(problem.problem) for problem in make_problems("eval", seed=0, count=4000)}
    train = {_digits(problem.problem) for problem in make_problems("train", seed=0, count=8000)}
    demonstrated = {_digits(demo.problem.problem) for demo in make_demonstrations(seed=0, count=8000)}
    assert len(held_out) > 1000
    assert not held_out & (train | demonstrated)


def test_problems_are_unique_and_the_families_even():
    problems = make_problems("train", seed=1, count=480)
    assert len({problem.id for problem in problems}) == 480
    assert len({problem.problem for problem in problems}) == 480
    assert set(Counter(problem.extra["family"] for problem in problems).values()) == {30}


def test_same_seed_same_rows_other_seed_other_rows():
    assert make_problems("eval", seed=2, count=50) == make_problems("eval", seed=2, count=50)
    assert make_problems("eval", seed=2, count=50) != make_problems("eval", seed=3, count=50)
    assert make_demonstrations(seed=2, count=50) == make_demonstrations(seed=2, count=50)
    assert make_demonstrations(seed=2, count=50) != make_demonstrations(seed=3, count=50)


def test_strategies_hold_no_number():
    assert not any(re.search(r"\d", builtin.strategy_text(procedure)) for procedure in PROCEDURES)
    assert len({builtin.strategy_text(procedure) for procedure in PROCEDURES}) == len(PROCEDURES)


def test_demonstrations_execute_their_strategy_and_end_in_their_answer():
    demos = make_demonstrations(seed=0, count=200)
    assert [demo.guided for demo in demos[:4]] == [True, False, True, False]
    for demo in demos:
        assert _boxed(demo.completion) == demo.problem.answer
        assert (demo.problem.strategy is not None) == demo.guided
        if demo.guided:
            moves = tuple(demo.completion.split()[2:16:4])
            assert demo.problem.strategy == builtin.strategy_text(moves)


def test_demonstrations_do_not_reveal_which_family_needs_which_procedure():
    """For each place and thing, each of its two moves is shown about half the time, guided or not."""
    shown: Counter[tuple[bool, str, str]] = Counter()
    for demo in make_demonstrations(seed=0, count=16000):
        words = demo.completion.split()
        shown.update((demo.guided, words[4 * step + 1], words[4 * step + 2]) for step in range(4))
    assert len(shown) == 2 * 8 * 4
    for guided, word, move in shown:
        pair = next(pair for pair in builtin.MOVES if move in pair)
        share = shown[guided, word, move] / sum(shown[guided, word, other] for other in pair)
        assert abs(share - 0.5) < 0.06, (guided, word, move)


def test_wrong_counts_are_user_errors():
    with pytest.raises(SgpoError, match=r"count must lie in 1\.\.\d+, got 1000000"):
        make_problems("eval", seed=0, count=1_000_000)
    with pytest.raises(SgpoError, match="got 0"):
        make_problems("train", seed=0, count=0)
    with pytest.raises(SgpoError, match="got 0"):
        make_demonstrations(seed=0, count=0)


def test_tokenizer_knows_every_word_and_gives_texts_back(tokenizer):
    demos = make_demonstrations(seed=0, count=2000)
    problems = make_problems("eval", seed=0, count=400)
    texts = [demo.completion for demo in demos]
    texts += [f"{problem.strategy}\n{problem.problem}" for problem in problems]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.unk_token_id not in ids, text
        assert tokenizer.decode(ids) == text.replace("\n", " ")
    with_end = [*tokenizer.encode(demos[0].completion), tokenizer.eos_token_id]
    assert tokenizer.decode(with_end, skip_special_tokens=True) == demos[0].completion
    assert max(len(tokenizer.encode(demo.completion)) for demo in demos) + 1 <= 20


def test_template_words_and_chat_tail(tokenizer):
    template = yaml.safe_load(TEMPLATE.read_text(encoding="utf-8"))
    assert template["system"] is None
    problem = make_problems("train", seed=0, count=1)[0]
    rendered = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": template[key].format(problem=problem.problem, strategy=problem.strategy)}],
            add_generation_prompt=True,
            return_dict=True,
        )["input_ids"]
        for key in ("plain", "guided")
    ]
    plain, guided = rendered
    assert tokenizer.unk_token_id not in plain + guided
    assert len(plain) < len(guided)
    tail = tokenizer.encode(f"{problem.problem}<|im_end|>\n<|im_start|>assistant\n")
    assert plain[-len(tail) :] == guided[-len(tail) :] == tail


def test_model_is_seeded_and_leaves_the_random_state_alone():
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first, again, other = (builtin.make_model(seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    weights = [model.model.layers[0].mlp.up_proj.weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert weights[0].dtype == torch.float32


def test_saved_folder_loads_with_the_auto_classes(saved, tokenizer):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert (saved / "model.safetensors").is_file()
    loaded_tokenizer = AutoTokenizer.from_pretrained(saved)
    demo = make_demonstrations(seed=0, count=1)[0]
    ids = tokenizer.encode(demo.completion)
    assert loaded_tokenizer.encode(demo.completion) == ids
    assert loaded_tokenizer.decode(ids) == demo.completion
    assert loaded_tokenizer.eos_token == builtin.END
    assert loaded_tokenizer.chat_template == tokenizer.chat_template

    model = AutoModelForCausalLM.from_pretrained(saved)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    with torch.no_grad():
        batch = torch.tensor([ids])
        assert torch.equal(model(batch).logits, builtin.make_model(seed=3)(batch).logits)


def test_boxed_answer_is_what_math_verify_reads(tokenizer):
    math_verify = pytest.importorskip("math_verify")
    demo = make_demonstrations(seed=5, count=1)[0]
    text = tokenizer.decode(tokenizer.encode(demo.completion))
    assert math_verify.verify(math_verify.parse(f"${demo.problem.answer}$"), math_verify.parse(text))
