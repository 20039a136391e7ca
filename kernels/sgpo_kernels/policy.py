"""The clipped policy-gradient surrogate on taken tokens.

What: GRPO / PPO loss of the autonomous completions, with the log-probs, entropies and clip statistics of the same
  pass.
Equation: loss = sum_n w_n l_n, l_n = -min(r_n A_n, clip(r_n, 1 - clip_low, 1 + clip_high) A_n), r_n = exp(logp_n -
  old_n); with a dual clip and A_n < 0, l_n = min(l_n, dual_clip |A_n|). old = None means exactly on-policy: r_n = 1
  with gradient A_n d logp_n.
Source: arXiv 2606.24064 Eq. 1 (w_n = 1 / (P G1 |o_i|)); dual clip: arXiv 1912.09729.
Gradient: dl/dz = -A r (onehot - p) / temperature, 0 where a bound is active. Formed in forward.
Memory: 4·C·V·a + V·H·(a + 2s) + 2·N·H·s (`launch.extra_bytes("policy", ...)`). Saved: dH [N, H], dW [V, H], db [V] in
  the input dtype.
Precision: float32 logits, ratio and dz (float64 for float64 inputs); dz is cast to the dtype of hidden for the
  products.
Limits: finite logits; first derivatives only; on an accelerator one host sync (the count of live rows). Advantages,
  weights and old log-probs are constants.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sgpo_kernels import contracts, launch
from sgpo_kernels.linear_rows import Chunk, live_index, weighted_loss
from sgpo_kernels.rowmath import entropy, log_softmax_, one_hot_minus_


class PolicyStats(NamedTuple):
    """Per row, no gradient; rows that are not live hold zeros. Log-probs and entropy in nats."""

    logprobs: Tensor
    entropy: Tensor
    ratio: Tensor
    clipped: Tensor
    live: Tensor


def linear_policy_loss(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    advantages: Tensor,
    token_weight: Tensor,
    clip_low: float | None,
    clip_high: float | None,
    dual_clip: float | None = None,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    impl: launch.Impl = "auto",
    chunk_rows: int | None = None,
) -> tuple[Tensor, PolicyStats]:
    """Weighted sum of the clipped surrogate over the rows.

    Args:
        hidden: [N, H] float16, bfloat16, float32 or float64. head: [V, H], same dtype. bias: [V] or None.
        targets: int64 [N]; ids of rows that are not live are never looked at.
        old_logprobs: float32 [N] at the same temperature, or None when the rows are exactly on-policy.
        advantages, token_weight: float32 [N]. A row with either at 0 is dropped before any product.
        clip_low, clip_high: the ratio stays in [1 - clip_low, 1 + clip_high]; None switches a side off.
        dual_clip: > 1, or None for none.
        temperature: a float > 0, or float32 [N]. chunk_rows: rows per chunk, None for the default of `launch`.

    Returns: (loss, PolicyStats): loss 0-d float32 (float64 for float64 inputs), differentiable in hidden, head and
    bias; `clipped` marks rows whose gradient a bound removed.

    Raises: TypeError (dtype), ValueError (shape, device, value), NotImplementedError (impl="triton").
    """
    contracts.check_head(hidden, head, bias)
    contracts.check_temperature(temperature, hidden.shape[0], hidden)
    contracts.check_chunk_rows(chunk_rows)
    launch.resolve_impl(impl)
    rows = PolicyRows(
        hidden,
        head,
        targets,
        old_logprobs,
        advantages,
        token_weight,
        SurrogateBounds(clip_low, clip_high, dual_clip),
        temperature,
    )
    return weighted_loss([rows], head, bias, chunk_rows), rows.stats()


class SurrogateBounds(NamedTuple):
    clip_low: float | None
    clip_high: float | None
    dual_clip: float | None


def clipped_surrogate(ratio: Tensor, advantages: Tensor, bounds: SurrogateBounds) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, d loss / d logp, clipped) per row, before the weight."""
    lower = -math.inf if bounds.clip_low is None else 1.0 - bounds.clip_low
    upper = math.inf if bounds.clip_high is None else 1.0 + bounds.clip_high
    clipped = ((advantages > 0) & (ratio > upper)) | ((advantages < 0) & (ratio < lower))
    used = torch.where(clipped, ratio.clamp(lower, upper), ratio)
    if bounds.dual_clip is not None:
        beyond = (advantages < 0) & (ratio > bounds.dual_clip)
        clipped, used = clipped | beyond, torch.where(beyond, bounds.dual_clip, used)
    slope = torch.where(clipped, 0.0, -ratio * advantages)
    return -used * advantages, slope, clipped


class PolicyRows:
    """The policy rows of one call: constants, row results, and what a chunk of logits turns into."""

    def __init__(
        self,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        old_logprobs: Tensor | None,
        advantages: Tensor,
        token_weight: Tensor,
        bounds: SurrogateBounds,
        temperature: float | Tensor,
    ):
        contracts.check_targets(targets, hidden)
        contracts.check_row_values("advantages", advantages, hidden)
        contracts.check_row_values("token_weight", token_weight, hidden)
        if old_logprobs is not None:
            contracts.check_row_values("old_logprobs", old_logprobs, hidden)
        contracts.check_clips(*bounds)
        acc = launch.accumulate_dtype(hidden.dtype)
        self.hidden, self.targets, self.bounds, self.temperature = hidden, targets, bounds, temperature
        self.advantages, self.token_weight = advantages.to(acc), token_weight.to(acc)
        self.old_logprobs = None if old_logprobs is None else old_logprobs.to(acc)
        self.live = (advantages != 0) & (token_weight != 0)
        self.index = live_index(self.live)
        contracts.check_live_targets(targets[self.index], head.shape[0])
        self.row_loss = torch.zeros_like(self.advantages)
        self.logprobs, self.entropy, self.ratio = (torch.zeros_like(self.advantages) for _ in range(3))
        self.clipped = torch.zeros_like(self.live)

    def weights(self) -> Tensor:
        return (self.advantages * self.token_weight)[self.index]

    def step(self, chunk: Chunk, logits_CV: Tensor) -> Tensor | None:
        rows, targets_C = chunk.rows, self.targets[chunk.rows]
        probs_CV = log_softmax_(logits_CV)
        logprobs = logits_CV.gather(1, targets_C.unsqueeze(1)).squeeze(1)
        old = logprobs if self.old_logprobs is None else self.old_logprobs[rows]
        ratio = (logprobs - old).exp()
        loss, slope, clipped = clipped_surrogate(ratio, self.advantages[rows], self.bounds)
        self.row_loss[rows] = loss * self.token_weight[rows]
        self.logprobs[rows], self.ratio[rows], self.clipped[rows] = logprobs, ratio, clipped
        self.entropy[rows] = entropy(logits_CV, probs_CV)
        if chunk.grad_factor is None:
            return None
        return one_hot_minus_(probs_CV, targets_C, slope * self.token_weight[rows] * chunk.grad_factor)

    def loss(self) -> Tensor:
        return self.row_loss.sum()

    def stats(self) -> PolicyStats:
        return PolicyStats(self.logprobs, self.entropy, self.ratio, self.clipped, self.live)
