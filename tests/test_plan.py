"""The plan: numbers of practice.md's arithmetic, verdicts, and changes that really make it fit."""

import json
from pathlib import Path

import pytest

from sgpo.cli import main
from sgpo.config import Config, load_config
from sgpo.plan import as_dict, plan_run
from sgpo.planning.architectures import KNOWN, find_architecture
from sgpo.planning.changes import _with
from sgpo.planning.memory import GIB, Place, Planner
from sgpo.schema import SgpoError

CONFIGS = Path(__file__).parents[1] / "configs"
ONE_CARD = ("qwen2.5-7b-1x80gb", "qwen2.5-7b-1x141gb", "qwen2.5-1.5b-1x24gb", "paper-32gpu")
BIG = Place(80 * GIB, 256 * GIB)


def config(**sections) -> Config:
    base = {"model": {"path": "qwen2.5-7b"}, "data": {"train": "x"}, "rollout": {"engine": "hf"}}
    return Config.model_validate(base | sections)


def planner(place=BIG, sizes=KNOWN["qwen2.5-7b"], **sections) -> Planner:
    return Planner(config(**sections), sizes, place)


@pytest.mark.parametrize("name", ONE_CARD)
def test_shipped_configs_fit_their_card(name):
    overrides = ["--rollout.engine", "hf"]  # vLLM need not be installed for this; its share is given back below
    loaded = load_config(CONFIGS / f"{name}.yaml", overrides)
    loaded = loaded.model_copy(update={"rollout": loaded.rollout.model_copy(update={"engine": "vllm"})})
    plan = plan_run(loaded)
    assert plan.fits, plan.refusal()
    assert plan.kv_sequences >= 8
    assert plan.largest_micro_batch_tokens >= loaded.engine.micro_batch_tokens >= plan.sequence_tokens


def test_parameters_and_states_of_seven_billion():
    assert KNOWN["qwen2.5-7b"].parameters == 7_615_616_512
    assert KNOWN["qwen2.5-1.5b"].parameters == 1_543_714_304
    states = planner(engine={"zero_stage": 2}).states()
    assert states["weights"] / GIB == pytest.approx(14.19, abs=0.01)
    assert states["fp32 master"] / GIB == pytest.approx(28.37, abs=0.01)
    assert states["Adam moments"] / GIB == pytest.approx(56.74, abs=0.01)
    # 28 layers x 2 x 4 heads x 128 x 2 bytes, 32768 tokens: 1.75 GiB
    assert planner().kv_bytes_per_token() * 32768 / GIB == 1.75


def test_states_and_gradients_are_shared_by_the_processes_of_the_stages_that_share_them():
    for stage, shares in ((0, False), (1, True), (2, True), (3, True)):
        one, four = (planner(Place(80 * GIB, 256 * GIB, n), engine={"zero_stage": stage}) for n in (1, 4))
        assert four.states()["Adam moments"] == one.states()["Adam moments"] / (4 if shares else 1)
        halves = stage >= 2
        assert four.gradients()["gradients"] == one.gradients()["gradients"] / (4 if halves else 1)
    assert planner(engine={"zero_stage": 0}).states()["fp32 master"] > 0
    assert planner(model={"path": "x", "dtype": "float32"}).states()["fp32 master"] == 0


def test_offload_moves_states_to_the_host():
    offloaded = planner(engine={"zero_stage": 2, "optimizer_state": "cpu_offload"})
    assert offloaded.states()["Adam moments"] == offloaded.states()["fp32 master"] == 0
    # 4 + 8 + 4 of fp32 master, moments, gradients, 2 + 2 in bf16, and one buffer of the largest weight
    assert sum(offloaded.host_states().values()) == 20 * offloaded.P + 2 * 152064 * 3584


def test_training_memory_grows_with_tokens_by_the_named_terms_and_not_with_the_vocabulary():
    def backward(tokens):
        return planner(
            model={"path": "x", "gradient_checkpointing": True}, engine={"micro_batch_tokens": tokens}
        ).backward()

    few, many = backward(20_000), backward(40_000)
    grown = {name for name in many if many[name] != few[name]}
    assert grown == {"checkpoint boundaries", "one layer's recompute", "layer's gradients", "hidden states"}
    assert all(many[name] == 2 * few[name] for name in grown)
    heads = [planner(engine={"micro_batch_tokens": tokens}).head() for tokens in (20_000, 40_000)]
    per_row = (heads[1] - heads[0]) / (2 * (40_000 - 20_000) * 16384 / 18432)
    assert per_row == pytest.approx(2 * 3584 * 2 + 48 * 4, rel=0.01)  # no term in the vocabulary


def test_processes_that_share_a_micro_batch_halve_its_layers_and_not_its_rows():
    def forward(size):
        tokens = 40_000 // size
        return planner(
            Place(80 * GIB, 256 * GIB, 2), engine={"micro_batch_tokens": tokens, "sequence_parallel_size": size}
        ).forward()

    alone, shared = forward(1), forward(2)
    assert shared["activations"] == alone["activations"] / 2
    assert shared["hidden states"] == alone["hidden states"]
    assert shared["head chunks and dW"] == alone["head chunks and dW"]


def test_processes_that_cannot_share_are_refused_before_anything_is_planned():
    odd = config(engine={"sequence_parallel_size": 2}, plan={"card": "80gb", "gpus": 3})
    with pytest.raises(SgpoError, match="must divide the number of processes, which is 3"):
        plan_run(odd)
    assert plan_run(odd.model_copy(update={"plan": odd.plan.model_copy(update={"gpus": 4})})).place.processes == 4


def test_a_misfit_names_phase_size_and_changes_that_fit():
    too_big = config()
    place = Place(80 * GIB, 256 * GIB, card="80gb")
    plan = plan_run(too_big, place)
    assert not plan.fits
    assert 2 <= len(plan.changes) <= 3
    for change in plan.changes:
        gpus = change["set"].get("plan.gpus", 1)
        larger = Place(80 * GIB, 256 * GIB, gpus, gpus, "80gb")
        assert Planner(_with(too_big, change["set"]), KNOWN["qwen2.5-7b"], larger).plan().fits, change
    assert "GiB too much on the GPU" in plan.refusal()
    assert any(phase in plan.refusal() for phase in ("forward", "backward", "optimizer"))


def test_command_line(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("model: {path: qwen2.5-1.5b}\ndata: {train: x}\nrollout: {engine: hf, max_new_tokens: 1024}\n")
    rates = tmp_path / "rates.yaml"
    rates.write_text("decode_tokens_per_s: 1000\n")
    place = ["--plan.gpus", "1", "--plan.host_memory_gib", "64"]
    assert main(["plan", str(path), "--json", "--rates", str(rates), "--plan.card", "141gb", *place]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fits"]
    assert told["phases"]["rollout"]["seconds"] == pytest.approx(128 * 12 * 1024 / 1000, abs=0.01)
    assert main(["plan", str(path), "--plan.gpu_memory_gib", "4", *place]) == 1
    assert "does not fit" in capsys.readouterr().out
    (tmp_path / "config.json").write_text(
        '{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, '
        '"vocab_size": 100}'
    )
    refused = ["train", str(path), "--model.path", str(tmp_path), "--plan.host_memory_gib", "0.01"]
    assert main(refused) == 2
    assert "GiB too much" in capsys.readouterr().err
    assert main(["plan", str(path), "--model.path", "nowhere", *place]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_sizes_come_from_a_config_json_and_unknown_kinds_are_refused(tmp_path):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(sizes | {"vocab_size": 100, "model_type": "llama"}))
    found = find_architecture(str(tmp_path))
    assert (found.kv_heads, found.head_dim, found.tied, found.attention_bias) == (4, 16, False, False)
    file.write_text(json.dumps(sizes))
    with pytest.raises(SgpoError, match="vocab_size"):
        find_architecture(str(tmp_path))
    file.write_text(json.dumps(sizes | {"vocab_size": 100, "num_experts": 8}))
    with pytest.raises(SgpoError, match="mixture of experts"):
        find_architecture(str(tmp_path))


def test_json_holds_every_phase():
    told = as_dict(plan_run(config(), Place(80 * GIB, 256 * GIB, card="80gb")))
    assert list(told["phases"]) == ["load", "rollout", "score", "forward", "backward", "optimizer", "sync"]
    for phase in told["phases"].values():
        assert sum(phase["gpu_terms_gib"].values()) == pytest.approx(phase["gpu_gib"], abs=2e-3)
