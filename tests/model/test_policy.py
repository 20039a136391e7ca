"""Models and tokenizers as they come from a folder, whole or damaged."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sgpo.data.builtin import END, make_model, vocabulary
from sgpo.engine.batching import Contexts
from sgpo.model.loading import (
    check_length,
    check_token_ids,
    eos_ids_of_folder,
    load_causal_lm,
    load_tokenizer,
    positions_of,
)
from sgpo.model.policy import PolicyModel
from sgpo.types import SgpoError


@pytest.fixture
def folder(builtin_folder, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(builtin_folder, tmp_path / "model")


def set_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def remove_tokenizer(folder):
    for path in list(folder.iterdir()):
        if "token" in path.name or "template" in path.name:
            path.unlink()


def refusal(loader, folder, **options):
    with pytest.raises(SgpoError) as error:
        loader(folder, **options)
    sentence = str(error.value)
    assert str(folder) in sentence
    assert "\n" not in sentence
    return sentence


def load(folder):
    return load_causal_lm(folder, dtype="float32")


EOS = vocabulary().index(END)
IDS = torch.randint(3, len(vocabulary()), (3, 11), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_hidden_states_are_those_behind_the_logits(builtin_folder, checkpointing):
    lm = load(builtin_folder)
    logits = lm(input_ids=IDS).logits.detach()
    model = PolicyModel(lm, gradient_checkpointing=checkpointing)
    rows = torch.tensor([32, 0, 7, 13, 7])
    hidden = model.hidden(IDS, rows)
    assert hidden.shape == (5, 128)
    torch.testing.assert_close(hidden @ lm.get_output_embeddings().weight.T, logits.flatten(0, 1)[rows])


def test_the_head_is_given_to_the_function_and_logits_are_never_made(builtin_folder):
    model = PolicyModel(load(builtin_folder))
    batch = type("Batch", (), {"input_ids": IDS, "rows": torch.tensor([1, 2]), "lengths": None})()
    teacher = type("Batch", (), {"input_ids": IDS[:1], "rows": torch.tensor([4, 5, 6]), "lengths": None})()

    def no_logits(*_):
        raise AssertionError("the output layer ran")

    model.lm.get_output_embeddings().register_forward_hook(no_logits)
    head, bias, hidden, teacher_hidden = model(lambda *arguments: arguments[:4], Contexts(batch, teacher))
    assert head is model.lm.get_output_embeddings().weight
    assert bias is None
    assert hidden.requires_grad
    assert not teacher_hidden.requires_grad
    assert torch.equal(teacher_hidden, model.hidden(teacher.input_ids, teacher.rows).detach())
    assert model(lambda *arguments: arguments, Contexts(batch))[3] is None


def test_the_gradient_reaches_tied_weights_from_both_sides(builtin_folder):
    lm = load(builtin_folder)
    model = PolicyModel(lm)
    batch = type("Batch", (), {"input_ids": IDS, "rows": torch.arange(33), "lengths": None})()
    model(lambda head, bias, hidden, *_: (hidden @ head.T).log_softmax(-1)[:, 7].sum(), Contexts(batch)).backward()
    found = lm.get_input_embeddings().weight.grad.clone()
    lm.zero_grad()
    lm(input_ids=IDS).logits.log_softmax(-1)[..., 7].sum().backward()
    torch.testing.assert_close(found, lm.get_input_embeddings().weight.grad, rtol=1e-4, atol=1e-4)


def test_a_head_with_bias_is_found():
    lm = make_model(seed=0, hidden=32, layers=1)
    head = torch.nn.Linear(32, len(vocabulary()), bias=True)
    lm.set_output_embeddings(head)
    batch = type("Batch", (), {"input_ids": IDS, "rows": torch.tensor([0]), "lengths": None})()
    assert PolicyModel(lm)(lambda *arguments: arguments, Contexts(batch))[1] is head.bias


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_weights_have_the_asked_dtype(builtin_folder, dtype):
    assert {p.dtype for p in load_causal_lm(builtin_folder, dtype=dtype).parameters()} == {getattr(torch, dtype)}


def test_the_tokenizer_keeps_its_pad_token(builtin_folder):
    tokenizer = load_tokenizer(builtin_folder)
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|im_end|>")


def test_a_tokenizer_without_a_pad_token_pads_with_eos(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "pad_token"}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == EOS


def test_a_tokenizer_without_eos_is_refused(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "eos_token"}))
    assert "eos_token" in refusal(load_tokenizer, folder)


def test_a_folder_without_a_tokenizer_is_refused(folder):
    """transformers makes an empty tokenizer up for some model types: every prompt would have no token."""
    remove_tokenizer(folder)
    assert "tokenizer" in refusal(load_tokenizer, folder)


@pytest.mark.parametrize("content", ["{", '{"a": 1}', ""])
def test_a_damaged_tokenizer_is_refused(folder, content):
    (folder / "tokenizer.json").write_text(content)
    assert "no tokenizer can be loaded" in refusal(load_tokenizer, folder)


@pytest.mark.parametrize("loader", [load, load_tokenizer])
def test_a_missing_folder_is_refused(tmp_path, loader):
    assert "does not exist or has no config.json" in refusal(loader, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "does not exist or has no config.json" in refusal(loader, tmp_path / "empty")


@pytest.mark.parametrize("config", ["{", "{}", '{"model_type": "no_such_model"}', '{"model_type": "vit"}'])
def test_a_config_of_no_causal_language_model_is_refused(folder, config):
    (folder / "config.json").write_text(config)
    assert "no model can be loaded" in refusal(load, folder)


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    assert "no model can be loaded" in refusal(load, folder)


def test_pickled_weights_are_not_touched(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "no model can be loaded" in refusal(load, folder)


@pytest.mark.parametrize("damage", [lambda data: data[:1000], lambda data: b"x" * 100, lambda data: data[:-1000]])
def test_damaged_weights_are_refused(folder, damage):
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert "no model can be loaded" in refusal(load, folder)


def test_a_missing_tensor_is_refused(folder):
    """transformers would fill it with random numbers and only print a table."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    assert "model.layers.0.mlp.up_proj.weight" in refusal(load, folder)


def test_tensors_of_another_shape_are_refused(folder):
    set_config(folder, intermediate_size=100)
    assert "no model can be loaded" in refusal(load, folder)


def test_an_unknown_attention_is_refused(builtin_folder):
    refusal(lambda path: load_causal_lm(path, dtype="float32", attn_implementation="nonsense"), builtin_folder)


def test_code_of_the_folder_is_not_run(folder):
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    set_config(folder, model_type="evil", auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"})
    refusal(load, folder)


@pytest.mark.parametrize(
    ("values", "positions"),
    [({"max_position_embeddings": 256}, 256), ({"model_type": "gpt2", "n_positions": 40}, 40),
     ({"model_type": "gemma3", "text_config": {"max_position_embeddings": 77}}, 77), ({"model_type": "bloom"}, None),
     ({"model_type": "no_such_model", "max_position_embeddings": 9}, 9), ({"model_type": "ctrl", "n_positions": 8}, 8)],
)  # fmt: skip
def test_the_positions_have_many_names(folder, values, positions):
    path = folder / "config.json"
    own = json.loads(path.read_text())
    own.pop("max_position_embeddings")
    path.write_text(json.dumps({**own, **values}))
    assert positions_of(folder) == positions


def test_a_tokenizer_larger_than_the_embedding_is_refused(folder):
    tokenizer, vocab = load_tokenizer(folder), json.loads((folder / "config.json").read_text())["vocab_size"]
    check_token_ids(folder, tokenizer, [(3, vocab - 1), ()])
    for ids in ([(vocab,)], [(1, 2), (5, vocab + 7, 3)]):
        with pytest.raises(SgpoError, match=rf"gives token {max(map(max, ids))} .* has {vocab} rows"):
            check_token_ids(folder, tokenizer, ids)
    set_config(folder, vocab_size=tokenizer.eos_token_id)
    assert str(tokenizer.eos_token_id) in refusal(lambda path: check_token_ids(path, tokenizer, []), folder)


def test_eos_ids_come_from_the_generation_config(folder):
    assert eos_ids_of_folder(folder) == EOS
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [EOS, 5]}))
    assert eos_ids_of_folder(folder) == [EOS, 5]


@pytest.mark.parametrize("kind", ["longrope", "default"])
def test_a_sequence_longer_than_the_model_takes_is_refused(folder, kind):
    """Beyond its first length, LongRoPE turns all sequences of a batch otherwise, the short ones too."""
    rope = {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": 40}
    factors = {"short_factor": [1.0] * 16, "long_factor": [4.0] * 16} if kind == "longrope" else {}
    set_config(folder, rope_parameters={**rope, **factors}, max_position_embeddings=80)
    check_length(folder, 40, "it has 40 tokens", "shorten it")
    with pytest.raises(SgpoError, match=r"it has 81 tokens, more than 80, the positions of .*; shorten it"):
        check_length(folder, 81, "it has 81 tokens", "shorten it")
    if kind == "longrope":
        with pytest.raises(SgpoError, match=r"it has 41 tokens, more than 40: .*LongRoPE.*; shorten it"):
            check_length(folder, 41, "it has 41 tokens", "shorten it")
