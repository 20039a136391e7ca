"""What `from sgpo_kernels import ...` gives, and how a call's records cross the operator's border."""

from __future__ import annotations

import subprocess
import sys

import pytest
import sgpo_kernels
import torch
from sgpo_kernels import custom_op
from sgpo_kernels.inputs import ClipRange, DistillInputs, KlLimit, LossOptions, PolicyInputs


@pytest.mark.parametrize(
    "first",
    ["import sgpo_kernels", "import sgpo_kernels.sgpo_loss", "import sgpo_kernels.custom_op",
     "import sgpo_kernels.testing", "from sgpo_kernels.sgpo_loss import sgpo_loss",
     "from sgpo_kernels import reference"],
)  # fmt: skip
def test_sgpo_loss_is_the_function(first):
    """A module has that name too: whatever is imported first, or later, the package's name is the function."""
    code = f"""{first}
import importlib, sys
import sgpo_kernels.sgpo_loss
importlib.import_module("sgpo_kernels.sgpo_loss")
from sgpo_kernels import sgpo_loss
assert callable(sgpo_loss) and sgpo_loss is sgpo_kernels.sgpo_loss
assert sgpo_loss is sys.modules["sgpo_kernels.sgpo_loss"].sgpo_loss
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there():
    assert all(callable(getattr(sgpo_kernels, name)) for name in sgpo_kernels.__all__)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("groups", ["policy", "distill", "both"])
def test_unpack_gives_back_what_pack_was_given(groups, per_row):
    """The records of both groups, the options, and None where something is off."""
    hidden, weight, ids = torch.randn(3, 4), torch.rand(3), torch.arange(3)
    policy = PolicyInputs(hidden, ids, None, weight, weight, ClipRange(0.2, None, 3.0))
    distill = DistillInputs(hidden, hidden, None, None, weight, KlLimit("js", None, "clamp"))
    policy, distill = policy if groups != "distill" else None, distill if groups != "policy" else None
    temperature = torch.rand(6 if groups == "both" else 3) + 0.5 if per_row else 0.7
    options = LossOptions(temperature, 5.0, 0.01, None, None, 0, "torch", 7)
    head, bias = torch.randn(5, 4), torch.randn(5)
    found = custom_op.unpack(custom_op.pack(head, bias, policy, distill, options))
    assert (found.policy is None, found.distill is None) == (policy is None, distill is None)
    for ours, given in ((found.policy, policy), (found.distill, distill)):
        assert given is None or all(a is b or a == b for a, b in zip(ours, given, strict=True))
    shared = found.shared
    assert shared.head is head
    assert shared.bias is bias
    assert (shared.softcap, shared.column_tolerance, shared.impl, shared.chunk_rows) == (5.0, 0.01, "torch", 7)
    assert (shared.shard.group_name, shared.shard.start) == (None, 0)
    if per_row:
        parts = [found.policy_temperature, found.distill_temperature]
        kept = [part for part, group in zip(parts, (policy, distill), strict=True) if group is not None]
        assert torch.equal(torch.cat(kept), temperature)
    else:
        assert (found.policy_temperature, found.distill_temperature) == (0.7, 0.7)


def test_inputs_with_a_gradient_come_first():
    """Backward returns one gradient per argument, by position."""
    assert custom_op.OperatorInputs._fields[:4] == custom_op.WantedGrads._fields
