"""Every op in plain torch: the obvious lines, no chunks, full autograd. The truth of the tests when run in float64.

The logits leave the product in the dtype of the inputs, as plain torch code has it, so that the same functions on
bfloat16 inputs are the yardstick "the framework's own same-dtype error". Nothing here checks its inputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sgpo_kernels.stats import DivergenceStats, PolicyStats, SgpoStats


def _log_softmax(
    hidden: Tensor, head: Tensor, bias: Tensor | None, temperature: float | Tensor, cap: float | None
) -> Tensor:
    """log softmax(softcap(h Wᵀ + b) / temperature), [N, V] float32 (float64 for float64). A bias of -inf gives -1e20,
    so that 0 times it is 0."""
    logits = hidden @ head.t()
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits if bias is None else logits + bias
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    return torch.log_softmax(
        logits / (temperature.unsqueeze(1) if isinstance(temperature, Tensor) else temperature), dim=1
    ).clamp(min=-1e20)


def _kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p || q) = sum p (log p - log q), [N]."""
    return (logp.exp() * (logp - logq)).sum(1)


def linear_logprob(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    logit_softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(logp_n = log softmax(z_n)[y_n], entropy_n = -sum p log p), [N] each: arXiv 2606.24064 Eq. 1, Eq. 4."""
    logp = _log_softmax(hidden, head, bias, temperature, logit_softcap)
    return logp.gather(1, targets.unsqueeze(1)).squeeze(1), -(logp.exp() * logp).sum(1)


def linear_policy_loss(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    advantages: Tensor,
    token_weight: Tensor | None = None,
    clip_low: float | None,
    clip_high: float | None,
    dual_clip: float | None = None,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    logit_softcap: float | None = None,
) -> tuple[Tensor, PolicyStats]:
    """sum_n w_n max(-r A, -clip(r, 1 - low, 1 + high) A), for A < 0 at most dual_clip |A|; without weights one per row.

    arXiv 2606.24064 Eq. 1; dual clip: arXiv 1912.09729. Arguments and results as `sgpo_kernels.linear_policy_loss`.
    """
    live = (advantages != 0) & (torch.ones_like(advantages) if token_weight is None else token_weight).bool()
    logprobs, entropy = linear_logprob(
        hidden,
        head,
        torch.where(live, targets, 0),
        temperature=temperature,
        bias=bias,
        logit_softcap=logit_softcap,
    )
    ratio = (logprobs - (logprobs.detach() if old_logprobs is None else old_logprobs)).exp()
    low = -math.inf if clip_low is None else 1 - clip_low
    high = math.inf if clip_high is None else 1 + clip_high
    plain, bounded = -ratio * advantages, -ratio.clamp(low, high) * advantages
    clipped = bounded > plain
    loss = torch.where(clipped, bounded, plain)
    if dual_clip is not None:
        beyond = (advantages < 0) & (loss > -dual_clip * advantages)
        loss, clipped = torch.where(beyond, -dual_clip * advantages, loss), clipped | beyond
    logprobs, entropy, ratio = (torch.where(live, x.detach(), 0) for x in (logprobs, entropy, ratio))
    dropped, share = torch.zeros_like(ratio), live.to(ratio.dtype)
    stats = PolicyStats(logprobs, entropy, ratio, clipped & live, live, dropped, share)
    return torch.where(live, loss, 0) if token_weight is None else torch.where(
        live, loss * token_weight, 0
    ).sum(), stats


def linear_divergence(
    hidden: Tensor,
    teacher_hidden: Tensor,
    head: Tensor,
    *,
    token_weight: Tensor | None = None,
    kind: str = "forward_kl",
    max_token_kl: float | None = None,
    over_limit: str = "mask",
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    logit_softcap: float | None = None,
    teacher_head: Tensor | None = None,
    teacher_bias: Tensor | None = None,
) -> tuple[Tensor, DivergenceStats]:
    """sum_n w_n limit(d_n), without weights one per row; d = KL(T || S), KL(S || T), or JS with beta = 1/2, limited to
    1[d <= delta] d, min(d, delta), or d stopgrad(delta / d).

    arXiv 2606.24064 Eq. 3, Eq. 5. Arguments and results as `sgpo_kernels.linear_divergence`.
    """
    if teacher_head is None:
        teacher_head, teacher_bias = head, bias if teacher_bias is None else teacher_bias
    student = _log_softmax(hidden, head, bias, temperature, logit_softcap)
    teacher = _log_softmax(teacher_hidden, teacher_head, teacher_bias, temperature, logit_softcap).detach()
    middle = torch.logaddexp(student, teacher) - math.log(2)
    divergence = {
        "forward_kl": lambda: _kl(teacher, student),
        "reverse_kl": lambda: _kl(student, teacher),
        "js": lambda: (_kl(student, middle) + _kl(teacher, middle)) / 2,
    }[kind]()
    limit = math.inf if max_token_kl is None else max_token_kl
    over, live = (
        ~(divergence <= limit),
        torch.ones_like(divergence).bool() if token_weight is None else token_weight != 0,
    )
    beyond = {
        "mask": lambda: torch.zeros_like(divergence),
        "clamp": lambda: torch.full_like(divergence, limit),
        "scale": lambda: divergence * (limit / divergence).clamp(max=1).detach(),
    }[over_limit]()
    value = torch.where(over, beyond, divergence)
    loss = value if token_weight is None else (value * token_weight).sum()
    entropies = (-(x.exp() * x).sum(1).detach() for x in (student, teacher))
    value, entropy, teacher_entropy = (torch.where(live, x, 0) for x in (divergence.detach(), *entropies))
    dropped, share = torch.zeros_like(value), live.to(value.dtype)
    return loss, DivergenceStats(value, over & live, live, entropy, teacher_entropy, dropped, share)


def sgpo_loss(
    policy_hidden: Tensor,
    policy_targets: Tensor,
    distill_hidden: Tensor,
    teacher_hidden: Tensor,
    head: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    advantages: Tensor,
    policy_weight: Tensor,
    distill_weight: Tensor,
    clip_low: float | None,
    clip_high: float | None,
    dual_clip: float | None = None,
    kind: str = "forward_kl",
    max_token_kl: float | None = None,
    over_limit: str = "mask",
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    logit_softcap: float | None = None,
) -> tuple[Tensor, SgpoStats]:
    """L_GRPO + alpha L_KD with all factors in the weights: arXiv 2606.24064 Eq. 7. Arguments and results as
    `sgpo_kernels.sgpo_loss`."""
    split = policy_hidden.shape[0]
    first, second = (
        (temperature[:split], temperature[split:]) if isinstance(temperature, Tensor) else (temperature, temperature)
    )
    policy_loss, policy = linear_policy_loss(
        policy_hidden,
        head,
        policy_targets,
        old_logprobs=old_logprobs,
        advantages=advantages,
        token_weight=policy_weight,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        temperature=first,
        bias=bias,
        logit_softcap=logit_softcap,
    )
    distill_loss, divergence = linear_divergence(
        distill_hidden,
        teacher_hidden,
        head,
        token_weight=distill_weight,
        kind=kind,
        max_token_kl=max_token_kl,
        over_limit=over_limit,
        temperature=second,
        bias=bias,
        logit_softcap=logit_softcap,
    )
    return policy_loss + distill_loss, SgpoStats(policy, divergence, policy_loss.detach(), distill_loss.detach())
