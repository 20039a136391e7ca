"""Peaks against the plan: what is measured is the peak of a stage, and every run says how far the plan was off."""

import json

import torch
from tiny_runs import BASE, finish, rows

from sgpo.config import Config
from sgpo.data.builtin import save_builtin
from sgpo.train.memory_vs_plan import Gauge, planned_peaks
from sgpo.utils.distributed import Meter

MIB = 2**20


def test_a_peak_is_that_of_its_stage():
    gauge = Gauge({"train": 2**40})
    values = {}
    for stage, size in (("rollout", 1), ("train", 256), ("sync", 1)):
        meter = Meter()
        torch.ones(size * MIB // 4)
        gauge.read(meter, stage)
        values |= meter.reduce()
    assert 200 < values["peak_train_mib"] - values["peak_rollout_mib"] < 300
    assert 200 < values["peak_train_mib"] - values["peak_sync_mib"] < 300
    gauge.compare(values)
    assert values["plan_ratio_train"] == round(MIB / values["peak_train_mib"], 4)
    gauge.compare({"peak_train_mib": 1.0})
    assert gauge.summary["train"]["measured_mib"] == round(values["peak_train_mib"], 1)  # the highest is kept


def test_a_sleeping_engine_does_not_count():
    meter = Meter()
    Gauge({}, asleep=lambda: 10 * MIB).read(meter, "train")
    other = Meter()
    Gauge({}).read(other, "train")
    assert abs(other.reduce()["peak_train_mib"] - meter.reduce()["peak_train_mib"] - 10) < 2


def test_the_plan_of_a_stage_is_that_of_its_fullest_phase(tmp_path):
    save_builtin(tmp_path, seed=0)
    config = Config.model_validate(BASE | {"engine": {"micro_batch_tokens": 2**20}})
    planned = planned_peaks(config, tmp_path)
    assert planned["worst_case"] == planned["train"] > planned["target"] > 0
    elsewhere = config.model_copy(update={"rollout": config.rollout.model_copy(update={"placement": "process"})})
    assert planned["rollout"] - planned_peaks(elsewhere, tmp_path)["rollout"] > 10 * MIB  # its engine is not here
    assert planned_peaks(config, tmp_path / "nothing") == {}


def test_a_run_says_how_far_the_plan_was_off(tmp_path):
    finish(tmp_path, "--plan.worst_case_step", "true", config=BASE | {"train": {"max_steps": 2}})
    run = tmp_path / "runs" / "tiny"
    memory = json.loads((run / "summary.json").read_text())["memory"]
    assert memory.keys() == {"rollout", "target", "train", "sync", "worst_case"}
    for stage in ("rollout", "target", "train", "sync"):
        peaks = [row[f"peak_{stage}_mib"] for row in rows(run)]
        assert memory[stage]["measured_mib"] == round(max(peaks), 1)
        for row in rows(run):
            assert abs(row[f"plan_ratio_{stage}"] * row[f"peak_{stage}_mib"] - memory[stage]["planned_mib"]) < 1
    assert 0.8 < memory["worst_case"]["ratio"] < 1.25
