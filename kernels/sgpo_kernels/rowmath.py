"""Row arithmetic on one chunk of logits [C, V] in the accumulation dtype: softmax, entropy and the three divergences.

Every divergence is a sum over the vocabulary of terms that are >= 0 in floating point too, so a small value keeps its
relative accuracy and equal rows give exactly 0. The plain form, sum p_T (log p_T - log p_S), loses 77 % at KL = 5e-7.

With u = log p_S - log p_T and v = u / 2:
  forward KL(T||S) = sum p_T f(u)         f(u) = e^u - 1 - u
  reverse KL(S||T) = sum p_S f(-u)
  JS (beta = 1/2)  = sum m g(v)           g(v) = v tanh v - log cosh v,  m = (p_S + p_T) / 2
f and g go through their series for |u| < 0.05. Limits: finite logits (a -inf logit gives NaN).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

SERIES_BELOW = 0.05


def log_softmax_(logits_CV: Tensor) -> Tensor:
    """Turns logits into log-probabilities in place and returns the probabilities [C, V]."""
    logits_CV.sub_(logits_CV.amax(1, keepdim=True))
    probs_CV = logits_CV.exp()
    total_C1 = probs_CV.sum(1, keepdim=True)
    # The maximum is taken off first: log p keeps its accuracy for logits of any size.
    logits_CV.sub_(total_C1.log())
    return probs_CV.div_(total_C1)


def entropy(logp_CV: Tensor, probs_CV: Tensor) -> Tensor:
    """-sum p log p in nats, [C]."""
    return (logp_CV * probs_CV).sum(1).neg_()


def one_hot_minus_(probs_CV: Tensor, targets_C: Tensor, slope_C: Tensor) -> Tensor:
    """slope (onehot - p) in place: the gradient of slope * log p[target] by the logits, formed before any cast."""
    slope_C1, targets_C1 = slope_C.unsqueeze(1), targets_C.unsqueeze(1)
    grad_CV = probs_CV.mul_(-slope_C1)
    return grad_CV.scatter_(1, targets_C1, grad_CV.gather(1, targets_C1) + slope_C1)


def kl_terms(p: Tensor, q: Tensor, u: Tensor) -> Tensor:
    """p (e^u - 1 - u) elementwise with u = log(q / p): the terms of KL(p||q), each >= 0."""
    series = u * u * (0.5 + u * (1 / 6 + u * (1 / 24 + u * (1 / 120 + u * (1 / 720)))))
    exact = u.clamp(max=1.0).expm1_().sub_(u)
    near = torch.where(u.abs() < SERIES_BELOW, series, exact)
    del series, exact
    # e^u overflows for large u, and p e^u is q.
    return torch.where(u > 1.0, q - p * (1.0 + u), near.mul_(p))


def forward_kl(logp_S: Tensor, p_S: Tensor, logp_T: Tensor, p_T: Tensor) -> tuple[Tensor, Tensor]:
    """KL(T||S) [C] and its gradient by the student's logits, p_S - p_T [C, V]. Overwrites its inputs."""
    value = kl_terms(p_T, p_S, logp_S.sub_(logp_T)).sum(1)
    return value, p_S.sub_(p_T)


def reverse_kl(logp_S: Tensor, p_S: Tensor, logp_T: Tensor, p_T: Tensor) -> tuple[Tensor, Tensor]:
    """KL(S||T) [C] and its gradient by the student's logits, p_S (u - KL) [C, V]. Overwrites its inputs."""
    value = kl_terms(p_S, p_T, logp_T.sub_(logp_S)).sum(1)
    return value, logp_T.add_(value.unsqueeze(1)).neg_().mul_(p_S)


def jensen_shannon(logp_S: Tensor, p_S: Tensor, logp_T: Tensor, p_T: Tensor) -> tuple[Tensor, Tensor]:
    """JS(S, T) [C] and its gradient by the student's logits, p_S (a - sum p_S a) [C, V]. Overwrites its inputs.

    a = (log p_S - log m) / 2; log m = (log p_S + log p_T) / 2 + log cosh v, hence a = (v - log cosh v) / 2.
    """
    v = logp_S.sub_(logp_T).div_(2)
    size = torch.abs(v, out=logp_T)
    # log cosh v = |v| + tail
    tail = (size * -2).expm1_().div_(2).log1p_()
    square = v * v
    series = square * (1 / 2 - square * (1 / 4 - square * (1 / 9 - square * (17 / 360))))
    del square
    exact = (size.tanh() - 1).mul_(size).sub_(tail)
    terms = torch.where(size < SERIES_BELOW / 2, series, exact)
    del series, exact
    value = terms.mul_(p_T.add_(p_S).div_(2)).sum(1)
    a = v.sub_(size).sub_(tail).div_(2)
    return value, a.sub_((p_S * a).sum(1, keepdim=True)).mul_(p_S)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "js": jensen_shannon,
}


def power_of_two_scale(values: Tensor) -> Tensor:
    """The power of two just above max |values| (1 where that is 0 or not finite), 0-d. No host sync.

    Row gradients are divided by it before they are cast, so that a weight of 1e-7 does not vanish in float16; a power
    of two costs no rounding.
    """
    largest = values.abs().amax()
    _, exponent = torch.frexp(largest)
    usable = torch.isfinite(largest) & (largest > math.ldexp(1.0, -100))
    return torch.where(usable, torch.ldexp(torch.ones_like(largest), exponent), torch.ones_like(largest))
