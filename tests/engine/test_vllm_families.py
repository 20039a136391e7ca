"""Families that vLLM names, lays out or runs in another way than the trainer are synced and exported unchanged."""

import json
from pathlib import Path

import pytest
from engine_builders import NO_VLLM
from model_families import save_family
from tiny_runs import finish_all, rows

from sgpo.data.builtin import make_tokenizer, vocabulary

WORKER = str(Path(__file__).with_name("vllm_families_worker.py"))
# Experts first: vLLM makes their group of processes with its first engine. GPT-NeoX, SmolLM3 and Phi it runs as
# transformers' own module, and Phi's head has a bias; Qwen3 is the control.
CASES = ["qwen3_moe:3", "mixtral:2", "mixtral:3:adapters", "olmoe:0", "gpt_neox:3", "smollm3:2", "phi:0", "qwen3:0"]
RUNS = ("qwen3_moe", "mixtral")
pytestmark = NO_VLLM


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two steps of SGPO each, sampled by vLLM."""
    folder = tmp_path_factory.mktemp("runs")
    for family in RUNS:
        save_family(family, folder / family, vocab_size=len(vocabulary()))
        make_tokenizer().save_pretrained(folder / family)
    overrides = ["--rollout.engine=vllm", "--train.max_steps=2", "--model.path"]
    finish_all(folder, {f"run-{family}": [*overrides, str(folder / family)] for family in RUNS})
    return {family: folder / "runs" / f"run-{family}" for family in RUNS}


@pytest.fixture(scope="module")
def found(runs, tmp_path_factory, launcher):
    scratch = tmp_path_factory.mktemp("families")
    folders = [str(run / "final") for run in runs.values()]
    launcher([WORKER, str(scratch / "found.json"), str(scratch), *folders, *CASES])
    return json.loads((scratch / "found.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_every_sync_arrives(found, case):
    assert len(found[case]["gaps"]) == 3
    assert max(found[case]["gaps"]) < 2e-5


@pytest.mark.parametrize("case", CASES)
def test_an_export_has_the_names_of_its_source_and_loads_everywhere(found, case):
    export = found[case]
    assert export["same_names"]
    assert export["moved"] >= 4
    assert export["changed_by_loading"] == []
    assert export["transformers"] < 1e-5
    assert export["vllm"] < 2e-5


@pytest.mark.parametrize("family", RUNS)
def test_a_run_through_vllm_ends_and_vllm_serves_its_export(runs, found, family):
    steps = rows(runs[family])
    assert len(steps) == 2
    assert max(step["sync_gap_max"] for step in steps) < 2e-5
    assert found[str(runs[family] / "final")] < 2e-5
