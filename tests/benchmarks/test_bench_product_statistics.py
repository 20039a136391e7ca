"""The product kernels with a statistics epilogue against fp64, on Triton's interpreter; the rows on disk."""

from dataclasses import replace

import pytest
import torch

from benchmarks import product_statistics, products, states

CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs where there is no GPU")
# 100 columns: four tiles of 32 with a last half that holds none.
WIDTH, VOCAB, ROWS = 64, 100, 32


@pytest.fixture(scope="module")
def near():
    return states.spread(1, ROWS, WIDTH, VOCAB, ratio=0.1)


@CPU_ONLY
@pytest.mark.parametrize("peaks", [False, True])
@pytest.mark.parametrize("halves", [False, True])
def test_statistics_are_those_of_the_logits(near, peaks, halves):
    tiles = replace(product_statistics.SMALL, HALVES=halves)
    call, errors = product_statistics.one_case(near.distill_hidden, near.head, tiles, peaks)
    assert max(errors().values()) > 0.1
    call()
    assert set(errors()) == {"lse", "mean", "peaks" if peaks else "target"}
    assert max(errors().values()) < 1e-5


@CPU_ONLY
def test_kl_around_a_guessed_difference(near):
    call, errors = product_statistics.two_case(
        near.distill_hidden, near.teacher_hidden, near.head, product_statistics.SMALL
    )
    call()
    found = errors()
    assert found["largest_kl"] > 0.01
    assert found["kl"] < 2e-6
    assert found["kl_two_pass"] < 2e-6


def test_products_in_blocks():
    torch.manual_seed(0)
    left, right = torch.randn(30, 8), torch.randn(8, 5)
    total, blocked = torch.ones(30, 5), torch.ones(30, 5)
    products.add_product(total, left, right)
    products.add_blocked(blocked, left, right, 7)
    torch.testing.assert_close(total, 1 + left @ right)
    torch.testing.assert_close(blocked, total)
    weights = torch.rand(30)
    torch.testing.assert_close(products.mean_in_blocks(weights, left, 10), weights @ left)
