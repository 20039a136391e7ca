"""The plan: numbers of practice.md's arithmetic, measured memory, what fits, and changes that really make it fit."""

import json
import math
import time
from pathlib import Path

import pytest

from benchmarks import plan_check
from sgpo.cli import main
from sgpo.config import Config
from sgpo.planning.architectures import KNOWN, find_architecture
from sgpo.planning.changes import _moved, _with
from sgpo.planning.memory import CARDS_GIB, GIB, Place, Plan, Planner
from sgpo.planning.plan import as_dict, plan_run
from sgpo.types import SgpoError
from sgpo.utils.config_file import load_settings

CONFIGS = Path(__file__).parents[2] / "configs"
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
    loaded = load_settings(Config, CONFIGS / f"{name}.yaml", overrides)
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
    """4 + 8 + 4 of fp32 master, moments and gradients, 2 in bf16, and one buffer of the largest weight. All but the
    moments is page-locked, in powers of two. DeepSpeed accumulates the gradients of bf16 weights on the device."""
    engine = {"zero_stage": 2, "optimizer_state": "cpu_offload"}
    offloaded = planner(engine=engine)
    assert offloaded.states()["Adam moments"] == offloaded.states()["fp32 master"] == 0
    assert offloaded.gradients()["gradients"] == 4 * offloaded.P
    assert planner(engine=engine | {"zero_stage": 3}).gradients()["gradients"] == 0
    host = offloaded.host_states()
    assert host["fp32 master"] == host["fp32 gradients"] == 32 * GIB
    assert host["Adam moments"] == 8 * offloaded.P
    on_cpu = planner(Place(None, 256 * GIB), engine=engine)
    assert sum(on_cpu.host_states().values()) == 18 * on_cpu.P + 2 * 152064 * 3584
    in_fp32 = planner(model={"path": "x", "dtype": "float32"}, engine=engine)
    assert in_fp32.gradients()["gradients"] == 0
    assert 4 * in_fp32.P < in_fp32.host_states()["accumulated gradients"] < 8 * in_fp32.P


def test_training_memory_grows_with_tokens_by_the_named_terms_and_not_with_the_vocabulary():
    def backward(tokens):
        return planner(
            model={"path": "x", "gradient_checkpointing": True}, engine={"micro_batch_tokens": tokens}
        ).backward()

    few, many = backward(20_000), backward(40_000)
    grown = {name for name in many if many[name] != few[name]}
    assert grown == {"checkpoint boundaries", "one layer's recompute", "layer's gradients"}
    assert all(many[name] == 2 * few[name] for name in grown)
    heads = [planner(engine={"micro_batch_tokens": tokens}).head() for tokens in (40_000, 80_000)]
    per_row = (heads[1] - heads[0]) / (40_000 * 16384 / 18432)
    assert per_row == pytest.approx(2 * 3584 + 8 * 4, rel=0.01)  # no term in the vocabulary


def test_processes_that_cannot_share_are_refused_before_anything_is_planned():
    odd = config(engine={"sequence_parallel_size": 2}, plan={"card": "80gb", "gpus": 3})
    with pytest.raises(SgpoError, match="must divide the number of processes, which is 3"):
        plan_run(odd)
    assert plan_run(odd.model_copy(update={"plan": odd.plan.model_copy(update={"gpus": 4})})).place.processes == 4


def test_plan_is_within_a_tenth_of_measured_memory():
    """Every phase that can be the peak, on a CPU, against the resident memory of a process."""
    names = ["1M fp32 ZeRO-2, LoRA, checkpointed, tiled MLP", "1M fp32 ZeRO-3, packed"]
    rows = list(plan_check.measured(names))
    assert [row["case"] for row in rows] == names
    for row in rows:
        assert 0.9 <= row["ratio"] <= 1.1, row
        assert all(0.9 <= row["ratios"][phase] <= 1.1 for phase in ("forward", "backward")), row


def lora(**keys) -> dict:
    return {"model": {"path": "x", "lora": {"rank": 16} | keys}}


def test_adapters_are_counted_by_targets_and_with_their_lengths():
    hidden, wide, kv = 3584, 18944, 512
    both = planner(**lora(modules=["q_proj", "model.down_proj"]))
    shapes = {"q_proj": (hidden, hidden), "down_proj": (wide, hidden)}
    assert both.adapted == shapes
    assert both.trained == 28 * 16 * sum(map(sum, shapes.values()))
    outputs = 2 * hidden + 2 * kv + 2 * wide + hidden
    everywhere, dora = planner(**lora()), planner(**lora(dora=True))
    assert dora.trained - everywhere.trained == 28 * outputs
    assert dora.saved_around_mlp() + dora.saved_in_mlp() == pytest.approx(
        everywhere.saved_around_mlp() + everywhere.saved_in_mlp() + 2 * 2 * outputs
    )
    full = planner()
    assert everywhere.states()["weights"] == 2 * (full.P + everywhere.trained)
    assert everywhere.states()["Adam moments"] == 8 * everywhere.trained
    assert everywhere.head() < full.head() - 4 * 152064 * 3584  # no dW
    assert "head's dW" not in {name for name, size in everywhere.backward().items() if size}


def test_tiled_mlp_keeps_one_tile():
    sections = {"engine": {"micro_batch_tokens": 100_000}}
    inner = 4 * 2 * 18944  # gate, its activation, up and their product
    for checkpointing in (False, True):
        model = {"path": "x", "gradient_checkpointing": checkpointing}
        whole = planner(model=model, **sections)
        tiled = planner(model=model | {"mlp_tile_tokens": 1024}, **sections)
        assert whole.one_layer() - tiled.one_layer() == inner * 100_000
        assert sum(tiled.backward().values()) < sum(whole.backward().values())
    few, all_at_once = tiled.backward(), whole.backward()
    assert few["one tile's recompute"] == inner * 1024
    inner_gradients, waiting = 2 * 2 * 18944 * (100_000 - 1024), 2 * 3584 * 100_000
    assert all_at_once["layer's gradients"] - few["layer's gradients"] == inner_gradients - waiting
    assert planner(model={"path": "x", "mlp_tile_tokens": 10**6}).backward() == planner().backward()


def test_activation_offload_moves_the_checkpoints_to_the_host():
    model = {"path": "x", "gradient_checkpointing": True}
    kept = planner(model=model).plan()
    moved = planner(model=model | {"activation_offload": True}).plan()
    boundaries = kept.phases["backward"].gpu["checkpoint boundaries"]
    assert boundaries == 28 * 2 * 3584 * 18432
    assert "checkpoint boundaries" not in moved.phases["backward"].gpu
    one = 2 * 3584 * 18432
    assert kept.phases["backward"].gpu_bytes - moved.phases["backward"].gpu_bytes == boundaries - one
    assert moved.phases["backward"].host["checkpoint boundaries"] == 28 * 2 ** math.ceil(math.log2(one))
    on_cpu = planner(Place(None, 256 * GIB), model=model | {"activation_offload": True}).plan()
    assert on_cpu.phases["backward"].host["checkpoint boundaries"] == boundaries


def test_packed_rows_keep_one_more_attention_output_and_padding_counts_as_tokens():
    packed, padded = (planner(engine={"packing": kind}) for kind in ("packed", "padded"))
    assert packed.saved_around_mlp() - padded.saved_around_mlp() == 2 * 28 * 128
    flash = planner(engine={"packing": "packed"}, model={"path": "x", "attn_implementation": "flash_attention_2"})
    assert flash.saved_around_mlp() == padded.saved_around_mlp()
    assert packed.T == padded.T == 18432  # micro_batch_tokens is smaller than one sequence


def test_sequences_shared_by_processes_have_their_part_of_the_tokens():
    short = planner(engine={"micro_batch_tokens": 1024, "sequence_parallel_size": 4})
    assert short.T == 18432 / 4  # a sequence is longer than the budget of all four
    assert short.N == 16384  # and one process may own all of its rows
    long = planner(engine={"micro_batch_tokens": 20_000, "sequence_parallel_size": 4})
    assert long.T == 20_000
    assert long.N == 71_111  # 4 x 20000 x 16384 / 18432


def test_states_wait_on_the_host_while_the_engine_is_awake():
    engine = {"zero_stage": 2, "optimizer_state": "8bit"}
    beside = planner(engine=engine).plan()
    away = planner(engine=engine | {"offload_states_during_rollout": True}).plan()
    states = planner(engine=engine).states()
    moved = states["fp32 master"] + states["Adam moments"]
    assert beside.phases["rollout"].gpu_bytes - away.phases["rollout"].gpu_bytes == moved
    assert away.phases["rollout"].host["fp32 master"] == 32 * GIB
    assert beside.phases["forward"] == away.phases["forward"]


def with_vllm(settings: Config, **keys) -> Config:
    """vLLM need not be installed for this."""
    rollout = settings.rollout
    vllm = rollout.vllm.model_copy(update=keys)
    return settings.model_copy(update={"rollout": rollout.model_copy(update={"engine": "vllm", "vllm": vllm})})


def test_a_sleeping_engine_keeps_its_weights_on_the_host_at_level_one_alone():
    plans = {
        level: Planner(with_vllm(config(), sleep_level=level), KNOWN["qwen2.5-7b"], BIG).plan()
        for level in (None, 0, 1, 2)
    }
    weights = 2 * KNOWN["qwen2.5-7b"].parameters
    assert plans[1].phases["forward"].host["sleeping engine's weights"] == weights
    assert plans[None] == plans[2]
    assert "sleeping engine's weights" not in plans[2].phases["forward"].host
    assert plans[0].phases["forward"].gpu["engine's weights"] == weights
    assert "engine's weights" not in plans[2].phases["forward"].gpu


def test_stage_three_gathers_while_layers_work_and_is_loaded_whole():
    phases = planner(Place(80 * GIB, 256 * GIB, 16), engine={"zero_stage": 3}).plan().phases
    weights = 2 * KNOWN["qwen2.5-7b"].parameters
    assert phases["load"].gpu["weights"] == weights
    assert phases["rollout"].gpu["weights"] == weights / 16
    for phase in ("score", "forward", "backward"):
        assert phases[phase].gpu["gathered weights"] == 2 * 10**9
    assert "gathered weights" not in phases["optimizer"].gpu
    assert phases["optimizer"].gpu["gradient bucket"] == 2 * 10**8
    assert phases["backward"].gpu["bucket being reduced"] == (2 + 4 / 16) * 152064 * 3584
    assert phases["optimizer"].gpu["flat gradients"] == phases["optimizer"].gpu["gradients"] == weights / 16 * 2


HOPELESS = {
    "7B, full states, on 24 GB": (with_vllm(config()), Place(23.5 * GIB, 64 * GIB, card="24gb"), "forward"),
    "7B, full states, on 80 GB": (with_vllm(config()), Place(79.1 * GIB, 256 * GIB, card="80gb"), "forward"),
    "7B, full states, on 80 GB, hf": (config(), Place(79.1 * GIB, 256 * GIB, card="80gb"), "forward"),
    "7B on eight GPUs": (with_vllm(config()), Place(79.1 * GIB, 512 * GIB, 8, 8, card="80gb"), "forward"),
    "host too small": (
        with_vllm(
            config(
                model={"path": "x", "gradient_checkpointing": True},
                engine={"zero_stage": 2, "optimizer_state": "cpu_offload"},
            )
        ),
        Place(79.1 * GIB, 64 * GIB, card="80gb"),
        "load",
    ),
    "KV cache too small": (
        with_vllm(
            config(
                model={"path": "x", "gradient_checkpointing": True},
                engine={"zero_stage": 2, "optimizer_state": "8bit"},
            ),
            kv_cache_mib=64,
        ),
        Place(139.8 * GIB, 256 * GIB, card="141gb"),
        "rollout",
    ),
    "7B in 16 GiB of a CPU": (config(), Place(None, 16 * GIB), "forward"),
    "7B fp32 in 64 GiB of a CPU": (config(model={"path": "x", "dtype": "float32"}), Place(None, 64 * GIB), "backward"),
}


@pytest.mark.parametrize("name", HOPELESS)
def test_a_misfit_names_phase_size_and_three_changes_that_fit_in_seconds(name):
    settings, place, phase = HOPELESS[name]
    started = time.process_time()
    plan = plan_run(settings, place, KNOWN["qwen2.5-7b"])
    assert time.process_time() - started < 3.0
    assert not plan.fits
    assert len(plan.changes) == 3
    for change in plan.changes:
        assert replanned(settings, place, change["set"]).fits, change
        for key in change["set"]:  # none of them is superfluous
            if key != "engine.zero_stage":
                less = {k: v for k, v in change["set"].items() if k != key}
                assert not fits(settings, place, less), (change, key)
    (_, where), missing = max(plan.missing.items(), key=lambda item: item[1])
    too = "too few in the KV cache" if where == "KV cache" else f"too much on the {where}"
    assert f"phase {phase}, {missing / GIB:.2f} GiB {too}" in plan.refusal()
    assert plan.refusal().count("; or ") == 2


def fits(settings: Config, place: Place, wanted: dict) -> bool:
    try:
        return replanned(settings, place, wanted).fits
    except SgpoError:  # the rest does not go together
        return False


def replanned(settings: Config, place: Place, wanted: dict) -> Plan:
    changed = _with(settings, {key: value for key, value in wanted.items() if not key.startswith("plan.")})
    return Planner(changed, KNOWN["qwen2.5-7b"], _moved(place, wanted, settings)).plan()


def test_a_machine_that_is_at_hand_is_not_to_be_changed():
    settings, place, _ = HOPELESS["host too small"]
    sizes = KNOWN["qwen2.5-7b"]
    assert any(key.startswith("plan.") for c in plan_run(settings, place, sizes).changes for key in c["set"])
    here = plan_run(settings, place, sizes, here=True).changes
    assert here
    assert not any(key.startswith("plan.") for change in here for key in change["set"])


def test_adapters_on_layers_that_the_plan_does_not_know():
    with pytest.raises(SgpoError, match=r"no plan: it does not know model.lora.modules \['qkv_proj'\]"):
        planner(**lora(modules=["qkv_proj"], dora=True))


def test_a_change_of_the_config_comes_before_another_machine():
    plan = plan_run(HOPELESS["7B on eight GPUs"][0], HOPELESS["7B on eight GPUs"][1], KNOWN["qwen2.5-7b"])
    assert not any(key.startswith("plan.") for change in plan.changes for key in change["set"])
    moved = _moved(Place(23.5 * GIB, 64 * GIB, card="24gb"), {"plan.gpus": 16, "plan.card": "80gb"}, config())
    assert moved == Place(CARDS_GIB["80gb"] * GIB, 64 * GIB, 16, 8, "80gb")


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
