"""Weight sync between a real trainer and real engines: faults are caught, sound weights are the ones that sample."""

import json
from pathlib import Path

import pytest
import torch
from engine_builders import NO_VLLM

from sgpo.data.builtin import make_model, make_tokenizer

WORKER = str(Path(__file__).with_name("weight_sync_worker.py"))
LAUNCHES = {  # processes, and what they do one after the other: engine:ZeRO stage:tensor parallel[:adapters]
    "hf": (1, ["hf:0:1"]),
    "hf-2": (2, ["hf:3:1", "hf:3:1:adapters"]),
    "vllm": (1, ["vllm:2:1", "vllm:2:1:adapters"]),
    "vllm-2": (2, ["vllm:3:2"]),
}
CASES = [
    pytest.param((name, case), id=f"{name}-{case}", marks=NO_VLLM if "vllm" in name else ())
    for name, (_, cases) in LAUNCHES.items()
    for case in cases
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three layers, so that like tensors can be swapped; a norm turned up, so that log-probs have something to show."""
    path = tmp_path_factory.mktemp("synced") / "model"
    model = make_model(seed=0, layers=3)
    with torch.no_grad():
        model.model.norm.weight.mul_(3.0)
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def launched():
    """What each launch has found."""
    return {}


@pytest.fixture(scope="module", params=CASES)
def found(request, folder, tmp_path_factory, launcher, launched):
    name, case = request.param
    if name not in launched:
        out = tmp_path_factory.mktemp("found") / "found.json"
        processes, cases = LAUNCHES[name]
        launcher([WORKER, str(out), str(folder), *cases], processes=processes)
        launched[name] = json.loads(out.read_text())
    return {**launched[name][case], "adapters": "adapters" in case}


def test_every_fault_is_caught_before_the_next_rollout(found):
    assert len(found["faults"]) in (22, 11, 5)  # one process, two processes, adapters
    missed = [f for f in found["faults"] if f["said"] is None or not f["refused"]]
    assert missed == []
    for fault in found["faults"]:
        assert "the last checkpoint is whole" in fault["said"]
        if fault["fault"] == "drop":
            assert any(
                words in fault["said"] for words in ("never left", "no new value", "of a pair", "did not arrive")
            )
        elif fault["place"] == "way":
            assert "changed on its way" in fault["said"]
        else:
            assert "log-probs differ" in fault["said"]


def test_nothing_is_sampled_before_the_first_sync(found):
    assert "before a weight sync" in found["unsynced"]


def test_after_every_sound_sync_the_engine_samples_the_trainers_policy(found):
    assert len(found["sound"]) in (24, 12, 6)
    for row in found["sound"]:
        assert row["gap"] < 1e-4
        assert row["sampled_gap"] < 1e-4
        if found["adapters"] and row is not found["sound"][0]:  # frozen weights go over once
            assert row["bytes"] == 122_880
        else:
            assert row["bytes"] > 1_000_000
        assert row["versions"] == []
    assert found["sound"][0]["tokens"] != found["sound"][-1]["tokens"]
