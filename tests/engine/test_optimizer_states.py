"""Masters and moments on the device, on the host and in 8 bits: one gradient, one result, nothing lost on the way."""

import importlib.util
from pathlib import Path

import pytest
import torch

from sgpo.config import Config
from sgpo.engine.optimizer import build_optimizer, fit_blocks
from sgpo.types import SgpoError
from sgpo.utils.config_file import checked

WORKER = Path(__file__).with_name("states_worker.py")
HERE = importlib.util.find_spec("torchao") is not None
FULL = "0:float32:full"
OFFLOADED = ["2:float32:cpu_offload", "3:float32:cpu_offload"]
EIGHT_BIT = [f"{stage}:float32:8bit" for stage in (2, 3)]
LOW = ["3:bfloat16:cpu_offload", "2:bfloat16:full:offload"]
LOW_8BIT = ["2:bfloat16:8bit:offload"]
SLOW = ["slow:2:bfloat16:full", "slow:3:bfloat16:cpu_offload"]
SLOW_8BIT = ["slow:2:bfloat16:8bit"]


def _values(*cases):
    """The cases that can run here."""
    return [c if isinstance(c, str) else c.values[0] for c in cases if isinstance(c, str) or HERE]


def _run(launcher, tmp_path_factory, folder, cases, processes):
    out = tmp_path_factory.mktemp("states") / "out.pt"
    launcher([str(WORKER), str(out), str(folder), *cases], processes=processes)
    return torch.load(out)


@pytest.fixture(scope="module")
def one(launcher, tmp_path_factory, builtin_folder):
    cases = _values(FULL, *OFFLOADED, *EIGHT_BIT, *LOW, *LOW_8BIT, "slow:0:float32:full", *SLOW, *SLOW_8BIT)
    return _run(launcher, tmp_path_factory, builtin_folder, cases, 1)


@pytest.fixture(scope="module")
def two(launcher, tmp_path_factory, builtin_folder):
    return _run(launcher, tmp_path_factory, builtin_folder, OFFLOADED, 2)


def _flat(weights):
    return torch.cat([weights[name].double().flatten() for name in sorted(weights)])


def _relative(ours, truth, start):
    """Difference of two movements from the same start, relative to the movement."""
    return float((_flat(ours) - _flat(truth)).norm() / (_flat(truth) - _flat(start)).norm())


@pytest.mark.parametrize("case", [FULL, *OFFLOADED, *EIGHT_BIT, *LOW, *LOW_8BIT])
def test_the_start_up_test_passes_and_leaves_everything_as_it_was(one, case):
    assert one[case]["difference"] < (1e-5 if "float32" in case and "8bit" not in case else 0.02)
    assert one[case]["untouched"]


@pytest.mark.parametrize("case", [FULL, *OFFLOADED, *EIGHT_BIT, *LOW, *LOW_8BIT])
def test_a_resumed_run_is_the_straight_run_bit_for_bit(one, case):
    assert one[case]["resumed"]


@pytest.mark.parametrize("case", OFFLOADED)
def test_offloaded_states_give_the_gradients_and_weights_of_states_on_the_device(one, case):
    start = one["slow:0:float32:full"]["start"]
    assert one[case]["norms"] == pytest.approx(one[FULL]["norms"], rel=1e-5)
    assert _relative(one[case]["weights"], one[FULL]["weights"], start) < 1e-3


@pytest.mark.parametrize("case", EIGHT_BIT)
def test_8_bit_moments_follow_those_in_fp32(one, case):
    start = one["slow:0:float32:full"]["start"]
    assert one[case]["quantised"] > 0.99
    assert one[case]["norms"] == pytest.approx(one[FULL]["norms"], rel=0.02)
    assert _relative(one[case]["weights"], one[FULL]["weights"], start) < 0.2


@pytest.mark.parametrize("case", OFFLOADED)
def test_two_processes_give_the_weights_of_one(one, two, case):
    start = one["slow:0:float32:full"]["start"]
    assert two[case]["norms"] == pytest.approx(one[case]["norms"], rel=1e-5)
    assert _relative(two[case]["weights"], one[case]["weights"], start) < 1e-3
    assert two[case]["untouched"]
    assert two[case]["resumed"]


@pytest.mark.parametrize("case", [*SLOW, *SLOW_8BIT])
def test_a_small_learning_rate_moves_bf16_weights_through_their_fp32_masters(one, case):
    run, exact = one[case], one["slow:0:float32:full"]
    for name, master in run["masters"].items():
        assert torch.equal(run["weights"][name], master.bfloat16()), name
    assert _relative(run["masters"], exact["masters"], exact["start"]) < 0.25
    start, ours, rounded = _flat(run["start"]), _flat(run["weights"]), _flat(exact["weights"]).bfloat16().double()
    coarse = (start.abs() >= 2**-8) & (start.abs() < 2**-6)  # half the distance of two bf16 numbers is 8e-6 to 3e-5
    moved, expected = (ours != start) & coarse, (rounded != start) & coarse
    assert moved.sum() > 0.2 * coarse.sum()
    assert (moved & expected).sum() > 0.9 * expected.sum()
    # The same steps without masters: a step of 1e-6 is rounded away.
    assert torch.equal((start[coarse].bfloat16() - 1e-6).double(), start[coarse])


def test_blocks_of_8_bit_moments_that_do_not_divide_the_share_are_refused():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    optimizer.block_size = 256
    fit_blocks(optimizer, [4096, 4096 + 64])
    assert optimizer.block_size == 64
    with pytest.raises(SgpoError, match=r"8bit cannot cut this process's 4106 weights into equal blocks"):
        fit_blocks(optimizer, [4106])


def test_8_bit_moments_without_their_package_are_one_sentence(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao.optim", None)
    with pytest.raises(SgpoError, match=r"8bit needs torchao .*pip install 'sgpo\[8bit\]'"):
        build_optimizer(
            [torch.nn.Parameter(torch.zeros(4))], "8bit", device=torch.device("cpu"),
            lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"engine": {"optimizer_state": "cpu_offload", "zero_stage": 1}}, "cpu_offload needs zero_stage 2 or 3"),
        ({"engine": {"optimizer_state": "8bit"}}, "8bit needs zero_stage 2 or 3"),
        ({"engine": {"offload_states_during_rollout": True, "zero_stage": 3}}, "needs zero_stage 2"),
        (
            {
                "engine": {"offload_states_during_rollout": True, "zero_stage": 2},
                "rollout": {"engine": "hf", "placement": "process"},
            },
            "placement: inprocess",
        ),
    ],
)
def test_pairs_that_cannot_work_are_refused(sections, message):
    with pytest.raises(SgpoError, match=message):
        checked(Config, {"model": {"path": "m"}, "data": {"train": "d"}, **sections}, "config")
