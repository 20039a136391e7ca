"""The start-up test against engines that lose gradients."""

import deepspeed.utils.groups
import pytest
import torch
from processes import PATIENCE_S

from sgpo.engine import zero
from sgpo.engine.gradient_check import check_gradients
from sgpo.model.loading import load_causal_lm
from sgpo.model.policy import PolicyModel
from sgpo.types import SgpoError


@pytest.fixture(scope="module")
def engine(builtin_folder):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            patch.setenv(name, "0")  # so that what the process group sets is undone
            patch.delenv(name)
        # DeepSpeed keeps its copy of a process group that another test of this process has destroyed.
        patch.setattr(deepspeed.utils.groups, "_WORLD_GROUP", None)
        device = zero.init_distributed(PATIENCE_S)
        engine = zero.ZeroEngine(
            PolicyModel(load_causal_lm(builtin_folder, dtype="float32")),
            device=device,
            zero_stage=2,
            dtype="float32",
            lr=1e-3,
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=0.1,
            max_grad_norm=1.0,
            optimizer_state="cpu_offload",
        )
        yield engine
        engine.close()
        torch.distributed.destroy_process_group()


def test_a_whole_engine_passes(engine):
    assert check_gradients(engine, dtype="float32") < 1e-5


@pytest.mark.parametrize("lost", [0, 1, 3])
def test_a_dropped_micro_batch_is_refused(engine, monkeypatch, lost):
    """As in DeepSpeed 7967: of several backward passes one does not arrive."""
    true_backward, calls = zero.ZeroEngine.backward, []

    def backward(self, loss):
        calls.append(loss)
        return true_backward(self, loss * (0.0 if len(calls) == 2 + lost else 1.0))

    monkeypatch.setattr(zero.ZeroEngine, "backward", backward)
    with pytest.raises(SgpoError, match=r"start-up test lost gradient: .* in one micro-batch .*another DeepSpeed"):
        check_gradients(engine, dtype="float32")
    monkeypatch.undo()
    assert check_gradients(engine, dtype="float32") < 1e-5


def test_a_gradient_that_one_layer_loses_is_refused(engine, monkeypatch):
    """As in DeepSpeed 7981: accumulation overwrites what some weights had collected; the norm hardly tells."""
    true_backward, calls = zero.ZeroEngine.backward, []

    def backward(self, loss):
        calls.append(loss)
        return true_backward(self, loss)

    monkeypatch.setattr(zero.ZeroEngine, "backward", backward)
    handle = engine.model.lm.model.norm.weight.register_hook(lambda g: g if len(calls) in (1, 5) else g * 0)
    try:
        with pytest.raises(SgpoError, match="start-up test lost gradient"):
            check_gradients(engine, dtype="float32")
    finally:
        handle.remove()


def test_no_gradient_at_all_is_refused(engine, monkeypatch):
    true_backward = zero.ZeroEngine.backward
    monkeypatch.setattr(zero.ZeroEngine, "backward", lambda self, loss: true_backward(self, loss * 0.0))
    with pytest.raises(SgpoError, match="start-up test lost gradient"):
        check_gradients(engine, dtype="float32")
