"""AdamW in the three places where its states can live: on the device, on the host, on the device in 8 bits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from typing import Any

import torch

from sgpo.types import SgpoError

_BLOCK, _SMALLEST_BLOCK = 256, 32  # elements that share one scale of 8-bit moments


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter],
    state: str,
    *,
    device: torch.device,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """AdamW for `state` "full", "cpu_offload" or "8bit" (torchao's, moments quantised block by block).

    Raises SgpoError where "8bit" is asked for and torchao is not installed.
    """
    settings: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    if state == "8bit":
        try:
            adamw = import_module("torchao.optim").AdamW8bit
        except ImportError as error:
            raise SgpoError(
                f"engine.optimizer_state: 8bit needs torchao ({error}); pip install 'sgpo[8bit]', or use full"
            ) from error
        return adamw(parameters, **settings)
    # Fused: one pass and no copies of the moments, which at 7B would be 28 GiB each; on the host also all cores.
    return torch.optim.AdamW(parameters, **settings, fused=state == "cpu_offload" or device.type == "cuda")


def is_8bit(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer keeps its moments in 8 bits."""
    return hasattr(optimizer, "block_size")


def fit_blocks(optimizer: torch.optim.Optimizer, sizes: Sequence[int]) -> None:
    """Gives 8-bit moments a block size that divides `sizes`, the flat masters of this process; torchao would silently
    keep the moments of others in fp32.

    Raises SgpoError where blocks would be so short that their scales outweigh what 8 bits save.
    """
    if not is_8bit(optimizer):
        return
    block = math.gcd(_BLOCK, *sizes)
    if block < _SMALLEST_BLOCK:
        raise SgpoError(
            f"engine.optimizer_state: 8bit cannot cut this process's {sum(sizes)} weights into equal blocks of at "
            f"least {_SMALLEST_BLOCK}; use a number of processes that is a power of two, or optimizer_state: full"
        )
    optimizer.block_size = block  # type: ignore[attr-defined]


def set_lr(optimizer: Any, lr: float) -> None:
    """torchao keeps the learning rate in a tensor, so that a new one compiles nothing anew."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


@torch.no_grad()
def forget(optimizer: torch.optim.Optimizer) -> None:
    """Takes the moments and the step count back to those of a first step."""
    for state in optimizer.state.values():
        for value in state.values():
            for tensor in (value.codes, value.scale) if hasattr(value, "codes") else (value,):
                tensor.zero_()


@torch.no_grad()
def sketch_of_first_moments(optimizer: torch.optim.Optimizer, limit: int = 2**22) -> torch.Tensor:
    """Sums of Adam's exp_avg over short blocks of this rank's share: fp32 on the CPU, about `limit` of them at most.

    Linear in the gradient, and small where the share is billions of weights.
    """
    moments = [state["exp_avg"] for state in optimizer.state.values() if "exp_avg" in state]
    block = max(1, math.ceil(sum(m.numel() for m in moments) / limit))
    sums = [torch.zeros(0)]
    for moment in moments:
        for piece in _pieces(moment, max(1, 2**24 // (_BLOCK * block)) * _BLOCK * block):
            whole = piece.numel() // block * block
            sums.append(piece[:whole].view(-1, block).sum(1).cpu())
            if whole < piece.numel():
                sums.append(piece[whole:].sum()[None].cpu())
    return torch.cat(sums)


def _pieces(moment: Any, size: int) -> Iterator[torch.Tensor]:
    """The moment in fp32, flat, piece by piece: dequantised as a whole it would need many times its size."""
    is_quantised = hasattr(moment, "codes")
    flat = (moment.codes if is_quantised else moment).flatten()
    for start in range(0, flat.numel(), size):
        piece = flat[start : start + size]
        if is_quantised:
            block = moment.block_size
            scale = moment.scale[start // block : (start + piece.numel()) // block]
            piece = type(moment)(piece, scale, moment.qmap, moment.signed).dequantize()
        yield piece.float()
