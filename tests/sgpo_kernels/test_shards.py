"""A head sharded over the vocabulary: 2 and 3 gloo processes give what one process gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

WORKER = str(Path(__file__).with_name("shard_worker.py"))
CUTS = {2: (0, 21, 37), 3: (0, 13, 26, 37)}


@pytest.mark.parametrize(
    ("impl", "ranks", "tolerance"), [("torch", 2, 0.0), ("torch", 3, 0.0), ("torch", 2, 0.02), ("triton", 2, 0.02)]
)
def test_pieces_give_the_whole(tmp_path, launcher, monkeypatch, impl, ranks, tolerance):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    arguments = [WORKER, str(tmp_path), impl, str(tolerance)]
    launcher(arguments)
    launcher(arguments, processes=ranks)
    whole = torch.load(tmp_path / f"{impl}-1-0-{tolerance}.pt")
    parts = [torch.load(tmp_path / f"{impl}-{ranks}-{rank}-{tolerance}.pt") for rank in range(ranks)]
    for case, expected in whole.items():
        exact = impl == "torch" and "float32" not in case
        close = {"rtol": 1e-9, "atol": 1e-12} if exact else {"rtol": 2e-4, "atol": 2e-5}
        for name, value in expected.items():
            if name in ("grad.head", "grad.bias"):
                ours = torch.cat([part[case][name] for part in parts])
                assert [len(part[case][name]) for part in parts] == [
                    b - a for a, b in zip(CUTS[ranks], CUTS[ranks][1:], strict=False)
                ]
            else:
                ours = parts[0][case][name]
                if "column_share" in name and tolerance:
                    continue  # each rank has its own columns
                assert all(torch.equal(ours, part[case][name]) for part in parts[1:]), (case, name)
            if tolerance and name.startswith("grad."):
                # Each rank has its own threshold where its piece holds little of the gradient, and drops no more.
                torch.testing.assert_close(ours, value, rtol=0.1, atol=0.1)
            elif tolerance and "dropped" in name:
                assert bool((ours <= value * 1.5 + 0.1).all())
            else:
                torch.testing.assert_close(ours, value, **close)


@pytest.mark.parametrize(
    ("start", "kind", "word"), [(3, ValueError, "vocab_group"), (-1, ValueError, "int >= 0"), (1.5, ValueError, "int")]
)
def test_a_piece_needs_its_group(make_case, op, start, kind, word):
    import sgpo_kernels

    with pytest.raises(kind, match=word):
        make_case(op).call(sgpo_kernels, vocab_start=start)
