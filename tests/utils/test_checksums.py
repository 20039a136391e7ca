"""The checksum sees every bit and its place, whatever the dtype, and does not depend on how a tensor lies in memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgpo.utils.checksums import checksum

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.uint8]


def values(count, dtype, seed=0):
    return torch.randint(0, 2**15, (count,), generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 3, 8, 1001])
def test_equal_bits_give_equal_sums(dtype, count):
    tensor = values(count, dtype)
    assert checksum(tensor) == checksum(tensor.clone())
    assert 0 <= checksum(tensor) < 2**64


@settings(max_examples=200, deadline=None)
@given(count=st.integers(1, 400), place=st.integers(0, 10**6), bit=st.integers(0, 15), seed=st.integers(0, 99))
def test_every_changed_bit_shows(count, place, bit, seed):
    tensor = torch.randn(count, generator=torch.Generator().manual_seed(seed)).bfloat16()
    other = tensor.clone()
    other.view(torch.int16)[place % count] ^= 1 << bit if bit < 15 else -(2**15)
    assert checksum(tensor) != checksum(other)


@settings(max_examples=100, deadline=None)
@given(count=st.integers(2, 400), one=st.integers(0, 10**6), two=st.integers(0, 10**6))
def test_every_swap_of_different_elements_shows(count, one, two):
    tensor = torch.randn(count, generator=torch.Generator().manual_seed(count))
    other = tensor.clone()
    one, two = one % count, two % count
    other[one], other[two] = tensor[two], tensor[one]
    assert (checksum(tensor) == checksum(other)) == (one == two)


def test_blocks_are_told_apart():
    """More than one block of words: the same change in another block is another change."""
    tensor = torch.zeros(3 * 2**18)
    sums = set()
    for place in (0, 2, 2**18, 2**18 + 2, 2**19, 2**19 + 2):
        other = tensor.clone()
        other[place] = 1.0
        sums.add(checksum(other))
    assert len(sums) == 6


def test_shape_and_dtype_count():
    tensor = torch.zeros(6, 4)
    assert len({checksum(tensor), checksum(tensor.T), checksum(tensor.view(24)), checksum(tensor.int())}) == 4


def test_only_the_values_count_not_how_they_lie_in_memory():
    tensor = torch.randn(10, 7)
    assert checksum(tensor.T.contiguous()) == checksum(tensor.T)
    shifted = torch.randn(71)[1:].view(10, 7)  # not on an 8-byte border
    assert checksum(shifted) == checksum(shifted.clone())
    before = tensor.clone()
    checksum(tensor.T)
    assert torch.equal(tensor, before)
