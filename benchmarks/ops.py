"""What is measured: the ops, the head shapes, the row mixes, and the inputs that a case of the three gets.

All weights within a group are equal (1 / its live rows), no row is masked for its KL (`max_token_kl` None) and
advantages are one per sequence, so that libraries that know means and sequences compute the same number. In the mix
`half-dead` every second sequence has weight 0, as GRPO groups without spread in the reward make them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from benchmarks.states import HeadStates
from sgpo.types import SgpoError

CLIP_LOW, CLIP_HIGH = 0.2, 0.28
SEQUENCE_TOKENS = 512

OpName = Literal["logprob", "policy", "divergence", "sgpo"]


@dataclass(frozen=True)
class Op:
    """`units` are the products N x H x V that one live row costs where nothing is skipped, forward and backward."""

    name: OpName
    equation: str
    policy_units: int
    distill_units: int
    mixes: tuple[str, ...]


@dataclass(frozen=True)
class Shape:
    """A head [vocab, hidden] and how many rows a run takes unless told otherwise."""

    name: str
    hidden: int
    vocab: int
    rows: int


@dataclass(frozen=True)
class Mix:
    """Distillation rows per policy row in the op `sgpo` (None: no policy rows), and the share of dead rows."""

    name: str
    distill_per_policy: float | None
    dead: float = 0.0


OPS = {
    op.name: op
    for op in (
        Op("logprob", "sum w log softmax(z)[y]", 4, 0, ("policy", "half-dead")),
        Op("policy", "sum w max(-r A, -clip(r) A)", 3, 0, ("policy", "half-dead")),
        Op("divergence", "sum w KL(p_T || p_S)", 0, 4, ("distill", "half-dead")),
        Op("sgpo", "policy + divergence", 3, 4, ("sgpo", "half-dead", "policy", "distill")),
    )
}
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen2.5-7b", 3584, 152064, 8192),
        Shape("qwen2.5-1.5b", 1536, 151936, 8192),
        Shape("llama-8b", 4096, 128256, 8192),
        Shape("smollm2", 576, 49152, 1024),
        Shape("cpu-7b-proportions", 896, 32768, 4096),
        Shape("tiny", 256, 1024, 64),
    )
}
MIXES = {
    mix.name: mix
    for mix in (
        Mix("policy", 0.0),
        Mix("distill", None),
        Mix("sgpo", 1 / 8),
        Mix("half-dead", 1 / 8, dead=0.5),
    )
}


def group_rows(op: Op, mix: Mix, rows: int) -> tuple[int, int]:
    """(policy rows, distillation rows) of a case; `rows` is the larger group.

    Raises:
        SgpoError: the op has no such mix.
    """
    if mix.name not in op.mixes:
        raise SgpoError(f"The op {op.name} has no row mix {mix.name!r}; it has {', '.join(op.mixes)}.")
    if not op.distill_units:
        return rows, 0
    if not op.policy_units or mix.distill_per_policy is None:
        return 0, rows
    return rows, round(rows * mix.distill_per_policy)


@dataclass(frozen=True)
class Inputs:
    """One call's tensors. Hidden states and head in the dtype under test, per-row values float32.

    policy_hidden [Np, H], targets int64 [Np], old_logprobs, advantages, policy_weight [Np];
    distill_hidden, teacher_hidden [Nd, H], distill_weight [Nd]; head [V, H].
    Policy rows are sequences of `sequence_tokens` rows; an advantage and a weight belong to a sequence.
    """

    op: Op
    policy_hidden: Tensor
    targets: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    policy_weight: Tensor
    distill_hidden: Tensor
    teacher_hidden: Tensor
    distill_weight: Tensor
    head: Tensor
    sequence_tokens: int

    @property
    def rows(self) -> int:
        return len(self.policy_hidden) + len(self.distill_hidden)

    @property
    def floor_units(self) -> float:
        """Products per row that an exact op cannot avoid: those of the live rows, spread over all rows."""
        policy, distill = (int((weight != 0).sum()) for weight in (self.policy_weight, self.distill_weight))
        return (policy * self.op.policy_units + distill * self.op.distill_units) / self.rows

    def leaves(self) -> dict[str, Tensor]:
        """What gradients are taken by: the hidden states of the groups with rows, and the head."""
        groups = {"dpolicy": self.policy_hidden, "ddistill": self.distill_hidden, "dhead": self.head}
        return {name: tensor for name, tensor in groups.items() if len(tensor)}

    def only(self, group: Literal["policy", "divergence"]) -> Inputs:
        """The case of one group alone, for libraries that have an op per group."""
        return replace(self, op=OPS[group])


def build(op: Op, mix: Mix, states: HeadStates, *, seed: int) -> Inputs:
    """The inputs of a case on these states; hidden states and head require grad.

    Old log-probs are the present ones plus at most 0.1, and 0.5 lower or higher in 5 % of the rows: some ratios are
    clipped, none lies so near a bound that rounding decides.
    """
    device = states.head.device
    generator = torch.Generator(device).manual_seed(seed)
    policy_rows, distill_rows = len(states.policy_hidden), len(states.distill_hidden)
    tokens = sequence_tokens(policy_rows)
    advantages = torch.randn(policy_rows // tokens, generator=generator, device=device).repeat_interleave(tokens)
    noise = torch.rand(policy_rows, generator=generator, device=device).mul_(0.2).sub_(0.1)
    far = torch.rand(policy_rows, generator=generator, device=device) < 0.05
    present = logprobs(states.policy_hidden, states.head, states.policy_targets)
    return Inputs(
        op=op,
        policy_hidden=states.policy_hidden.detach().clone().requires_grad_(),
        targets=states.policy_targets,
        old_logprobs=present + torch.where(far, 0.5 * noise.sign(), noise),
        advantages=advantages,
        policy_weight=_weights(policy_rows, tokens, mix.dead, device),
        distill_hidden=states.distill_hidden.detach().clone().requires_grad_(),
        teacher_hidden=states.teacher_hidden.detach(),
        distill_weight=_weights(distill_rows, sequence_tokens(distill_rows), mix.dead, device),
        head=states.head.detach().clone().requires_grad_(),
        sequence_tokens=tokens,
    )


def sequence_tokens(rows: int) -> int:
    """The longest power of two that divides the rows, at most 512 and at most half of the rows."""
    tokens = 1
    while tokens < SEQUENCE_TOKENS and rows and rows % (4 * tokens) == 0:
        tokens *= 2
    return tokens


@torch.no_grad()
def logprobs(hidden_NH: Tensor, head: Tensor, targets_N: Tensor) -> Tensor:
    """log p(target) in float32, in blocks of rows."""
    weight = head.detach().float()
    blocks = [
        (hidden.float() @ weight.t()).log_softmax(1).gather(1, targets.unsqueeze(1)).squeeze(1)
        for hidden, targets in zip(hidden_NH.detach().split(256), targets_N.split(256), strict=True)
    ]
    return torch.cat(blocks)


def _weights(rows: int, tokens: int, dead: float, device: torch.device) -> Tensor:
    """1 / live rows; the first `dead` share of every pair of sequences has weight 0."""
    sequence_N = torch.arange(rows, device=device) // tokens
    live_N = sequence_N % 2 >= round(2 * dead)
    return live_N.float() / live_N.sum().clamp(min=1)
