"""A checksum of a tensor's bits: what the trainer sends and what a rollout engine receives must agree."""

from __future__ import annotations

import zlib

import torch

_ODD = 0x9E3779B97F4A7C15 - 2**64  # an odd constant with well mixed bits, as int64


@torch.no_grad()
def checksum(tensor: torch.Tensor) -> int:
    """Sum of the tensor's 8-byte words, each times an odd weight of its position, modulo 2^64; any dtype and device.

    A changed word always shows, since an odd weight has an inverse. The same bits give the same sum on every device;
    shape and dtype count too. One read of the tensor, temporaries of a block, one number back to the host.
    """
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if data.numel() % 8 or data.data_ptr() % 8:
        data = torch.cat([data, data.new_zeros(-data.numel() % 8)])
    words = data.view(torch.int64)
    block = 2**17 if words.device.type == "cpu" else 2**24  # CPU: within the cache; elsewhere: few launches
    weights = (torch.arange(min(block, len(words)), dtype=torch.int64, device=words.device) * 2 + 1) * _ODD
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for part in words.split(block):
        total = total * _ODD + (part * weights[: len(part)]).sum()
    return (int(total) ^ zlib.crc32(f"{tuple(tensor.shape)} {tensor.dtype}".encode())) % 2**64
