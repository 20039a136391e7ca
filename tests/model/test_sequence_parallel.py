"""Ranks that share their forward passes: the gradient of one process for half the memory; what cannot is refused."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from sgpo.builders.task import check_data
from sgpo.config import Config
from sgpo.planning.architectures import check_sequence_parallel
from sgpo.types import SgpoError, TaskData
from sgpo.utils import distributed

WORKER = Path(__file__).with_name("sequence_worker.py")
CASES = ("0:padded:1:all:frugal", "2:padded:2:all", "2:packed:4:last", "3:packed:1:all:frugal")
BUDGET = 60


@pytest.fixture(scope="module")
def two(launcher, tmp_path_factory):
    out = tmp_path_factory.mktemp("sequence") / "out.pt"
    launcher([str(WORKER), str(out), *CASES], processes=2)
    return torch.load(out)


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_one_process(two, case):
    found, truth = two[case]["gradient"]
    assert float(truth.norm()) > 0
    assert float((found - truth).norm() / truth.norm()) < 1e-5
    loss, wanted = two[case]["loss"]
    assert loss == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_each_sequence_alone(two, case):
    found, truth = two[case]["scores"]
    assert found == pytest.approx(truth, abs=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_every_pass_is_shared_equally_and_within_the_joint_budget(two, case):
    first, second = two[case]["widths"]
    assert first == second
    assert max(first) <= BUDGET + 1  # a rank without a sequence lends one token of padding
    assert 2 * sum(first) > 1.5 * BUDGET * len(first) * ("packed" in case)
    assert len(set(two[case]["passes"])) == 1


def test_each_rank_needs_half_the_activations(two):
    """One long micro-batch of the second rank; what the loss adds there is small."""
    for checkpointed in (False, True):
        (_, first), (alone, second) = two["peaks"][checkpointed]
        assert max(first, second) < 0.55 * alone


@pytest.mark.parametrize(
    ("size", "processes", "heads", "kv_heads", "complaint"),
    [
        (2, 3, 4, 4, r"engine\.sequence_parallel_size = 2 must divide the number of processes, which is 3"),
        (2, 1, 4, 4, "number of processes, which is 1"),
        (3, 3, 28, 4, "must divide the 28 attention heads"),
        (6, 6, 12, 4, "its 4 key/value heads or be a multiple"),
    ],
)
def test_what_cannot_share_is_refused(size, processes, heads, kv_heads, complaint):
    model = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    for config in (model, {"text_config": model}):
        with pytest.raises(SgpoError, match=complaint):
            check_sequence_parallel(size, processes=processes, model=config)


def test_a_run_is_refused_before_its_model_is_loaded(builtin_folder, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    config = Config.model_validate(
        {"model": {"path": "x"}, "data": {"train": "x"}, "engine": {"sequence_parallel_size": 3}}
    )
    with pytest.raises(SgpoError, match="must divide the 4 attention heads"):
        check_data(config, builtin_folder, TaskData([], []), None)


def test_other_attention_is_refused():
    raw = {"model": {"path": "x", "attn_implementation": "eager"}, "data": {"train": "x"}}
    with pytest.raises(ValidationError, match=r"needs model\.attn_implementation: sdpa"):
        Config.model_validate(raw | {"engine": {"sequence_parallel_size": 2}})


def test_what_can_share_is_not_refused():
    for size, kv_heads in ((1, 3), (2, 4), (4, 4), (8, 4), (8, 8), (4, None)):
        check_sequence_parallel(size, processes=8, model={"num_attention_heads": 8, "num_key_value_heads": kv_heads})
