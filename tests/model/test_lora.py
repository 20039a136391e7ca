"""LoRA and DoRA: only adapters are trained and saved, and everybody else sees the merged weights."""

import sys
from pathlib import Path

import pytest
import torch

from sgpo.config import Config
from sgpo.model.loading import load_causal_lm
from sgpo.model.lora import add_adapters
from sgpo.types import SgpoError
from sgpo.utils.config_file import checked

WORKER = Path(__file__).with_name("lora_worker.py")
CASES = ["0:float32:lora", "0:float32:dora", "3:float32:dora", "2:bfloat16:lora"]


@pytest.fixture(scope="module")
def runs(launcher, tmp_path_factory, builtin_folder):
    folder = tmp_path_factory.mktemp("lora")
    launcher([str(WORKER), str(folder / "out.pt"), str(builtin_folder), str(folder), *CASES])
    return torch.load(folder / "out.pt")


@pytest.mark.parametrize("case", CASES)
def test_only_adapters_are_trained_and_saved(runs, case):
    run = runs[case]
    assert run["losses"][2] < run["losses"][0]
    assert run["frozen_moved"] == []
    assert run["adapters_still"] == []
    assert run["difference"] < (1e-4 if "float32" in case else 0.05)
    assert run["resumed"]
    if "float32" in case:  # rank 4 at width 96: masters and two moments of few weights, instead of all of them
        assert run["sizes"]["saved"] < run["sizes"]["model"]


@pytest.mark.parametrize("case", CASES)
def test_others_see_a_plain_model_with_merged_weights(runs, case, builtin_folder):
    run, dtype = runs[case], case.split(":")[1]
    plain = load_causal_lm(builtin_folder, dtype=dtype)
    names = {name for name in run["names"] if name != "lm_head.weight"}
    assert {*run["merged"], "lm_head.weight"} == {*names, "lm_head.weight"}
    original = plain.state_dict()
    for name, tensor in run["start"].items():  # B is zero at first; DoRA divides by a norm and multiplies by it again
        assert torch.allclose(tensor, original[name], rtol=1e-5, atol=0), name
    moved = [name for name in run["merged"] if not torch.equal(run["merged"][name], original[name])]
    assert len(moved) >= 4
    assert all("proj" in name for name in moved)
    plain.load_state_dict(run["merged"], strict=False)
    ids = torch.arange(5, 35)[None]
    with torch.no_grad():
        logprobs = torch.log_softmax(plain(ids).logits.float(), -1)[0, :-1]
    taken = logprobs.gather(-1, ids[0, 1:, None])[:, 0]
    assert torch.allclose(taken, torch.tensor(run["unmerged"]), atol=2e-4 if dtype == "float32" else 0.1)
    assert run["untouched"]
    if dtype == "float32":
        assert run["gaps"]["merged"][0] < 2e-4


@pytest.mark.parametrize("case", CASES)
def test_an_engine_with_adapters_is_sent_these_alone_after_the_first_sync(runs, case):
    run = runs[case]
    first, later = run["bytes"]["adapters"]
    assert first == run["bytes"]["merged"][0] + later
    assert later == sum(tensor.nbytes for name, tensor in run["adapters"].items())
    assert later < first / 4
    # The same arithmetic on both sides, where a merged weight in bf16 is rounded.
    assert max(run["gaps"]["adapters"]) < (2e-6 if "float32" in case else run["gaps"]["merged"][0] / 2)


def test_stage_3_trains_the_weights_of_stage_0(runs):
    ours, truth = runs["3:float32:dora"], runs["0:float32:dora"]
    assert ours["losses"] == pytest.approx(truth["losses"], rel=1e-5)
    for kind in ("adapters", "merged"):
        assert ours[kind].keys() == truth[kind].keys()
        for name, tensor in ours[kind].items():
            moved = (truth["merged"][name] - truth["start"][name]).abs().max() if kind == "merged" else 1.0
            assert torch.allclose(tensor, truth[kind][name], atol=max(1e-3 * moved, 1e-6), rtol=0), name


def test_an_unknown_target_is_one_sentence(builtin_folder):
    lm = load_causal_lm(builtin_folder, dtype="float32")
    with pytest.raises(SgpoError, match=r"model.lora.modules = \['q_prj'\]: .*q_prj"):
        add_adapters(lm, rank=4, alpha=8.0, modules=["q_prj"], dora=False, seed=0)


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_the_head_and_the_embedding_take_no_adapters(builtin_folder, name):
    lm = load_causal_lm(builtin_folder, dtype="float32")
    with pytest.raises(SgpoError, match=rf"\['q_proj', '{name}'\]: head and embedding take no adapters"):
        add_adapters(lm, rank=4, alpha=8.0, modules=["q_proj", name], dora=False, seed=0)


def test_adapters_without_their_package_are_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SgpoError, match=r"model.lora needs peft .*pip install 'sgpo\[lora\]'"):
        add_adapters(None, rank=4, alpha=8.0, modules=["all-linear"], dora=False, seed=0)


@pytest.mark.parametrize(
    ("lora", "on_cpu", "on_gpu"),
    [
        ({}, False, False),
        ({"rank": 8}, False, True),
        ({"rank": 8, "dora": True}, False, False),
        ({"rank": 8, "sync": "merged"}, False, False),
        ({"rank": 8, "dora": True, "sync": "adapters"}, True, True),
        ({"sync": "adapters"}, False, False),
    ],
)
def test_where_adapters_are_sent_alone(lora, on_cpu, on_gpu):
    raw = {"model": {"path": "m", "lora": lora}, "data": {"train": "d"}, "rollout": {"engine": "hf"}}
    config = checked(Config, raw, "config")
    for cuda, alone in ((False, on_cpu), (True, on_gpu)):
        assert config.syncs_adapters(cuda=cuda) is alone
    assert config.sleep_level(cuda=True) == (1 if on_gpu else 2)  # the frozen weights must outlive the sleep


def test_dora_adapters_for_vllm_are_refused():
    lora = {"rank": 8, "dora": True, "sync": "adapters"}
    raw = {"model": {"path": "m", "lora": lora}, "data": {"train": "d"}, "rollout": {"engine": "vllm"}}
    with pytest.raises(SgpoError, match=r"vLLM has no DoRA adapters; set model.lora.sync to merged"):
        checked(Config, raw, "config")


def test_layers_that_share_a_weight_take_no_adapters(builtin_folder):
    """Two adapters could not be merged into one weight: Zamba uses a block at several depths."""
    lm = load_causal_lm(builtin_folder, dtype="float32")
    first, second = (layer.mlp.up_proj for layer in lm.model.layers)
    second.weight = first.weight
    with pytest.raises(SgpoError, match=r"up_proj has its weight in common with another layer"):
        add_adapters(lm, rank=4, alpha=8.0, modules=["up_proj"], dora=False, seed=0)
    lm = load_causal_lm(builtin_folder, dtype="float32")
    lm.model.layers[1].mlp.up_proj.weight = lm.model.layers[0].mlp.up_proj.weight
    add_adapters(lm, rank=4, alpha=8.0, modules=["all-linear"], dora=False, seed=0)
    adapted = {name for name, module in lm.named_modules() if hasattr(module, "lora_A")}
    assert "model.layers.0.mlp.down_proj" in adapted
    assert not any("up_proj" in name for name in adapted)
