"""Narrow formats of a product with the head: both operands rounded, by simulation in float32.

`Format` says how: fp8 (e4m3) or int8, a scale per row of each operand or one for each, the head without its mean row
(softmax does not see it), both operands times a Hadamard matrix, `split` of the hidden dimensions (where both operands
are largest) left exact, or with `pairs` written as two fp8 numbers, which costs two columns more of each. With
`difference` the teacher's logits are the student's plus the narrow product of h_T - h_S; with `bf16_out` products are
rounded to bfloat16 on their way out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """How both operands of the product are rounded; `largest` of the encoding (0: not at all)."""

    largest: float = 448.0
    per_row: bool = True
    centred: bool = True
    rotated: bool = False
    split: int = 0
    pairs: bool = False
    difference: bool = False
    bf16_out: bool = False

    def rounded(self, x: Tensor, keep_H: Tensor | None) -> Tensor:
        if not self.largest:
            return x
        inner = x if keep_H is None or self.pairs else x.masked_fill(keep_H, 0.0)
        top = inner.abs().amax(1, keepdim=True) if self.per_row else inner.abs().amax()
        scale = top.clamp(min=1e-30) / self.largest
        q = inner / scale
        q = (q.to(torch.float8_e4m3fn).float() if self.largest == 448.0 else q.round()) * scale
        if keep_H is None:
            return q
        kept = x
        if self.pairs:
            kept = q + ((x - q) / scale).to(torch.float8_e4m3fn).float() * scale
        return torch.where(keep_H, kept, q)


FORMATS = {
    "float32": Format(0.0, centred=False),
    "bf16_out": Format(0.0, centred=False, bf16_out=True),
    "fp8_tensor": Format(per_row=False, centred=False),
    "fp8_row": Format(centred=False),
    "fp8_centred": Format(),
    "fp8_difference": Format(difference=True),
    "fp8_both": Format(difference=True, bf16_out=True),
    "fp8_split": Format(split=64, difference=True),
    "fp8_split16": Format(split=16, difference=True),
    "fp8_pairs": Format(split=64, pairs=True, difference=True, bf16_out=True),
    "fp8_rotated": Format(rotated=True, difference=True),
    "int8_row": Format(127.0, centred=False),
    "int8_rotated": Format(127.0, rotated=True, difference=True),
}


class Narrow:
    """One format of one head."""

    def __init__(self, name: str, head: Tensor, hidden: Tensor) -> None:
        self.format = FORMATS[name]
        self.turn = _hadamard(head.shape[1]) if self.format.rotated else None
        self.mean_H = head.mean(0) if self.format.centred else torch.zeros_like(head[0])
        self.plain = plain = self._turned(head - self.mean_H)
        size_H = plain.square().mean(0) * self._turned(hidden).square().mean(0)
        self.keep = size_H >= size_H.topk(min(self.format.split, len(size_H))).values[-1] if self.format.split else None
        self.head = self.format.rounded(plain, self.keep)
        self.centre_H, self.noise_centre_H = plain.mean(0), (self.head - plain).mean(0)
        self.spread_H, self.noise_H = plain.var(0), (self.head - plain).var(0)

    def _turned(self, x: Tensor) -> Tensor:
        return x if self.turn is None else (x.unflatten(1, (-1, len(self.turn))) @ self.turn).flatten(1)

    def logits(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(logits [R, V] fp64 up to a constant per row, log of the `variance` factor [R])."""
        plain = self._turned(hidden)
        rounded = self.format.rounded(plain, self.keep)
        z = rounded @ self.head.t()
        z = z.bfloat16() if self.format.bf16_out else z
        change = rounded - plain
        mean = change @ self.centre_H + rounded @ self.noise_centre_H
        variance = change.square() @ self.spread_H + rounded.square() @ self.noise_H
        return z.double() + (hidden @ self.mean_H).double().unsqueeze(1), -(mean + variance / 2).double()

    def worst(self, hidden: Tensor) -> float:
        """Median over the rows of what Cauchy-Schwarz allows a logit's error to be, nats."""
        plain = self._turned(hidden)
        rounded = self.format.rounded(plain, self.keep)
        change, error = (rounded - plain).norm(dim=1), (self.head - self.plain).norm(dim=1).max()
        return float((change * self.plain.norm(dim=1).max() + rounded.norm(dim=1) * error).median())


def _hadamard(width: int) -> Tensor:
    """Orthogonal with random signs, of the largest power of two that divides the width."""
    size, matrix = width & -width, torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.randint(2, (size, 1), generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    return signs * matrix / math.sqrt(size)
