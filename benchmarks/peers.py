"""Implementations of the ops, each called through its own public API, and why one is missing where it is.

A peer has a forward per op it knows; `sgpo` on a library without it is the pair of its policy op and its divergence op,
and `a+b` pairs the policy op of one library with the divergence op of another. Every forward returns the weighted
sum of `ops.py`: where a library knows only means over unmasked rows, the equal weights of the inputs make that the
same number. What a library does differently nevertheless stands in its notes, which go into the result rows.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

import sgpo_kernels
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops import CLIP_HIGH, CLIP_LOW, Inputs, OpName
from sgpo.types import SgpoError

# 2^-12 where the model is confident; 2^-15 keeps the errors of a weak one (SmolLM2-135M) below those of bf16 dz.
LIVE_TOLERANCE, FINE_TOLERANCE = 2.0**-12, 2.0**-15
IGNORE = -100
# Liger takes whole sequences per chunk, one unless told otherwise. 512, 1024 or 2048 rows made no difference beyond the
# noise (5 %) on a CPU at H 896, V 32768, 2048 rows in sequences of 512.
_LIGER_ROWS_PER_CHUNK = 1024


class Output(NamedTuple):
    """The loss, and per row what the implementation tells beside it; `dropped` as in the statistics of our ops."""

    loss: Tensor
    logprobs: Tensor | None = None
    divergence: Tensor | None = None
    dropped_policy: Tensor | None = None
    dropped_distill: Tensor | None = None


Forward = Callable[[Inputs], Output]


@dataclass(frozen=True)
class Peer:
    """`needs`: imports that must exist; `devices`: where it runs at all; `ours` is held to our tolerances."""

    name: str
    forwards: Mapping[str, Forward]
    needs: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    notes: Mapping[str, str] = field(default_factory=dict)
    ours: bool = False

    def missing(self, device: str) -> str | None:
        """Why this peer cannot run on the device, or None."""
        if any(importlib.util.find_spec(name.split(".")[0]) is None for name in self.needs):
            return "not installed"
        if device.split(":")[0] not in self.devices:
            return f"needs {' or '.join(self.devices)}"
        lacking = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"the installed version has no {lacking[0]}" if lacking else None

    def forward(self, op: OpName) -> Forward | None:
        """The forward of an op, None where the library has none."""
        if op == "sgpo" and op not in self.forwards and {"policy", "divergence"} <= set(self.forwards):
            return lambda inputs: _pair(self.forwards["policy"], self.forwards["divergence"], inputs)
        return self.forwards.get(op)

    def note(self, op: OpName) -> str | None:
        parts = [op] if op in self.notes else ["policy", "divergence"] if op == "sgpo" else []
        texts = [self.notes[part] for part in parts if part in self.notes]
        if op == "sgpo" and op not in self.forwards:
            texts.append("a pair: policy op, then divergence op")
        return "; ".join(texts) or None


def find(name: str) -> Peer:
    """The peer of a name, or the pair `policy_peer+divergence_peer`. Raises SgpoError for an unknown one."""
    first, _, second = name.partition("+")
    for part in (first, second):
        if part and part not in PEERS:
            raise SgpoError(f"Unknown peer {part!r}: expected some of {', '.join(PEERS)}, or a pair a+b.")
    if not second:
        return PEERS[first]
    policy, divergence = PEERS[first], PEERS[second]
    if "policy" not in policy.forwards or "divergence" not in divergence.forwards:
        raise SgpoError(f"No pair {name}: it takes a peer with a policy op and one with a divergence op.")
    return replace(
        policy,
        name=name,
        forwards={"policy": policy.forwards["policy"], "divergence": divergence.forwards["divergence"]},
        needs=(*policy.needs, *divergence.needs),
        devices=tuple(device for device in policy.devices if device in divergence.devices),
        notes={**divergence.notes, **{k: v for k, v in policy.notes.items() if k == "policy"}},
        ours=False,
    )


def _pair(policy: Forward, divergence: Forward, inputs: Inputs) -> Output:
    outputs: list[Output] = []
    if len(inputs.policy_hidden):
        outputs.append(policy(inputs.only("policy")))
    if len(inputs.distill_hidden):
        outputs.append(divergence(inputs.only("divergence")))
    loss = sum((output.loss for output in outputs[1:]), outputs[0].loss)
    logprobs = next((output.logprobs for output in outputs if output.logprobs is not None), None)
    kl = next((output.divergence for output in outputs if output.divergence is not None), None)
    return Output(loss, logprobs, kl)


# ours


def _ours(impl: Any, tolerance: float) -> dict[str, Forward]:
    options: dict[str, Any] = {"impl": impl, "column_tolerance": tolerance}
    clips: dict[str, Any] = {"clip_low": CLIP_LOW, "clip_high": CLIP_HIGH}

    def logprob(x: Inputs) -> Output:
        logprobs, _ = sgpo_kernels.linear_logprob(x.policy_hidden, x.head, x.targets, impl=impl)
        return Output((logprobs * x.policy_weight).sum(), logprobs)

    def policy(x: Inputs) -> Output:
        values = {"old_logprobs": x.old_logprobs, "advantages": x.advantages, "token_weight": x.policy_weight}
        loss, stats = sgpo_kernels.linear_policy_loss(x.policy_hidden, x.head, x.targets, **values, **clips, **options)
        return Output(loss, stats.logprobs, dropped_policy=stats.dropped)

    def divergence(x: Inputs) -> Output:
        loss, stats = sgpo_kernels.linear_divergence(
            x.distill_hidden, x.teacher_hidden, x.head, token_weight=x.distill_weight, **options
        )
        return Output(loss, divergence=stats.divergence, dropped_distill=stats.dropped)

    def sgpo(x: Inputs) -> Output:
        loss, stats = sgpo_kernels.sgpo_loss(
            x.policy_hidden,
            x.targets,
            x.distill_hidden,
            x.teacher_hidden,
            x.head,
            old_logprobs=x.old_logprobs,
            advantages=x.advantages,
            policy_weight=x.policy_weight,
            distill_weight=x.distill_weight,
            **clips,
            **options,
        )
        policy, kl = stats.policy, stats.divergence
        return Output(loss, policy.logprobs, kl.divergence, policy.dropped, kl.dropped)

    ops: dict[str, Forward] = {"policy": policy, "divergence": divergence, "sgpo": sgpo}
    return ops if tolerance else {"logprob": logprob, **ops}


# plain torch


def _surrogate(logprobs: Tensor, old: Tensor, advantages: Tensor, weight: Tensor) -> Tensor:
    ratio = (logprobs - old).exp()
    plain, bounded = -ratio * advantages, -ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantages
    return (torch.maximum(plain, bounded) * weight).sum()


def _log_softmax(hidden: Tensor, head: Tensor) -> Tensor:
    return (hidden @ head.t()).float().log_softmax(1)


def _naive_logprobs(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return _log_softmax(hidden, head).gather(1, targets.unsqueeze(1)).squeeze(1)


def _naive_divergence(hidden: Tensor, teacher: Tensor, head: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        logp_teacher = _log_softmax(teacher, head)
    kl = F.kl_div(_log_softmax(hidden, head), logp_teacher, log_target=True, reduction="none").sum(1)
    return (kl * weight).sum(), kl


def _torch_forwards(transform: Callable[[Callable[..., Any]], Callable[..., Any]]) -> dict[str, Forward]:
    """The two functions of plain torch behind all ops; `transform` compiles them or not."""
    logprobs_of, divergence_of = transform(_naive_logprobs), transform(_naive_divergence)

    def divergence(x: Inputs) -> Output:
        loss, kl = divergence_of(x.distill_hidden, x.teacher_hidden, x.head, x.distill_weight)
        return Output(loss, divergence=kl.detach())

    return {**_from_logprobs(lambda x: logprobs_of(x.policy_hidden, x.head, x.targets)), "divergence": divergence}


def _from_logprobs(logprobs_of: Callable[[Inputs], Tensor]) -> dict[str, Forward]:
    """logprob and policy out of per-token log-probs that carry a gradient."""

    def logprob(x: Inputs) -> Output:
        logprobs = logprobs_of(x)
        return Output((logprobs * x.policy_weight).sum(), logprobs.detach())

    def policy(x: Inputs) -> Output:
        logprobs = logprobs_of(x)
        loss = _surrogate(logprobs, x.old_logprobs, x.advantages, x.policy_weight)
        return Output(loss, logprobs.detach())

    return {"logprob": logprob, "policy": policy}


def _torch_linear_cross_entropy(x: Inputs) -> Output:
    # Not in every supported torch, hence by name. `sum` is its fast reduction: gradients are formed in forward.
    function, options = getattr(F, "linear_cross_entropy"), getattr(torch.nn, "LinearCrossEntropyOptions")  # noqa: B009
    loss = function(x.policy_hidden, x.head, _masked_targets(x), reduction="sum", options=options())
    return Output(-loss * x.policy_weight.amax())


def _masked_targets(x: Inputs) -> Tensor:
    return torch.where(x.policy_weight != 0, x.targets, IGNORE)


# libraries


def _liger_policy(x: Inputs) -> Output:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    tokens = x.sequence_tokens
    loss_of = LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=x.head.device.type != "cpu",
        use_ref_model=False,
        chunk_size=max(1, _LIGER_ROWS_PER_CHUNK // tokens),
        epsilon_low=CLIP_LOW,
        epsilon_high=CLIP_HIGH,
        loss_type="dapo",
    )
    hidden = x.policy_hidden.view(-1, tokens, x.policy_hidden.shape[1])
    mask = (x.policy_weight != 0).float().view(-1, tokens)
    loss, _ = loss_of(
        hidden,
        x.head,
        x.targets.view(-1, tokens),
        mask,
        x.advantages[::tokens],
        old_per_token_logps=x.old_logprobs.view(-1, tokens),
    )
    return Output(loss)


def _liger_divergence(x: Inputs) -> Output:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss_of = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, ignore_index=IGNORE, compiled=x.head.device.type != "cpu"
    )
    labels = torch.where(x.distill_weight != 0, 0, IGNORE)
    return Output(loss_of(x.distill_hidden, x.head, x.teacher_hidden, x.head.detach(), labels))


def _liger_fused_divergence(x: Inputs) -> Output:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    loss_of = LigerFusedLinearJSD(jsd_beta=0.0, ignore_index=IGNORE, accum_dtype=torch.float32)
    labels = torch.where(x.distill_weight != 0, 0, IGNORE)
    return Output(loss_of(x.distill_hidden, x.head, x.teacher_hidden, x.head.detach(), labels))


def _liger_fused_logprobs(x: Inputs) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    # Its default, logits as large as the hidden states, is 256 of 8192 rows per chunk at H 3584, V 152064.
    budget = -(-x.head.shape[0] * _LIGER_ROWS_PER_CHUNK // x.policy_hidden.numel())
    losses: Any = liger_fused_linear_cross_entropy(
        x.policy_hidden,
        x.head,
        _masked_targets(x),
        ignore_index=IGNORE,
        reduction="none",
        accum_dtype=torch.float32,
        chunk_mem_const=budget,
    )
    return -losses


def _cut_logprobs(x: Inputs) -> Tensor:
    function = _attribute("cut_cross_entropy", "linear_cross_entropy")
    return -function(x.policy_hidden, x.head, _masked_targets(x), reduction="none").float()


def _quack_logprobs(x: Inputs) -> Tensor:
    function = _attribute("quack.linear_cross_entropy", "linear_cross_entropy_func")
    return -function(x.policy_hidden, x.head, None, _masked_targets(x), IGNORE, "none").float()


def _trl_logprobs(x: Inputs) -> Tensor:
    # As GRPOTrainer's head does: the live rows, 32768 columns at a time, with the entropy that it logs.
    function, live = _attribute("trl.kernels", "ChunkedLogProbFunction"), x.policy_weight.nonzero().squeeze(1)
    outputs = ("log_probs", "entropy")
    found = function.apply(
        x.policy_hidden.index_select(0, live), x.head, None, x.targets[live], 1.0, 32768, None, 1.0, outputs
    )[0]
    return found.new_zeros(len(x.targets)).index_copy(0, live, found)


def _trl_divergence(x: Inputs) -> Output:
    # As DistillationTrainer's loss does, on the live rows; beta 0 is KL(teacher || student).
    function = _attribute("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction")
    live = x.distill_weight.nonzero().squeeze(1)
    heads = x.head, None, x.teacher_hidden[live], x.head.detach(), None
    found, _ = function.apply(x.distill_hidden.index_select(0, live), *heads, 0.0)
    kl = found.detach().new_zeros(len(x.distill_weight)).index_copy(0, live, found.detach())
    return Output((found * x.distill_weight[live]).sum(), divergence=kl)


def _fla_divergence(x: Inputs) -> Output:
    function = _attribute("fla.modules.fused_kl_div", "fused_kl_div_loss")
    live = x.distill_weight.nonzero().squeeze(1)
    return Output(function(x.distill_hidden[live], x.teacher_hidden[live], x.head, x.head.detach()))


@cache
def _attribute(module: str, name: str) -> Any:
    """An attribute of an optional package, imported at its first call."""
    return getattr(importlib.import_module(module), name)


_UNTRIED = "call written from its source, not run by us yet"
_SCALAR = "returns a scalar only"
_FUSED_CE = (
    f"fused_linear_cross_entropy in Triton, reduction none, {_LIGER_ROWS_PER_CHUNK} rows per chunk, dW accumulated in"
    " fp32; on Hopper its scaled CE needs the CuTe DSL, which the machine lacks"
)
_MEAN = f"mean over unmasked rows (= the weighted sum here), {_SCALAR}"

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("ours-torch", _ours("torch", 0.0), ours=True),
        Peer("ours-torch-live", _ours("torch", LIVE_TOLERANCE), ours=True),
        Peer("ours-torch-live-fine", _ours("torch", FINE_TOLERANCE), ours=True),
        Peer("ours-triton", _ours("triton", 0.0), devices=("cuda",), ours=True),
        Peer("ours-triton-live", _ours("triton", LIVE_TOLERANCE), devices=("cuda",), ours=True),
        Peer("ours-triton-nologits", _ours("triton-nologits", LIVE_TOLERANCE), devices=("cuda",), ours=True),
        Peer("ours-triton-live-fine", _ours("triton", FINE_TOLERANCE), devices=("cuda",), ours=True),
        Peer("naive", _torch_forwards(lambda function: function)),
        Peer("compile", _torch_forwards(lambda function: torch.compile(function, dynamic=False))),
        Peer("torch-linear-ce", {"logprob": _torch_linear_cross_entropy}, notes={"logprob": _SCALAR}),
        Peer(
            "liger",
            {"policy": _liger_policy, "divergence": _liger_divergence},
            needs=("liger_kernel",),
            notes={"policy": f"chunked GRPO: {_MEAN}", "divergence": f"chunked JSD, beta 0: {_MEAN}"},
        ),
        Peer(
            "trl",
            {**_from_logprobs(_trl_logprobs), "divergence": _trl_divergence},
            needs=("trl.kernels.chunked_divergence",),
            notes={
                "logprob": "chunked log-prob with the entropy",
                "policy": "chunked log-prob with the entropy, a surrogate in torch",
                "divergence": "chunked generalised JSD, beta 0, with the entropy",
            },
        ),
        Peer(
            "liger-fused",
            {**_from_logprobs(_liger_fused_logprobs), "divergence": _liger_fused_divergence},
            needs=("liger_kernel",),
            devices=("cuda",),
            notes={
                "logprob": _FUSED_CE,
                "policy": f"{_FUSED_CE}; a surrogate in torch",
                "divergence": f"fused_linear_jsd (its own chunks), beta 0, dW accumulated in fp32: {_MEAN}",
            },
        ),
        Peer(
            "cut-cross-entropy",
            _from_logprobs(_cut_logprobs),
            needs=("cut_cross_entropy",),
            devices=("cuda",),
            notes={"logprob": _UNTRIED, "policy": f"CE and a surrogate in torch; {_UNTRIED}"},
        ),
        Peer(
            "quack",
            _from_logprobs(_quack_logprobs),
            needs=("quack.linear_cross_entropy",),
            devices=("cuda",),
            notes={"logprob": _UNTRIED, "policy": f"CE and a surrogate in torch; {_UNTRIED}"},
        ),
        Peer(
            "fla",
            {"divergence": _fla_divergence},
            needs=("fla.modules.fused_kl_div",),
            devices=("cuda",),
            notes={"divergence": f"no mask: live rows are gathered first; mean, {_SCALAR}; {_UNTRIED}"},
        ),
    )
}
