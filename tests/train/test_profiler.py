"""A real run with --profile, packed and checkpointed: what it leaves; and the counting of operations by hand."""

import json

import pytest
import torch
from tiny_runs import BASE, finish, rows
from transformers import LlamaConfig, LlamaForCausalLM

from sgpo.train.profiler import ModelFlops, _thinned, peak_flops
from sgpo.types import TrainSequence


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiled")
    config = {**BASE, "train": {"max_steps": 2}, "engine": {"micro_batch_tokens": 256, "packing": "packed"}}
    config["model"] = {**BASE["model"], "gradient_checkpointing": True, "activation_offload": True,
                       "mlp_tile_tokens": 64}  # fmt: skip
    finish(folder, "--profile", config=config)
    return folder / "runs" / "tiny"


def test_every_step_has_its_numbers(profiled):
    for row in rows(profiled):
        assert 0.0 < row["mfu"] < 1.0
        assert row["live_row_share"] == (row["policy_rows"] + row["distill_rows"]) / row["rollout_tokens"]
        assert row["padding_share"] in (0.0, None)  # packed
        assert row["rollout_tokens_per_s"] > 0


def test_the_timeline_is_written_and_drawn(profiled):
    written = [json.loads(line) for line in (profiled / "profile" / "steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in written] == [1, 2]
    for row in written:
        assert [stage[0] for stage in row["stages"]] == ["rollout", "score", "target", "train", "sync"]
        assert all(start <= end for _, start, end in row["stages"])
        moments = [moment for moment, _ in row["memory"]]
        assert moments == sorted(moments)
        assert len(moments) > 3
    assert (profiled / "plots" / "memory.png").stat().st_size > 5000
    assert "Memory over a step" in (profiled / "report.html").read_text()


def test_operations_by_hand():
    config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    flops = ModelFlops.of(LlamaForCausalLM(config))
    layer = 8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 12 + 2 * 8  # q and o, k and v, MLP, norms
    assert flops == ModelFlops(backbone=2 * layer + 8, head=88, attention=2 * 8)
    plain = TrainSequence((1, 2), (3, 4, 5), policy_weight=1.0, advantage=1.0)
    forward = 2 * flops.backbone * 5 + 2 * 88 * 3 + 2 * 16 * 25
    assert flops.training(plain) == 3 * forward
    distilled = TrainSequence((1, 2), (3, 4, 5), distill_weight=1.0, teacher_prompt_ids=(1, 2, 3, 4))
    assert flops.training(distilled) == 3 * forward + 2 * flops.backbone * 7 + 2 * 88 * 3 + 2 * 16 * 49


def test_thinning_keeps_the_peak():
    samples = [(float(i), float(i == 1234)) for i in range(5000)]
    thin = _thinned(samples)
    assert len(thin) <= 1000
    assert (1234.0, 1.0) in thin
    assert _thinned([]) == []


def test_the_peak_rate():
    assert peak_flops(torch.device("cpu"), "float32", 2.5) == 2.5e12
    assert 1e8 < peak_flops(torch.device("cpu"), "float32", None) < 1e14
