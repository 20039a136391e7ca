"""Fused-linear loss ops for policy optimisation and distillation: float32 logits, never a [tokens, vocab] tensor."""

from sgpo_kernels.combined import SgpoStats, sgpo_loss
from sgpo_kernels.divergence import linear_divergence
from sgpo_kernels.fused import DivergenceStats, PolicyStats
from sgpo_kernels.logprob import linear_logprob
from sgpo_kernels.policy import linear_policy_loss

__all__ = [
    "DivergenceStats",
    "PolicyStats",
    "SgpoStats",
    "linear_divergence",
    "linear_logprob",
    "linear_policy_loss",
    "sgpo_loss",
]
