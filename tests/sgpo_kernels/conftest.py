"""One builder of inputs for every op, so that each rule of the house is tested on all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import sgpo_kernels
import torch
from sgpo_kernels import reference, sizes, testing
from torch import Tensor

if sizes.interpreting():
    # Triton 3.6's interpreter makes loop bounds of arrays in a way that numpy 2.4 and later refuse.
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang_tensor

    def _with_index(tensor: Any, *rest: Any) -> None:
        _patch(tensor, *rest)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = _with_index

OPS = ("logprob", "policy", "policy_on", "policy_dual", "forward_kl", "reverse_kl", "js", "sgpo")
LOSS_UPSTREAM = -1.7


@dataclass
class Case:
    """An op, its differentiable inputs (`leaves`) and the rest of its keyword arguments (`fixed`)."""

    op: str
    leaves: dict[str, Tensor]
    fixed: dict[str, Any]
    upstream: Tensor  # [2, N], for the two outputs of logprob
    frozen: set[str] = field(default_factory=set)

    def function(self, module: Any) -> Callable[..., Any]:
        if self.op == "logprob":
            return module.linear_logprob
        if self.op == "sgpo":
            return module.sgpo_loss
        return module.linear_policy_loss if self.op.startswith("policy") else module.linear_divergence

    def call(self, module: Any, dtype: torch.dtype | None = None, **extra: Any) -> tuple[dict[str, Tensor], Any]:
        """(the leaves used, what the op returned), with everything float cast to float64 where dtype is float64."""
        leaves = {name: leaf.detach().clone().to(dtype or leaf.dtype) for name, leaf in self.leaves.items()}
        for name, leaf in leaves.items():
            leaf.requires_grad_(name not in self.frozen)
        double = dtype == torch.float64
        fixed = {
            name: value.double() if double and isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in self.fixed.items()
        }
        return leaves, self.function(module)(**leaves, **{**fixed, **extra})

    def results(self, module: Any = sgpo_kernels, dtype: torch.dtype | None = None, **extra: Any) -> dict[str, Tensor]:
        """Outputs, statistics and gradients by name. The upstream gradient is `upstream`, not 1."""
        leaves, output = self.call(module, dtype, **extra)
        if self.op == "logprob":
            values = {"logprobs": output[0], "entropy": output[1]}
            scalar = (output[0] * self.upstream[0]).sum() + (output[1] * self.upstream[1]).sum()
        else:
            values = {"loss": output[0], **flat_stats(output[1])}
            # Losses per row (token_weight=None) take one upstream gradient per row.
            scalar = (output[0] * self.upstream[0]).sum() if output[0].dim() else output[0] * LOSS_UPSTREAM
        if scalar.requires_grad:
            scalar.backward()
        grads = {f"grad.{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        return {name: value.detach() for name, value in {**values, **grads}.items()}

    def check(self, **extra: Any) -> dict[str, Tensor]:
        """Compares every output, statistic and gradient with the reference; returns ours."""
        ours = self.results(**extra)
        plain, truth = self.results(reference), self.results(reference, torch.float64)
        assert set(ours) == set(truth)
        # A gradient is a weighted difference of probabilities, times the head or the hidden states.
        terms = max(float(leaf.abs().max()) if leaf.numel() else 0.0 for leaf in self.leaves.values())
        for name, value in ours.items():
            cancelled = abs(LOSS_UPSTREAM) * max(terms, 1.0) if name.startswith("grad.") else 0.0
            if value.dtype == torch.bool:
                assert torch.equal(value, truth[name]), name
            else:
                testing.assert_close_to_reference(value, plain[name], truth[name], name=name, cancelled=cancelled)
        return ours

    def weights(self) -> list[Tensor]:
        return [self.fixed[name] for name in ("token_weight", "policy_weight", "distill_weight") if name in self.fixed]


def flat_stats(stats: Any) -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    for name, value in stats._asdict().items():
        flat.update(
            {f"{name}.{k}": v for k, v in value._asdict().items()} if isinstance(value, tuple) else {name: value}
        )
    return flat


def build(
    op: str,
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, int, int] = (24, 8, 37),
    *,
    seed: int = 0,
    bias: bool = True,
    temperature: float | str = 1.0,
    spread: float = 0.5,
    logit_scale: float = 2.0,
    dead: float = 0.3,
    **fixed: Any,
) -> Case:
    """Random inputs; temperature "rows" gives one per row; `dead` is the share of rows of weight 0."""
    rows, width, vocab = shape
    gen = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen, dtype=torch.float64)

    def row_values(kind: str) -> Tensor:
        if kind == "weight":
            alive = torch.rand(rows, generator=gen) >= dead
            return (torch.rand(rows, generator=gen) + 0.1) * alive
        return normal(rows).float()

    hidden = normal(rows, width).to(dtype)
    head = (normal(vocab, width) * logit_scale / width**0.5).to(dtype)
    teacher = (hidden.double() + spread * normal(rows, width)).to(dtype)
    targets = torch.randint(vocab, (rows,), generator=gen)
    leaves = {"hidden": hidden, "head": head, **({"bias": normal(vocab).to(dtype)} if bias else {})}
    count = 2 * rows if op == "sgpo" else rows
    temperatures = torch.rand(count, generator=gen) + 0.5 if temperature == "rows" else temperature
    common: dict[str, Any] = {} if temperature == 1.0 else {"temperature": temperatures}
    policy: dict[str, Any] = {"advantages": row_values("advantage"), "clip_low": 0.2, "clip_high": 0.28}
    if op in ("policy", "policy_dual", "sgpo"):
        exact = {name: leaf.double() for name, leaf in leaves.items()}
        first = temperatures[:rows].double() if isinstance(temperatures, Tensor) else temperatures
        logprobs, _ = reference.linear_logprob(**exact, targets=targets, temperature=first)
        policy["old_logprobs"] = (logprobs + 0.5 * normal(rows)).float()
    if op in ("policy_dual", "sgpo"):
        policy["dual_clip"] = 1.5
    distill = {"teacher_hidden": teacher, "max_token_kl": 0.4, "kind": "forward_kl"}
    if op == "logprob":
        extra: dict[str, Any] = {"targets": targets}
    elif op.startswith("policy"):
        extra = {"targets": targets, "token_weight": row_values("weight"), **policy}
    elif op == "sgpo":
        leaves = {"policy_hidden": hidden, "distill_hidden": normal(rows, width).to(dtype), **leaves}
        leaves.pop("hidden")
        distill["teacher_hidden"] = (leaves["distill_hidden"].double() + spread * normal(rows, width)).to(dtype)
        weights = {"policy_weight": row_values("weight"), "distill_weight": row_values("weight")}
        extra = {"policy_targets": targets, **weights, **policy, **distill}
    else:
        extra = {"token_weight": row_values("weight"), **distill, "kind": op}
    return Case(op, leaves, {**extra, **common, **fixed}, normal(2, rows).float())


@pytest.fixture
def make_case() -> Callable[..., Case]:
    return build


@pytest.fixture(params=OPS)
def op(request: pytest.FixtureRequest) -> str:
    return request.param
