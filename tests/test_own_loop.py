"""The example of a loop of one's own runs, learns, and agrees with plain PyTorch."""

from __future__ import annotations

import re

import pytest
import torch

from examples import own_loop


def test_the_example_agrees_with_plain_pytorch_and_learns(capsys: pytest.CaptureFixture[str]) -> None:
    own_loop.main(["--steps", "4"])
    first, second = capsys.readouterr().out.splitlines()
    losses = [float(text) for text in re.findall(r"-?\d+\.\d+", first)]
    errors = [float(text) for text in re.findall(r"\d\.\de[+-]\d+", second)]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert len(errors) == 2
    assert max(errors) < 2e-5


def test_its_reduction_is_not_a_weighted_sum() -> None:
    losses, sequence = torch.tensor([1.0, 1.0, 3.0]), torch.tensor([0, 0, 1])
    assert own_loop.reduce(losses, sequence).item() == pytest.approx(2.0)
    assert own_loop.reduce(torch.tensor([0.0, 2.0, 3.0]), sequence).item() == pytest.approx((2**0.5 + 3) / 2)
