"""The numbers of a step: what the rollouts were like, what was decided, what the loss saw. All over all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from sgpo_kernels import DivergenceStats, PolicyStats

from sgpo.algorithm.importance import gap_statistics
from sgpo.algorithm.method import Guidance
from sgpo.engine.step import MicroBatchResult, StepResult
from sgpo.types import Rollout, ScoredGroup
from sgpo.utils.distributed import Meter

# What `record_passes` logs. A step has all of it: 0 or None where it trained on nothing, or on nothing of that kind.
_PASS_SUMS = (
    "micro_batches", "train_tokens", "loss_policy", "loss_distill", "policy_rows", "distill_rows", "dropped_mass",
)  # fmt: skip
_PASS_MEANS = (
    "padding_share", "entropy", "ratio_mean", "clip_share", "column_share", "sampler_gap_mean", "sampler_gap_k3",
    "importance_mean", "kl_mean", "kl_kept_mean", "kl_masked_share",
)  # fmt: skip
_PASS_MAXIMA = ("sampler_gap_max", "kl_max")


class Clock:
    """Wall time of the stages of a step, in seconds; the slowest rank counts. `at_end` is called as one ends."""

    def __init__(self, meter: Meter, at_end: Callable[[], None] = lambda: None) -> None:
        self._meter, self._at_end = meter, at_end
        self._spent: dict[str, float] = {}
        self._start = self._last = time.monotonic()
        self.spans: list[tuple[str, float, float]] = []

    def stage(self, name: str) -> None:
        """The time since the last call belongs to stage `name`, added to what it had."""
        now = time.monotonic()
        self._spent[f"{name}_s"] = self._spent.get(f"{name}_s", 0.0) + now - self._last
        self.spans.append((name, self._last, now))
        self._last = now
        self._at_end()

    def finish(self) -> None:
        """Writes the stages' times and the step's into the meter."""
        self._meter.maxima({**self._spent, "step_s": time.monotonic() - self._start})


def record_memory(meter: Meter) -> None:
    """MiB that torch's allocator uses and holds on the fullest GPU: a gap that grows is fragmentation."""
    if torch.cuda.is_available():
        meter.max("cuda_allocated_mib", torch.cuda.memory_allocated() / 2**20)
        meter.max("cuda_reserved_mib", torch.cuda.memory_reserved() / 2**20)


def record_peak(meter: Meter, mib: float | None) -> None:
    """The highest peak of the step on the fullest GPU, without a rollout engine that sleeps."""
    if torch.cuda.is_available() and mib is not None:
        meter.max("cuda_peak_mib", mib)


def record_groups(meter: Meter, groups: Sequence[ScoredGroup]) -> None:
    """Accuracy, lengths, truncation and results of both kinds of rollout."""
    meter.declare(means=["sampled_nll"])
    for group in groups:
        meter.sum("problems", 1)
        meter.means("accuracy_auto", [float(reward > 0) for reward in group.auto_rewards])
        meter.means("accuracy_guided", [float(reward > 0) for reward in group.guided_rewards])
        meter.means("zero_variance_share", [float(len(set(group.auto_rewards)) <= 1)])
        for kind, rollouts in (("auto", group.auto), ("guided", group.guided)):
            meter.means(f"length_{kind}", [len(r.completion_ids) for r in rollouts])
            meter.means(f"truncated_{kind}", [float(r.truncated) for r in rollouts])
        for rollout in group.auto:
            meter.mean("sampled_nll", -sum(rollout.rollout_logprobs), len(rollout.rollout_logprobs))
        results = (*group.auto_results, *group.guided_results)
        meter.means("no_answer_share", [float(v.status == "no_answer") for v in results])
        meter.sum("reward_timeouts", sum(v.status == "timeout" for v in results))
        meter.sum("reward_errors", sum(v.status == "error" for v in results))
        meter.sum("rollouts", len(group.auto) + len(group.guided))
        meter.sum("rollout_tokens", sum(len(r.completion_ids) for r in (*group.auto, *group.guided)))


def record_guidance(meter: Meter, guidance: Sequence[Guidance]) -> None:
    """alpha before and after the cap, and how many problems have a teacher completion."""
    meter.means("alpha_mean", [chosen.alpha for chosen in guidance])
    meter.means("alpha_uncapped_mean", [chosen.alpha_uncapped for chosen in guidance])
    meter.means("alpha_live_share", [float(chosen.alpha > 0) for chosen in guidance])
    meter.means("target_share", [float(bool(chosen.teacher_completions)) for chosen in guidance])
    meter.means("target_score_mean", [c.selection_score for c in guidance if c.selection_score is not None])


def record_update(meter: Meter, results: Sequence[StepResult], lr: float) -> None:
    """Loss, learning rate and gradient norm of the optimizer steps of one step of the run."""
    meter.sum("loss", sum(result.loss for result in results) / len(results))
    meter.max("lr", lr)
    meter.declare(maxima=["grad_norm"])
    meter.max("non_finite_steps", sum(result.skipped is not None for result in results))
    for result in results:
        if result.grad_norm is not None:
            meter.max("grad_norm", result.grad_norm)


def record_passes(meter: Meter, passes: Sequence[MicroBatchResult]) -> None:
    """Row statistics of the loss, over live rows. One transfer from the device per statistic and micro-batch."""
    meter.declare(means=_PASS_MEANS, sums=_PASS_SUMS, maxima=_PASS_MAXIMA)
    for done in passes:
        meter.sum("micro_batches", 1)
        meter.sum("train_tokens", done.tokens)
        meter.mean("padding_share", done.padding, done.tokens)
        meter.sum("loss_policy", float(done.stats.policy_loss))
        meter.sum("loss_distill", float(done.stats.distill_loss))
        policy, divergence = done.stats.policy, done.stats.divergence
        rows = len(policy.logprobs)
        meter.sum("policy_rows", rows)
        meter.mean("entropy", float(policy.entropy.sum()), rows)
        meter.mean("ratio_mean", float(policy.ratio.sum()), rows)
        meter.mean("clip_share", float(policy.clipped.sum()), rows)
        record_sampler_gap(meter, done)
        record_columns(meter, policy)
        if divergence is None:
            continue
        record_columns(meter, divergence)
        rows = len(divergence.divergence)
        meter.sum("distill_rows", rows)
        meter.mean("kl_mean", float(divergence.divergence.sum()), rows)
        meter.mean("kl_kept_mean", float(divergence.divergence[~divergence.over_limit].sum()), rows)
        meter.mean("kl_masked_share", float(divergence.over_limit.sum()), rows)
        if rows:
            meter.max("kl_max", float(divergence.divergence.max()))


def record_sampler_gap(meter: Meter, done: MicroBatchResult) -> None:
    """How far the sampler's log-probs are from the trainer's, on rows with a gradient.

    With top_p < 1 the sampler's are those of the nucleus, up to -log(top_p) above the trainer's.
    """
    sequences = [s for s in done.sequences if s.policy_weight and s.advantage]
    if not sequences or any(s.rollout_logprobs is None for s in sequences):
        return
    sampler = [x for s in sequences for x in s.rollout_logprobs or ()]
    if all(s.old_logprobs for s in sequences):
        trainer = [x for s in sequences for x in s.old_logprobs or ()]
    else:
        trainer = done.stats.policy.logprobs.tolist()
    total, largest, k3 = gap_statistics(trainer, sampler)
    meter.mean("sampler_gap_mean", total, len(sampler))
    meter.max("sampler_gap_max", largest)
    meter.mean("sampler_gap_k3", k3, len(sampler))
    weights = [x for s in sequences for x in s.importance or ()]
    if weights:
        meter.means("importance_mean", weights)


def record_columns(meter: Meter, stats: PolicyStats | DivergenceStats) -> None:
    """What the live-column backward multiplied and left out: a bound of sum |d loss / d logit| over the step."""
    meter.sum("dropped_mass", float(stats.dropped.sum()))
    meter.mean("column_share", float(stats.column_share.sum()), int(stats.live.sum()))


def distilled_trajectory(passes: Sequence[MicroBatchResult]) -> tuple[tuple[int, ...], list[float], list[bool]] | None:
    """(completion ids, KL of each token, masked or not) of the first distilled completion, or None."""
    for done in passes:
        taught = [s for s in done.sequences if s.distill_weight]
        if taught and done.stats.divergence is not None:
            length = len(taught[0].completion_ids)
            kl = done.stats.divergence.divergence[:length].tolist()
            return taught[0].completion_ids, kl, done.stats.divergence.over_limit[:length].tolist()
    return None


def is_teacher_completion(rollout: Rollout, guidance: Guidance) -> bool:
    """Whether `rollout` is an o+ of its problem."""
    return any(rollout is chosen for chosen in guidance.teacher_completions)
