"""Fused-linear loss ops for policy optimisation and distillation: float32 logits, never a [tokens, vocab] tensor."""

from sgpo_kernels.divergence import linear_divergence
from sgpo_kernels.logprob import linear_logprob
from sgpo_kernels.policy_loss import linear_policy_loss
from sgpo_kernels.sgpo_loss import sgpo_loss  # the function: the module of that name stays in sys.modules
from sgpo_kernels.stats import DivergenceStats, PolicyStats, SgpoStats

__all__ = [
    "DivergenceStats",
    "PolicyStats",
    "SgpoStats",
    "linear_divergence",
    "linear_logprob",
    "linear_policy_loss",
    "sgpo_loss",
]
