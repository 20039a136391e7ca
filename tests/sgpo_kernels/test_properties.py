"""Random combinations of everything an op takes, and the live columns held against their own definition in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import sgpo_kernels
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sgpo_kernels import reference, testing
from torch import Tensor

IMPLS = ("torch",)
KINDS = ("forward_kl", "reverse_kl", "js")
LIMITS = ("mask", "clamp", "scale")
# What `dropped` may add to the exact mass, relative to the row's gradient, its bound and its weight (chunk_loop).
FLOOR, MARGIN = 2.0**-18, 1e-4


@dataclass
class States:
    """Rows that sit on few tokens, with everything that an op of `kind` takes beside them."""

    kind: str
    hidden: Tensor
    head: Tensor
    bias: Tensor | None
    fixed: dict[str, Any]  # what ours and the reference both take
    weight: Tensor  # of each row, with its advantage

    def double(self) -> States:
        bias = None if self.bias is None else self.bias.double()
        fixed = {
            name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in self.fixed.items()
        }
        return replace(
            self,
            hidden=self.hidden.double(),
            head=self.head.double(),
            bias=bias,
            fixed=fixed,
            weight=self.weight.double(),
        )

    def call(self, module: Any, *inputs: Tensor | None, **options: Any) -> tuple[Tensor, Any]:
        hidden, head, bias = inputs
        if self.kind == "policy":
            return module.linear_policy_loss(hidden, head, bias=bias, **self.fixed, **options)
        return module.linear_divergence(hidden, head=head, bias=bias, kind=self.kind, **self.fixed, **options)

    def run(self, module: Any = sgpo_kernels, **options: Any) -> tuple[Tensor, Any, dict[str, Tensor]]:
        """(loss, stats, gradients by name)"""
        leaves = {"hidden": self.hidden, "head": self.head, **({} if self.bias is None else {"bias": self.bias})}
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
        loss, stats = self.call(module, leaves["hidden"], leaves["head"], leaves.get("bias"), **options)
        loss.backward()
        return loss.detach(), stats, {name: leaf.grad for name, leaf in leaves.items()}

    def slopes(self) -> tuple[Tensor, Tensor]:
        """float64, by autograd through an identity head: d loss / d logits [N, V], after the temperature and before
        the bias and the soft-cap."""
        exact = self.double()
        eye = torch.eye(exact.head.shape[0], dtype=torch.float64)
        temperatures, cap = exact.fixed.get("temperature", 1.0), exact.fixed.get("logit_softcap")
        temperatures = temperatures.unsqueeze(1) if isinstance(temperatures, Tensor) else temperatures

        def logits(states: Tensor) -> tuple[Tensor, Tensor]:
            product = (states @ exact.head.t()).requires_grad_()
            raw = product if exact.bias is None else product + exact.bias
            finished = (raw if cap is None else cap * torch.tanh(raw / cap)) / temperatures
            finished.retain_grad()
            return product, finished

        product, finished = logits(exact.hidden)
        plain = {k: v for k, v in exact.fixed.items() if k not in ("temperature", "logit_softcap")}
        if "teacher_hidden" in plain:
            plain["teacher_hidden"] = logits(plain["teacher_hidden"])[1].detach()
        loss, _ = replace(exact, fixed=plain).call(reference, finished, eye, None)
        loss.backward()
        assert finished.grad is not None
        assert product.grad is not None
        return finished.grad, product.grad


def confident(kind: str, seed: int, dtype: torch.dtype, shape: tuple[int, int, int] = (60, 12, 240)) -> States:
    """Entropies from 1e-6 to about 1 (every sixth draw has flat rows), weights over nine decades, drawn options."""
    rows, width, vocab = shape
    gen = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen, dtype=torch.float64)

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, generator=gen, dtype=torch.float64)

    head = normal(vocab, width)
    tokens = torch.randint(6, (rows,), generator=gen)
    sharpness = 1.0 + 1.5 * uniform(rows, 1)
    flat = uniform(rows, 1) < (0.1 if seed % 6 == 5 else 0.0)
    hidden = torch.where(flat, 0.0, sharpness * head[tokens]) + 0.1 * normal(rows, width)
    fixed: dict[str, Any] = {"token_weight": 10 ** (9 * uniform(rows) - 6) * (uniform(rows) > 0.2)}
    if kind == "policy":
        fixed |= {"targets": tokens, "advantages": normal(rows), "clip_low": 0.2, "clip_high": 0.28}
        fixed["dual_clip"] = 1.5 if seed % 3 else None
        if seed % 2:
            fixed["targets"] = torch.where(uniform(rows) < 0.2, torch.randint(vocab, (rows,), generator=gen), tokens)
    else:
        spread = 10 ** (-2 * uniform(rows, 1))
        fixed |= {"teacher_hidden": hidden + spread * normal(rows, width), "over_limit": LIMITS[seed % 3]}
        fixed["max_token_kl"] = (None, 0.1, 1e-3)[(seed // 3) % 3]
    fixed["logit_softcap"] = (None, 25.0)[seed % 2]
    fixed["temperature"] = (1.0, 0.7, 0.6 + uniform(rows))[(seed // 2) % 3]
    bias = normal(vocab) if (seed // 4) % 2 else None
    cast = {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in fixed.items()}
    weight = cast["token_weight"].double() * (cast["advantages"].double() if kind == "policy" else 1.0)
    if "teacher_hidden" in fixed:
        cast["teacher_hidden"] = fixed["teacher_hidden"].to(dtype)
    states = States(kind, hidden.to(dtype), head.to(dtype), None if bias is None else bias.to(dtype), cast, weight)
    if kind == "policy" and seed % 4:
        temperatures = cast["temperature"].double() if isinstance(cast["temperature"], Tensor) else cast["temperature"]
        exact = states.double()
        options = {"temperature": temperatures, "bias": exact.bias, "logit_softcap": cast["logit_softcap"]}
        old, _ = reference.linear_logprob(exact.hidden, exact.head, cast["targets"], **options)
        cast["old_logprobs"] = (old + 0.3 * normal(rows)).float()
    return states


def chunks_of(states: States, size: int) -> list[Tensor]:
    return list((states.weight != 0).nonzero().squeeze(1).split(size))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["policy", *KINDS])
@pytest.mark.parametrize("seed", range(24))
def test_the_live_columns_are_those_of_the_definition(kind, seed, impl):
    """In float64: which columns each chunk keeps, the gradients of exactly those, the mass of the others, and what dH
    gets back for it."""
    states = confident(kind, seed, torch.float64)
    tolerance, size = 2.0 ** -(5 + seed % 10), (60, 17, 5, 1)[seed % 4]
    _, stats, grads = states.run(impl=impl, column_tolerance=tolerance, chunk_rows=size)
    core, dz = states.slopes()
    temperatures = states.fixed["temperature"]
    relative = core.abs() / states.weight.abs().unsqueeze(1)
    centred, centre = states.fixed["logit_softcap"] is None, None
    expected, returned, seen = torch.zeros_like(dz), torch.zeros_like(states.hidden), set()
    for rows in chunks_of(states, size):
        # The largest sum |dz| / weight is itself a bound for reverse KL and JS: their sets may be smaller, not larger.
        largest = min(1.0, float(relative[rows].sum(1).max()))
        peak = relative[rows].amax(0)
        live = (peak >= tolerance * largest) & (peak > 0)
        edge = ((peak / (tolerance * max(largest, 1e-300)) - 1).abs() < 1e-6).any()
        above = live
        share = stats.column_share[rows]
        assert bool((share == share[0]).all())
        if share[0] == 1:
            live = torch.ones_like(live)
            assert bool(edge) or kind not in ("policy", "forward_kl") or int((peak >= tolerance * largest).sum()) > 120
        elif kind in ("policy", "forward_kl"):
            assert bool(edge) or float(share[0]) == pytest.approx(float(live.double().mean()), abs=1e-6)
        else:
            # The share of the columns above the tolerance, and no more than above the threshold.
            least, most = float((peak >= tolerance).double().mean()), float(live.double().mean())
            assert least - 1e-6 <= float(share[0]) <= most + 1e-6
            keep = peak.argsort(descending=True)[: round(float(share[0]) * len(peak))]
            live = torch.zeros_like(live).index_fill_(0, keep, True)
        if centred and centre is None:
            # What lies below the threshold, also where the chunk is dense.
            weights = peak * ~(above if share[0] == 1 else live)
            centre = weights @ states.head / weights.sum().clamp(min=1e-300)
        expected[rows] = dz[rows] * live
        lost = (dz[rows] * ~live).abs().sum(1)
        if centred and share[0] != 1:
            total = (dz[rows] * ~live).sum(1)
            returned[rows] = torch.outer(total, centre)
            lost += total.abs()
        assert bool((lost <= stats.dropped[rows]).all())
        assert share[0] != 1 or not stats.dropped[rows].any()
        if kind in ("policy", "forward_kl") and centred and share[0] != 1:
            # Not idle: the mass itself and what rounding may cost, at the row's own slope.
            hottest = 1 / (temperatures[rows].double() if isinstance(temperatures, Tensor) else temperatures)
            ratio = stats.ratio[rows].double() if kind == "policy" else 1.0
            slack = MARGIN * lost + 2.01 * FLOOR * states.weight[rows].abs() * hottest * ratio * 1.01
            assert bool((stats.dropped[rows] <= lost + slack).all())
        seen.add(float(share[0]) == 1)
    product = {
        "hidden": expected @ states.head + returned,
        "head": expected.t() @ states.hidden,
        "bias": expected.sum(0),
    }
    for name, grad in grads.items():
        torch.testing.assert_close(grad, product[name], rtol=1e-8, atol=1e-9 * float(product[name].abs().max()))
    missing = (grads["hidden"] - dz @ states.head).abs().amax(1)
    rounding = 1e-12 * (states.weight.abs() + dz.abs().sum(1))
    assert bool((missing <= (stats.dropped + rounding) * float(states.head.abs().max())).all())
    assert False in seen or seed % 6 == 5 or tolerance < 2.0**-9


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["policy", *KINDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bound_holds_in_the_narrow_dtypes(kind, dtype, impl):
    sparse = 0
    for seed in range(12):
        states = confident(kind, seed, dtype)
        options = {"impl": impl, "chunk_rows": (60, 11)[seed % 2]}
        tolerance = 2.0 ** -(8 + seed % 9)
        _, exact_stats, exact = states.run(**options)
        _, stats, grads = states.run(**options, column_tolerance=tolerance)
        assert not exact_stats.dropped.any()
        for name, value in zip(stats._fields, stats, strict=True):
            if name not in ("dropped", "column_share"):
                assert torch.equal(value, getattr(exact_stats, name)), name
        # Both gradients are rounded sums: of the row's |dz| times the head.
        _, dz = states.slopes()
        unit = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7}[dtype]
        slope = (dz.abs().sum(1) + 1e-2 * states.weight.abs().double()) * float(states.head.abs().max())
        off = (grads["hidden"].double() - exact["hidden"].double()).abs().amax(1)
        assert bool((off <= stats.dropped.double() * float(states.head.abs().max()) + unit * slope).all()), seed
        sparse += int((stats.column_share[states.weight != 0] < 1).any())
    assert sparse >= 9


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("depth", "low"), [(1000.0, -16.0), (100.0, -14.0), (300.0, -18.0), (20.0, -14.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_holds_where_the_sum_is_a_thousand_times_what_is_dropped(kind, depth, low, impl):
    """A token that the teacher rules out makes the sums of reverse KL large; the tail that is dropped is the small
    difference of two of them. Rounding must not push it under the mass."""
    rows, vocab = 60, 4000
    gen = torch.Generator().manual_seed(0)
    student = torch.randn(rows, vocab, generator=gen) * 0.5 + low
    student[:, :2] = torch.randn(rows, 2, generator=gen)
    teacher = student + torch.rand(rows, vocab, generator=gen)
    teacher[:, 0] -= depth
    hidden, head, weight = student.clone(), torch.eye(vocab).requires_grad_(), torch.ones(rows)
    options = {"kind": kind, "column_tolerance": 2.0**-8, "chunk_rows": rows, "impl": impl}
    loss, stats = sgpo_kernels.linear_divergence(hidden, teacher, head, token_weight=weight, **options)
    loss.backward()
    exact = student.double().requires_grad_()
    logp, logq = exact.log_softmax(1), teacher.double().log_softmax(1)
    middle = torch.logaddexp(logp, logq).detach() - math.log(2)
    sums = {"forward_kl": -logq.exp() * logp, "reverse_kl": logp.exp() * (logp - logq)}
    # d JS / d p_S = (log p_S - log m) / 2, so that m may be held.
    value = sums[kind] if kind in sums else logp.exp() * (logp - middle).detach() / 2
    value.sum().backward()
    assert head.grad is not None
    assert exact.grad is not None
    dropped = ~head.grad.any(1)
    assert 0 < int((~dropped).sum()) < 50
    lost = exact.grad[:, dropped].abs().sum(1)
    assert float(lost.min()) > 1e-7
    assert bool((lost <= stats.dropped.double()).all())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["policy", *KINDS])
@pytest.mark.parametrize("exponent", [-30, -1, 17])
def test_a_power_of_two_on_all_weights_is_exact(kind, exponent, impl):
    states = confident(kind, 6, torch.float32)
    options = {"impl": impl, "column_tolerance": 2.0**-9, "chunk_rows": 16}
    loss, stats, grads = states.run(**options)
    factor = 2.0**exponent
    states.fixed["token_weight"] = states.fixed["token_weight"] * factor
    scaled_loss, scaled_stats, scaled = states.run(**options)
    assert float(stats.column_share[states.weight != 0].min()) < 1
    assert torch.equal(scaled_loss, loss * factor)
    assert torch.equal(scaled_stats.column_share, stats.column_share)
    assert torch.equal(scaled_stats.dropped, stats.dropped * factor)
    assert all(torch.equal(scaled[name], grads[name] * factor) for name in grads)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["policy", *KINDS])
@pytest.mark.parametrize("frozen", ["hidden", "head", "bias"])
def test_frozen_inputs_do_not_move_the_live_columns(kind, frozen, impl):
    states = confident(kind, 4, torch.float32)
    options = {"impl": impl, "column_tolerance": 2.0**-9, "chunk_rows": 16}
    _, stats, grads = states.run(**options)
    leaves = {name: getattr(states, name).clone().requires_grad_(name != frozen) for name in ("hidden", "head", "bias")}
    loss, ours = states.call(sgpo_kernels, *leaves.values(), **options)
    loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(stats, ours, strict=True))
    for name, leaf in leaves.items():
        assert leaf.grad is None if name == frozen else torch.equal(leaf.grad, grads[name])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["policy", *KINDS])
@pytest.mark.parametrize("where", ["head", "bias", "teacher_hidden"])
def test_nan_anywhere_reaches_the_gradient(kind, where, impl):
    """Where no limit takes it for a divergence that is too large (test_not_finite.py)."""
    states = confident(kind, 4, torch.float32)
    if kind != "policy":
        states.fixed["max_token_kl"] = None
    if where == "teacher_hidden":
        if kind == "policy":
            return
        states.fixed[where][(states.weight != 0).nonzero()[0, 0], 0] = torch.nan
    elif where == "head":
        states.head[200, 3] = torch.nan
    else:
        states.bias[200] = torch.nan
    loss, _, grads = states.run(impl=impl, column_tolerance=2.0**-9, chunk_rows=16)
    assert loss.isnan()
    assert grads["hidden"].isnan().any()
    assert grads["head"].isnan().any()


@st.composite
def sgpo_inputs(draw) -> dict[str, Any]:
    policy_rows, distill_rows = draw(st.integers(0, 20)), draw(st.integers(0, 20))
    width, vocab = draw(st.integers(1, 17)), draw(st.integers(1, 90))
    limit = draw(st.one_of(st.none(), st.floats(1e-3, 3.0)))
    return {
        "shape": (policy_rows, distill_rows, width, vocab),
        "dtype": draw(st.sampled_from((torch.float64, torch.float32, torch.bfloat16, torch.float16))),
        "seed": draw(st.integers(0, 2**20)),
        "scale": draw(st.sampled_from((0.3, 2.0, 6.0))),
        "decades": draw(st.sampled_from((0.0, 3.0, 9.0))),
        "dead": draw(st.sampled_from((0.0, 0.5, 1.0))),
        "bias": draw(st.booleans()),
        "on_policy": draw(st.booleans()),
        "rows_temperature": draw(st.booleans()),
        "chunk_rows": draw(st.one_of(st.none(), st.integers(1, 25))),
        "tolerance": draw(st.sampled_from((0.0, 2.0**-16, 2.0**-10, 2.0**-5))),
        "settings": {
            "clip_low": draw(st.one_of(st.none(), st.floats(0, 1))),
            "clip_high": draw(st.one_of(st.none(), st.floats(0, 1))),
            "dual_clip": draw(st.one_of(st.none(), st.floats(1.05, 4))),
            "kind": draw(st.sampled_from(KINDS)),
            "max_token_kl": limit,
            "over_limit": draw(st.sampled_from(LIMITS)),
            "logit_softcap": draw(st.one_of(st.none(), st.floats(1.0, 30.0))),
        },
    }


def sgpo_tensors(x: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(leaves, the other arguments)"""
    policy_rows, distill_rows, width, vocab = x["shape"]
    gen = torch.Generator().manual_seed(x["seed"])

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen, dtype=torch.float64)

    def weights(rows: int) -> Tensor:
        alive = torch.rand(rows, generator=gen) >= x["dead"]
        return (10 ** (x["decades"] * (torch.rand(rows, generator=gen) - 0.7))) * alive

    leaves = {
        "policy_hidden": normal(policy_rows, width),
        "distill_hidden": normal(distill_rows, width),
        "head": normal(vocab, width) * x["scale"] / width**0.5,
        **({"bias": normal(vocab)} if x["bias"] else {}),
    }
    leaves = {name: leaf.to(x["dtype"]) for name, leaf in leaves.items()}
    fixed = {
        **x["settings"],
        "policy_targets": torch.randint(vocab, (policy_rows,), generator=gen),
        "teacher_hidden": (leaves["distill_hidden"].double() + 0.3 * normal(distill_rows, width)).to(x["dtype"]),
        "advantages": normal(policy_rows).float(),
        "policy_weight": weights(policy_rows),
        "distill_weight": weights(distill_rows),
    }
    if x["rows_temperature"]:
        fixed["temperature"] = torch.rand(policy_rows + distill_rows, generator=gen) + 0.5
    if not x["on_policy"]:
        first = fixed["temperature"][:policy_rows].double() if x["rows_temperature"] else 1.0
        old, _ = reference.linear_logprob(
            leaves["policy_hidden"].double(),
            leaves["head"].double(),
            fixed["policy_targets"],
            temperature=first,
            bias=leaves["bias"].double() if x["bias"] else None,
            logit_softcap=fixed["logit_softcap"],
        )
        fixed["old_logprobs"] = (old + 0.3 * normal(policy_rows)).float()
    return leaves, fixed


def sgpo_results(module: Any, leaves: dict[str, Tensor], fixed: dict[str, Any], dtype: torch.dtype, **options: Any):
    """(loss, stats, gradients) with every float argument in float64 where dtype is."""
    leaves = {name: leaf.to(dtype).clone().requires_grad_() for name, leaf in leaves.items()}
    fixed = {**fixed, "teacher_hidden": fixed["teacher_hidden"].to(dtype)}
    if dtype == torch.float64:
        fixed = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in fixed.items()}
    loss, stats = module.sgpo_loss(**leaves, **fixed, **options)
    loss.backward()
    return loss.detach(), stats, {name: leaf.grad for name, leaf in leaves.items()}


def near_a_gate(x: dict[str, Any], truth: Any, gap: float) -> bool:
    """Whether a row lies so close to a clip or to the limit that rounding may decide."""
    rule, ratio = x["settings"], truth.policy.ratio[truth.policy.live]
    bounds = [
        1 - (rule["clip_low"] if rule["clip_low"] is not None else 9.0),
        1 + (rule["clip_high"] if rule["clip_high"] is not None else 9e9),
        rule["dual_clip"] or 9e9,
    ]
    close = [not x["on_policy"] and bool((ratio - bound).abs().lt(gap * (1 + ratio)).any()) for bound in bounds]
    limit = rule["max_token_kl"] or 9e9
    return any(close) or bool((truth.divergence.divergence - limit).abs().lt(gap).any())


@pytest.mark.parametrize("impl", IMPLS)
@given(x=sgpo_inputs())
@settings(max_examples=60, deadline=None)
def test_sgpo_of_anything_is_that_of_the_reference(impl, x):
    leaves, fixed = sgpo_tensors(x)
    dtype = x["dtype"]
    truth_loss, truth_stats, truth = sgpo_results(reference, leaves, fixed, torch.float64)
    if near_a_gate(x, truth_stats, 1e-4):
        return
    options = {"impl": impl, "chunk_rows": x["chunk_rows"]}
    loss, stats, grads = sgpo_results(sgpo_kernels, leaves, fixed, dtype, **options, column_tolerance=x["tolerance"])
    exact_loss, exact_stats, exact = sgpo_results(sgpo_kernels, leaves, fixed, dtype, **options)
    assert torch.equal(loss, exact_loss)
    policy_size = truth_stats.policy.ratio.clamp(min=1) * fixed["advantages"].abs() * fixed["policy_weight"]
    distill_size = truth_stats.divergence.divergence.clamp(min=1) * fixed["distill_weight"]
    total = float(policy_size.sum() + distill_size.sum())
    wide = testing.FLOORS[torch.float64 if dtype == torch.float64 else torch.float32]
    assert abs(float(loss) - float(truth_loss)) <= 10 * wide * total
    # dz is rounded to the dtype of the inputs; each row is measured by its own weight, which spans decades.
    unit = 4 * testing.FLOORS[dtype]
    top = {name: max(float(leaf.abs().max()), 1.0) if leaf.numel() else 1.0 for name, leaf in leaves.items()}
    if "temperature" in fixed:
        unit *= 2
    sizes = {"policy_hidden": policy_size, "distill_hidden": distill_size}
    # The steps of float16 below its normal numbers, of dz relative to the largest weight and of the gradient itself.
    tiny = 2.0**-21 * top["head"] * max(total, 1.0) if dtype == torch.float16 else 0.0
    for name, grad in exact.items():
        assert bool(torch.isfinite(grad).all()), name
        off = (grad.double() - truth[name]).abs()
        if name in sizes:
            assert bool((off <= (unit * top["head"] * sizes[name] + tiny).unsqueeze(1)).all()), name
        else:
            widest = max(top["policy_hidden"], top["distill_hidden"])
            assert float(off.max()) <= unit * widest * total + tiny, name
    dropped = {"policy_hidden": stats.policy.dropped, "distill_hidden": stats.divergence.dropped}
    for name, bound in dropped.items():
        off = (grads[name].double() - exact[name].double()).abs()
        allowed = bound.double() * top["head"] + unit * top["head"] * sizes[name] + tiny
        assert bool((off <= allowed.unsqueeze(1)).all()), name
    for part in (stats.policy, stats.divergence):
        assert bool((part.column_share[part.live] <= 1).all())
        assert not part.column_share[~part.live].any()
        assert bool((part.dropped >= 0).all())
        assert not part.dropped[part.column_share == 1].any()
    if x["tolerance"] == 0:
        assert all(torch.equal(grads[name], exact[name]) for name in exact)
        assert not exact_stats.policy.dropped.any()
