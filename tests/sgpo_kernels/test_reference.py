"""The reference itself: gradcheck in float64 and numbers computed by hand."""

from __future__ import annotations

import math

import pytest
import sgpo_kernels
import torch
from sgpo_kernels import reference

LN2 = math.log(2)


@pytest.mark.parametrize("module", [reference, sgpo_kernels], ids=["reference", "ops"])
@pytest.mark.parametrize("temperature", [1.0, 0.6, "rows"])
@pytest.mark.parametrize("op", ["logprob", "policy", "policy_dual", "forward_kl", "reverse_kl", "js", "sgpo"])
def test_gradcheck(make_case, op, module, temperature):
    """Finite differences; `scale` and on-policy ratios hold constants back and have tests of their own."""
    case = make_case(op, torch.float64, (5, 3, 6), temperature=temperature, seed=3)
    fixed = {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in case.fixed.items()
    }
    # Finite differences would see the teacher through a shared head: give it one of its own, or hold the head fixed.
    names = [name for name in case.leaves if op != "sgpo" or "hidden" in name]
    fixed.update({name: leaf for name, leaf in case.leaves.items() if name not in names})
    if op in ("forward_kl", "reverse_kl", "js"):
        fixed.update(teacher_head=case.leaves["head"].clone(), teacher_bias=case.leaves["bias"].clone())

    def run(*leaves):
        output = case.function(module)(**dict(zip(names, leaves, strict=True)), **fixed)
        return output if op == "logprob" else output[0]

    assert torch.autograd.gradcheck(run, [case.leaves[name].clone().requires_grad_() for name in names], atol=1e-6)


@pytest.mark.parametrize("module", [reference, sgpo_kernels], ids=["reference", "ops"])
class TestByHand:
    """One hidden unit of value 1, so that the head is the logits. p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2)."""

    hidden = torch.eye(2, dtype=torch.float64)[:1]
    teacher = torch.eye(2, dtype=torch.float64)[1:]
    head = torch.tensor([[0.5, 0.25], [0.25, 0.25], [0.25, 0.5]], dtype=torch.float64).log()
    one = torch.ones(1, dtype=torch.float64)

    def test_logprob_and_entropy(self, module):
        logprobs, entropy = module.linear_logprob(self.hidden, self.head, torch.tensor([1]))
        assert logprobs.item() == pytest.approx(-2 * LN2)
        assert entropy.item() == pytest.approx(1.5 * LN2)

    def test_temperature_divides_the_logits(self, module):
        # p^(1/T) with T = 1/2: squares (1/4, 1/16, 1/16) / (3/8) = (2/3, 1/6, 1/6)
        logprobs, _ = module.linear_logprob(self.hidden, self.head, torch.tensor([0]), temperature=0.5)
        assert logprobs.item() == pytest.approx(math.log(2 / 3))

    def test_bias_is_added_before_the_temperature(self, module):
        bias = torch.tensor([0.0, LN2, LN2], dtype=torch.float64)
        logprobs, entropy = module.linear_logprob(self.hidden, self.head, torch.tensor([2]), bias=bias, temperature=3.0)
        assert logprobs.item() == pytest.approx(-math.log(3))
        assert entropy.item() == pytest.approx(math.log(3))

    @pytest.mark.parametrize(
        ("kind", "value"),
        [
            ("forward_kl", 0.25 * LN2),  # 1/4 ln(1/2) + 1/2 ln 2
            ("reverse_kl", 0.25 * LN2),
            ("js", 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3)),  # m = (3/8, 1/4, 3/8)
        ],
    )
    def test_divergences(self, module, kind, value):
        loss, stats = module.linear_divergence(
            self.hidden, self.teacher, self.head, token_weight=3 * self.one, kind=kind
        )
        assert loss.item() == pytest.approx(3 * value)
        assert stats.divergence.item() == pytest.approx(value)
        assert stats.entropy.item() == pytest.approx(1.5 * LN2)
        assert stats.teacher_entropy.item() == pytest.approx(1.5 * LN2)

    def test_forward_kl_gradient_is_p_student_minus_p_teacher(self, module):
        bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        loss, _ = module.linear_divergence(
            self.hidden, self.teacher, self.head, token_weight=self.one, bias=bias, teacher_bias=torch.zeros(3).double()
        )
        loss.backward()
        assert bias.grad is not None
        assert bias.grad.tolist() == pytest.approx([0.25, 0.0, -0.25])

    @pytest.mark.parametrize(
        ("over_limit", "value", "gradient"),
        [("mask", 0.0, 0.0), ("clamp", 0.1, 0.0), ("scale", 0.1, 0.025 / (0.25 * LN2))],
    )
    def test_limits(self, module, over_limit, value, gradient):
        bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        loss, stats = module.linear_divergence(
            self.hidden,
            self.teacher,
            self.head,
            token_weight=self.one,
            bias=bias,
            max_token_kl=0.1,
            over_limit=over_limit,
        )
        loss.backward()
        assert loss.item() == pytest.approx(value)
        assert stats.over_limit.item()
        assert stats.divergence.item() == pytest.approx(0.25 * LN2)
        assert bias.grad is not None
        assert bias.grad.tolist() == pytest.approx([gradient, 0.0, -gradient])

    @pytest.mark.parametrize(
        ("ratio", "advantage", "dual", "loss", "slope", "clipped"),
        [
            (1.0, 2.0, None, -2.0, -2.0, False),
            (1.28, 1.0, None, -1.28, -1.28, False),
            (1.5, 1.0, None, -1.28, 0.0, True),
            (0.5, 1.0, None, -0.5, -0.5, False),
            (0.5, -1.0, None, 0.8, 0.0, True),
            (1.5, -1.0, None, 1.5, 1.5, False),
            (4.0, -1.0, None, 4.0, 4.0, False),
            (4.0, -2.0, 3.0, 6.0, 0.0, True),
            (2.9, -2.0, 3.0, 5.8, 5.8, False),
            (4.0, 2.0, 3.0, -2.56, 0.0, True),
            (0.5, -2.0, 3.0, 1.6, 0.0, True),
        ],
    )
    def test_clipped_surrogate(self, module, ratio, advantage, dual, loss, slope, clipped):
        ratio = ratio - 1e-9 if ratio == 1.28 else ratio
        bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        old = torch.tensor([math.log(0.5 / ratio)], dtype=torch.float64)
        value, stats = module.linear_policy_loss(
            self.hidden,
            self.head,
            torch.tensor([0]),
            old_logprobs=old,
            advantages=advantage * self.one,
            token_weight=0.5 * self.one,
            clip_low=0.2,
            clip_high=0.28,
            dual_clip=dual,
            bias=bias,
        )
        value.backward()
        assert value.item() == pytest.approx(0.5 * loss)
        assert stats.ratio.item() == pytest.approx(ratio)
        assert stats.clipped.item() is clipped
        # d logp / dz = onehot - p = (1/2, -1/4, -1/4)
        assert bias.grad is not None
        assert bias.grad.tolist() == pytest.approx([0.25 * slope, -0.125 * slope, -0.125 * slope])

    def test_on_policy_gradient_is_minus_advantage_times_the_score(self, module):
        bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        value, stats = module.linear_policy_loss(
            self.hidden,
            self.head,
            torch.tensor([0]),
            advantages=3 * self.one,
            token_weight=2 * self.one,
            clip_low=0.2,
            clip_high=0.28,
            bias=bias,
        )
        value.backward()
        assert value.item() == -6.0
        assert stats.ratio.item() == 1.0
        assert bias.grad is not None
        assert bias.grad.tolist() == pytest.approx([-3.0, 1.5, 1.5])

    def test_sgpo_is_the_sum_of_both(self, module):
        loss, stats = module.sgpo_loss(
            self.hidden,
            torch.tensor([0]),
            self.hidden,
            self.teacher,
            self.head,
            advantages=self.one,
            policy_weight=0.5 * self.one,
            distill_weight=4 * self.one,
            clip_low=0.2,
            clip_high=0.28,
            max_token_kl=1.0,
        )
        assert loss.item() == pytest.approx(-0.5 + LN2)
        assert stats.policy_loss.item() == pytest.approx(-0.5)
        assert stats.distill_loss.item() == pytest.approx(LN2)
