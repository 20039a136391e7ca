"""Weights on their way: in buckets, and through anonymous shared memory to another process."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator

import torch

_ALIGNMENT = 64

Named = tuple[str, torch.Tensor]
Layout = list[tuple[str, torch.dtype, tuple[int, ...], int]]  # name, dtype, shape, offset in bytes


def buckets(named: Iterable[Named], limit_bytes: int) -> Iterator[list[Named]]:
    """Groups of about `limit_bytes`; a larger tensor is a bucket of its own."""
    bucket: list[Named] = []
    size = 0
    for name, tensor in named:
        bucket.append((name, tensor))
        size += tensor.nbytes
        if size >= limit_bytes:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def share(bucket: list[Named]) -> tuple[int, Layout]:
    """Copies a bucket into a new block of shared memory: (its file descriptor, to be closed by the caller; layout)."""
    layout: Layout = []
    size = 0
    for name, tensor in bucket:
        layout.append((name, tensor.dtype, tuple(tensor.shape), size))
        size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    descriptor = os.memfd_create("sgpo weights")
    os.ftruncate(descriptor, max(size, 1))
    block = torch.frombuffer(mmap.mmap(descriptor, max(size, 1)), dtype=torch.uint8)
    for (_, tensor), (_, _, _, offset) in zip(bucket, layout, strict=True):
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        block[offset : offset + len(flat)].copy_(flat)
    return descriptor, layout


def receive(descriptor: int, layout: Layout) -> Iterator[Named]:
    """The tensors of a shared block, without a copy; the block lives as long as any of them. Closes the descriptor."""
    size = os.fstat(descriptor).st_size
    block = torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
    os.close(descriptor)
    for name, dtype, shape, offset in layout:
        count = torch.Size(shape).numel() * dtype.itemsize
        yield name, block[offset : offset + count].view(dtype).view(shape)
