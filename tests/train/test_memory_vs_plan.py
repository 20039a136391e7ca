"""The peak against the plan: what is measured, and that every run says how far the plan was off."""

import json

import pytest
import torch
from tiny_runs import BASE, finish, rows

from sgpo.config import Config
from sgpo.data.builtin import save_builtin
from sgpo.train.memory_vs_plan import MemoryTracker, planned_peak

MIB = 2**20


def test_a_peak_is_what_was_held_since_the_last_reading():
    memory, peaks = MemoryTracker(2.0**40), []
    with memory.reading():
        for size in (1, 256, 1):
            torch.ones(size * MIB // 4)
            peaks.append(memory.read())
    assert 200 < peaks[1] - peaks[0] < 300
    assert 200 < peaks[1] - peaks[2] < 300
    assert memory.summary() == {  # the highest
        "planned_mib": MIB, "measured_mib": round(peaks[1], 1), "ratio": round(MIB / peaks[1], 4),
    }  # fmt: skip


def test_what_is_not_known_is_none():
    assert MemoryTracker(None).summary() == {"planned_mib": None, "measured_mib": None, "ratio": None}
    assert MemoryTracker(MIB).summary() == {"planned_mib": 1.0, "measured_mib": None, "ratio": None}


def test_a_sleeping_engine_does_not_count():
    asleep, awake = MemoryTracker(None, asleep=lambda: 10 * MIB).read(), MemoryTracker(None).read()
    assert abs(awake - asleep - 10) < 2


def test_the_plan_is_that_of_the_fullest_phase(tmp_path):
    save_builtin(tmp_path, seed=0)
    config = Config.model_validate(BASE | {"engine": {"micro_batch_tokens": 2**20}})
    small = Config.model_validate(BASE)
    assert planned_peak(config, tmp_path) > planned_peak(small, tmp_path) > 0
    elsewhere = small.model_copy(update={"rollout": small.rollout.model_copy(update={"placement": "process"})})
    assert planned_peak(small, tmp_path) - planned_peak(elsewhere, tmp_path) > MIB  # its engine is not here
    assert planned_peak(config, tmp_path / "nothing") is None


def test_a_run_says_how_far_the_plan_was_off(tmp_path):
    """With a sampling batch that the few rollouts of a step can fill: the plan counts a full one."""
    words = ["--plan.worst_case_step=true", "--rollout.max_batch_tokens=512"]
    finish(tmp_path, *words, config=BASE | {"train": {"max_steps": 2}})
    run = tmp_path / "runs" / "tiny"
    memory = json.loads((run / "summary.json").read_text())["memory"]
    assert memory["ratio"] == pytest.approx(memory["planned_mib"] / memory["measured_mib"], rel=1e-3)
    assert 0.8 < memory["ratio"] < 1.25
    assert not [key for row in rows(run) for key in row if key.startswith(("peak_", "plan_"))]
