"""SgpoLoss against plain torch autograd on dense logits in float64, for every switch: value and gradients."""

import itertools
import math
import pickle
from types import SimpleNamespace

import pytest
import torch

from sgpo.algorithm.loss import LossSettings, SgpoLoss, imitation_loss

H, V, N_POLICY, N_TARGET = 5, 9, 24, 10
CLIPS = {"clip_low": 0.2, "clip_high": 0.28}
DELTA = 0.3
SWITCHES = [
    *itertools.product(("forward_kl", "reverse_kl", "js"), ("mask", "clamp", "scale", "off")),
    ("sft", "mask"),
    ("none", "mask"),
]


class Rows:
    """Random rows with dead ones among them, ratios on both sides of both clips, divergences on both sides of delta."""

    def __init__(self, seed=0, n_policy=N_POLICY, n_target=N_TARGET):
        rng = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=rng, dtype=torch.float64)

        self.head, self.bias = normal(V, H), normal(V)
        self.hidden = normal(n_policy + n_target, H)
        self.teacher = self.hidden[n_policy:] + torch.linspace(0.05, 1.2, n_target, dtype=torch.float64)[:, None] * (
            normal(n_target, H)
        )
        self.labels = torch.randint(V, (n_policy + n_target,), generator=rng)
        self.advantages, self.policy_weight = normal(n_policy), normal(n_policy).abs()
        self.distill_weight = normal(n_target).abs()
        self.advantages[3:4], self.policy_weight[5:6], self.distill_weight[2:3] = 0.0, 0.0, 0.0
        self.shift = 0.6 * normal(n_policy)
        self.n_policy = n_policy

    def leaves(self):
        return [x.clone().requires_grad_() for x in (self.head, self.bias, self.hidden)]

    def micro_batch(self, old_logprobs=None):
        return SimpleNamespace(
            labels=self.labels,
            advantages=self.advantages,
            policy_weight=self.policy_weight,
            old_logprobs=old_logprobs,
            distill_weight=self.distill_weight,
        )

    def old_logprobs(self, temperature, with_bias):
        logp = log_softmax(self.hidden[: self.n_policy], self.head, self.bias if with_bias else None, temperature)
        return logp.gather(1, self.labels[: self.n_policy, None]).squeeze(1) + self.shift


def log_softmax(hidden, head, bias, temperature):
    logits = hidden @ head.T
    return ((logits if bias is None else logits + bias) / temperature).log_softmax(-1)


def dense_policy(rows, logp, old, dual_clip):
    """Eq. 1 row by row, in Python."""
    total = logp.new_zeros(())
    for i in range(rows.n_policy):
        taken, advantage = logp[i, rows.labels[i]], rows.advantages[i]
        ratio = (taken - (taken.detach() if old is None else old[i])).exp()
        gain = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIPS["clip_low"], 1 + CLIPS["clip_high"]) * advantage)
        if dual_clip is not None and advantage < 0:
            gain = torch.maximum(gain, dual_clip * advantage)
        total = total - rows.policy_weight[i] * gain
    return total


def dense_divergence(kind, student, teacher):
    s, t = student, teacher.detach()
    if kind == "forward_kl":
        return (t.exp() * (t - s)).sum(-1)
    if kind == "reverse_kl":
        return (s.exp() * (s - t)).sum(-1)
    middle = ((s.exp() + t.exp()) / 2).log()
    return ((s.exp() * (s - middle)).sum(-1) + (t.exp() * (t - middle)).sum(-1)) / 2


def dense_targets(rows, logp, teacher_logp, distillation, over_limit):
    """(loss, unlimited divergence or None)."""
    if distillation in ("sft", "none"):  # "none" comes without target rows
        return -(rows.distill_weight * logp.gather(1, rows.labels[rows.n_policy :, None]).squeeze(1)).sum(), None
    value = dense_divergence(distillation, logp, teacher_logp)
    over = value > DELTA
    limited = {
        "mask": value * ~over,
        "clamp": value.clamp(max=DELTA),
        "scale": torch.where(over, value * (DELTA / value.detach()), value),
        "off": value,
    }[over_limit]
    return (rows.distill_weight * limited).sum(), value


def objective(rows, leaves, *, distillation="forward_kl", over_limit="mask", old_logprobs=None, **options):
    head, bias, hidden = leaves
    settings = LossSettings(
        distillation=None if distillation == "none" else distillation,
        max_token_kl=DELTA,
        over_limit=over_limit,
        **{**CLIPS, **options},
    )
    teacher = rows.teacher if distillation not in ("sft", "none") else None
    return SgpoLoss(settings)(head, bias, hidden, teacher, rows.micro_batch(old_logprobs))


def assert_equal_gradients(loss, leaves, expected, dense_leaves):
    ours, truth = torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, dense_leaves)
    for found, wanted in zip(ours, truth, strict=True):
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dual_clip", [None, 1.4])
@pytest.mark.parametrize("off_policy", [False, True], ids=["ratio_1", "old_logprobs"])
@pytest.mark.parametrize(("distillation", "over_limit"), SWITCHES, ids=str)
def test_value_and_gradient_of_every_switch(distillation, over_limit, off_policy, dual_clip):
    rows, temperature = Rows(n_target=0 if distillation == "none" else N_TARGET), 0.7
    leaves, dense = rows.leaves(), rows.leaves()
    old = rows.old_logprobs(temperature, with_bias=True) if off_policy else None
    loss, stats = objective(
        rows, leaves, distillation=distillation, over_limit=over_limit, old_logprobs=old, dual_clip=dual_clip,
        temperature=temperature,
    )  # fmt: skip

    head, bias, hidden = dense
    logp = log_softmax(hidden, head, bias, temperature)
    policy_loss = dense_policy(rows, logp[:N_POLICY], old, dual_clip)
    teacher_logp = log_softmax(rows.teacher, head, bias, temperature)
    distill_loss, divergence = dense_targets(rows, logp[N_POLICY:], teacher_logp, distillation, over_limit)

    torch.testing.assert_close(loss, policy_loss + distill_loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(stats.policy_loss, policy_loss.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(stats.distill_loss, distill_loss.detach(), rtol=1e-10, atol=1e-12)
    assert_equal_gradients(loss, leaves, policy_loss + distill_loss, dense)
    if divergence is None:
        assert stats.divergence is None
    else:
        live = rows.distill_weight != 0
        assert (divergence[live] > DELTA).any()
        assert (divergence[live] < DELTA).any()
        torch.testing.assert_close(stats.divergence[0][live], divergence[live].detach(), rtol=1e-9, atol=1e-12)


def test_the_rows_reach_every_branch_of_the_clips():
    rows = Rows()
    ratio = (-rows.shift).exp()
    live = (rows.advantages != 0) & (rows.policy_weight != 0)
    assert (live & (rows.advantages > 0) & (ratio > 1.28)).any()
    assert (live & (rows.advantages < 0) & (ratio < 0.8)).any()
    assert (live & (rows.advantages < 0) & (ratio > 1.4)).any()
    assert (live & (ratio > 0.8) & (ratio < 1.28)).any()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_head_without_bias(temperature):
    rows = Rows(seed=1)
    old = rows.old_logprobs(temperature, with_bias=False)
    head, _, hidden = rows.leaves()
    loss, _ = objective(rows, (head, None, hidden), old_logprobs=old, temperature=temperature)
    dense_head, _, dense_hidden = rows.leaves()
    logp = log_softmax(dense_hidden, dense_head, None, temperature)
    teacher_logp = log_softmax(rows.teacher, dense_head, None, temperature)
    expected = dense_policy(rows, logp[:N_POLICY], old, None)
    expected = expected + dense_targets(rows, logp[N_POLICY:], teacher_logp, "forward_kl", "mask")[0]
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    assert_equal_gradients(loss, (head, hidden), expected, (dense_head, dense_hidden))


def test_the_gradient_of_forward_kl_on_the_logits_is_student_minus_teacher():
    """Eq. 3 with an identity head: hidden states are logits. The teacher's side gets no gradient."""
    student = torch.randn(4, V, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    teacher = torch.randn(4, V, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight = torch.tensor([1.0, 0.5, 2.0, 0.0], dtype=torch.float64)
    empty = torch.empty(0, dtype=torch.float64)
    rows = SimpleNamespace(
        labels=torch.zeros(4, dtype=torch.int64), advantages=empty, policy_weight=empty, old_logprobs=None,
        distill_weight=weight,
    )  # fmt: skip
    loss = SgpoLoss(LossSettings(**CLIPS, max_token_kl=None))
    loss, _ = loss(torch.eye(V, dtype=torch.float64), None, student, teacher, rows)
    loss.backward()
    wanted = weight[:, None] * (student.detach().softmax(-1) - teacher.softmax(-1))
    torch.testing.assert_close(student.grad, wanted, rtol=1e-10, atol=1e-13)


def test_masked_rows_have_no_gradient_and_clamped_rows_only_a_value():
    rows = Rows(n_policy=0)
    gradients, losses = {}, {}
    for over_limit in ("mask", "clamp", "scale", "off"):
        leaves = rows.leaves()
        loss, stats = objective(rows, leaves, over_limit=over_limit)
        assert torch.equal(stats.divergence.over_limit, stats.divergence.divergence > DELTA)  # counted in any case
        gradients[over_limit], losses[over_limit] = torch.autograd.grad(loss, leaves[2])[0], loss.item()
    over = (stats.divergence[0] > DELTA) & (rows.distill_weight != 0)
    assert 0 < int(over.sum()) < N_TARGET - 1
    for name in ("mask", "clamp"):
        assert gradients[name][over].abs().max() == 0
    scale = (DELTA / stats.divergence[0][over])[:, None]
    torch.testing.assert_close(gradients["scale"][over], gradients["off"][over] * scale, rtol=1e-9, atol=1e-12)
    assert losses["clamp"] == pytest.approx(losses["mask"] + DELTA * float(rows.distill_weight[over].sum()))
    assert losses["scale"] == pytest.approx(losses["clamp"])


@pytest.mark.parametrize("distillation", ["forward_kl", "sft"])
def test_policy_rows_come_first(distillation):
    """Both parts by themselves add up; a statistic of a row stands where the row stood in its own part."""
    rows = Rows(seed=3)
    whole, stats = objective(rows, rows.leaves(), distillation=distillation)
    policy, target = Rows(seed=3), Rows(seed=3)
    policy.hidden, policy.labels = rows.hidden[:N_POLICY], rows.labels[:N_POLICY]
    policy.teacher, policy.distill_weight = rows.teacher[:0], rows.distill_weight[:0]
    target.hidden, target.labels = rows.hidden[N_POLICY:], rows.labels[N_POLICY:]
    target.advantages, target.policy_weight = rows.advantages[:0], rows.policy_weight[:0]
    alone, alone_stats = objective(policy, policy.leaves(), distillation=distillation)
    other, _ = objective(target, target.leaves(), distillation=distillation)
    torch.testing.assert_close(whole, alone + other, rtol=1e-12, atol=1e-14)
    assert torch.equal(stats.policy.logprobs, alone_stats.policy.logprobs)
    assert len(stats.policy.logprobs) == N_POLICY
    if stats.divergence is not None:
        assert len(stats.divergence[0]) == N_TARGET


@pytest.mark.parametrize(("n_policy", "n_target"), [(0, 4), (4, 0), (0, 0)])
@pytest.mark.parametrize("distillation", ["forward_kl", "reverse_kl", "js", "sft"])
def test_no_rows_of_a_kind(distillation, n_policy, n_target):
    rows = Rows(n_policy=n_policy, n_target=n_target)
    leaves, dense = rows.leaves(), rows.leaves()
    loss, stats = objective(rows, leaves, distillation=distillation, over_limit="off")
    head, bias, hidden = dense
    logp = log_softmax(hidden, head, bias, 1.0)
    expected = dense_policy(rows, logp[:n_policy], None, None)
    teacher_logp = log_softmax(rows.teacher, head, bias, 1.0)
    expected = expected + dense_targets(rows, logp[n_policy:], teacher_logp, distillation, "off")[0]
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    loss.backward()
    for leaf, wanted in zip(leaves, torch.autograd.grad(expected, dense), strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, wanted, rtol=1e-9, atol=1e-11)
    assert len(stats.policy.logprobs) == n_policy


def test_dead_rows_count_for_nothing_whatever_they_hold():
    rows = Rows()
    before = objective(rows, rows.leaves())[0]
    rows.hidden[3], rows.hidden[5], rows.hidden[N_POLICY + 2] = 1e3, -1e3, 1e3
    leaves = rows.leaves()
    after, _ = objective(rows, leaves)
    assert after.item() == pytest.approx(before.item(), rel=1e-12)
    gradient = torch.autograd.grad(after, leaves[2])[0]
    assert gradient[[3, 5, N_POLICY + 2]].abs().max() == 0


def test_the_loss_is_linear_in_the_weights():
    """Micro-batches are summed, never rescaled: twice the weights, twice the loss and its gradient."""
    rows = Rows()
    leaves = rows.leaves()
    once = torch.autograd.grad(objective(rows, leaves)[0], leaves)
    rows.policy_weight, rows.distill_weight = 2 * rows.policy_weight, 2 * rows.distill_weight
    twice = torch.autograd.grad(objective(rows, leaves)[0], leaves)
    for single, double in zip(once, twice, strict=True):
        torch.testing.assert_close(double, 2 * single, rtol=1e-10, atol=1e-13)


def test_imitation_by_hand():
    """A head of zeros is a uniform distribution: ln V nats per token."""
    hidden = torch.randn(3, H, requires_grad=True)
    weight = torch.tensor([0.5, 0.25, 0.0])
    loss, nll = imitation_loss(torch.zeros(V, H), None, hidden, torch.tensor([0, 3, 8]), weight)
    assert nll.tolist() == pytest.approx([math.log(V)] * 3, rel=1e-6)
    assert loss.item() == pytest.approx(0.75 * math.log(V), rel=1e-6)
    assert not nll.requires_grad


def test_target_rows_without_a_teacher_are_refused_unless_they_are_imitated():
    """A lost teacher must not turn distillation into imitation without a word."""
    rows = Rows()
    head, bias, hidden = rows.leaves()
    with pytest.raises(ValueError, match="teacher"):
        SgpoLoss(LossSettings(**CLIPS))(head, bias, hidden, None, rows.micro_batch())


def test_the_loss_is_an_object_that_shows_every_number_and_survives_pickling():
    loss = SgpoLoss(LossSettings(**CLIPS, dual_clip=7.5, max_token_kl=0.75, temperature=0.6))
    for number in ("clip_low=0.2", "clip_high=0.28", "dual_clip=7.5", "max_token_kl=0.75", "temperature=0.6",
                   "entropy_coef=None", "column_tolerance=0.0", "demo_shaping=None"):  # fmt: skip
        assert number in repr(loss)
    assert pickle.loads(pickle.dumps(loss)) == loss
    with pytest.raises(AttributeError):
        loss.settings.max_token_kl = 2.0
