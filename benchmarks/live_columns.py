"""How few columns of dz carry the gradient of a loss head: live share and error against the threshold.

python -m benchmarks.live_columns --model models/smollm2-135m [--data FILE.jsonl] [--rows 1024] [--chunk 512]
python -m benchmarks.live_columns --calibrated H V

In plain torch straight from the definition, in fp64, without our kernels. Per chunk of rows a column is live where
max over the rows of |dz| / |w| >= threshold; all weights w are 1, policy rows are on-policy with advantage 1 (dz =
onehot - p_S), KL rows are forward KL (dz = p_S - p_T), those above `--max-token-kl` masked. dz of all other columns is
dropped. Each row of the output:

  live_share      live columns / V, mean over the chunks
  dhidden_error   |dH - dH of the live columns| / |dH| (Frobenius); dhead_error likewise; dropping alone
  dhidden_error_centred   that of dH where every row gets its dropped sum of dz (known: all dz sum to 0) times the
                  chunk's mean head row, weighted by the dropped |dz| of the columns
  dhidden_error_bf16   that of dH with the kept dz also rounded to bf16, as a half-precision product takes it
  dropped_max, dropped_mean   sum of the dropped |dz| of a row, over the rows
  tiles_unsorted, tiles_sorted   share of 128 x 128 tiles of a chunk with a live entry, in the order given, and with
                  rows and columns sorted by their largest |dz|
Threshold 0 is the dense product. The weights' scale cancels in all of these but the dropped mass.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import states as sources
from benchmarks.states import HeadStates
from sgpo.types import SgpoError
from sgpo.utils import provenance

TILE = 128


def policy_dz(hidden_NH: Tensor, targets_N: Tensor, head: Tensor) -> Tensor:
    """d log p(target) / d logits, [N, V] in fp64."""
    dz_NV = _softmax(hidden_NH, head).neg_()
    return dz_NV.scatter_add_(1, targets_N.unsqueeze(1), torch.ones_like(dz_NV[:, :1]))


def kl_dz(hidden_NH: Tensor, teacher_NH: Tensor, head: Tensor, max_token_kl: float) -> Tensor:
    """d KL(teacher || student) / d student logits, [N, V] in fp64; rows above the limit are 0."""
    student_NV, teacher_NV = _softmax(hidden_NH, head), _softmax(teacher_NH, head)
    kl_N = torch.special.xlogy(teacher_NV, teacher_NV / student_NV).sum(1)
    return student_NV.sub_(teacher_NV).mul_((kl_N <= max_token_kl).unsqueeze(1))


def _softmax(hidden_NH: Tensor, head: Tensor) -> Tensor:
    return (hidden_NH.double() @ head.double().t()).softmax(1)


class Dropping:
    """Measures one dz matrix [N, V], given the hidden states [N, H] whose gradient goes into dW.

    |Σ_n x_n ⊗ h_n|² = Σ_nm (x_n · x_m)(h_n · h_m): the error of dW costs an [N, N] matrix instead of a [V, H] one.
    """

    def __init__(self, dz_NV: Tensor, hidden_NH: Tensor, head: Tensor, chunk_rows: int) -> None:
        self.dz_NV, self.head = dz_NV, head.double()
        self.gram_NN = hidden_NH.double() @ hidden_NH.double().t()
        self.chunks = [slice(start, start + chunk_rows) for start in range(0, len(dz_NV), chunk_rows)]
        self.peaks = [dz_NV[chunk].abs().amax(0) for chunk in self.chunks]
        self.dhidden_size = torch.linalg.norm(dz_NV @ self.head)
        self.dhead_size = self._dhead_norm(dz_NV)

    def row(self, threshold: float) -> dict[str, float]:
        """All figures at one threshold."""
        dropped_NV, shares = self.dz_NV.clone(), []
        rounding_NV = torch.zeros_like(self.dz_NV)
        for chunk, peak_V in zip(self.chunks, self.peaks, strict=True):
            live_V = peak_V >= threshold
            shares.append(float(live_V.double().mean()))
            dropped_NV[chunk] *= ~live_V
            kept_CV = self.dz_NV[chunk] * live_V
            rounding_NV[chunk] = kept_CV - kept_CV.bfloat16().double()
        mass_N, missing_NH = dropped_NV.abs().sum(1), dropped_NV @ self.head
        return {
            "threshold": threshold,
            "live_share": sum(shares) / len(shares),
            "dhidden_error": float(torch.linalg.norm(missing_NH) / self.dhidden_size),
            "dhidden_error_centred": self._centred_error(missing_NH, dropped_NV),
            "dhead_error": float(self._dhead_norm(dropped_NV) / self.dhead_size),
            "dhidden_error_bf16": float(torch.linalg.norm(missing_NH + rounding_NV @ self.head) / self.dhidden_size),
            "dropped_max": float(mass_N.max()),
            "dropped_mean": float(mass_N.mean()),
            **self._tiles(threshold),
        }

    def _centred_error(self, missing_NH: Tensor, dropped_NV: Tensor) -> float:
        left_NH = missing_NH.clone()
        for chunk in self.chunks:
            mass_V = dropped_NV[chunk].abs().sum(0)
            mean_H = mass_V @ self.head / mass_V.sum().clamp(min=1e-300)
            left_NH[chunk] -= dropped_NV[chunk].sum(1, keepdim=True) * mean_H
        return float(torch.linalg.norm(left_NH) / self.dhidden_size)

    def _dhead_norm(self, dz_NV: Tensor) -> Tensor:
        return (dz_NV @ dz_NV.t()).mul_(self.gram_NN).sum().clamp(min=0).sqrt()

    def _tiles(self, threshold: float) -> dict[str, float]:
        unsorted, sorted_ = [], []
        for chunk, peak_V in zip(self.chunks, self.peaks, strict=True):
            size_CV = self.dz_NV[chunk].abs()
            unsorted.append(_tile_share(size_CV, threshold))
            rows = size_CV.amax(1).argsort(descending=True)
            sorted_.append(_tile_share(size_CV[rows][:, peak_V.argsort(descending=True)], threshold))
        return {"tiles_unsorted": sum(unsorted) / len(unsorted), "tiles_sorted": sum(sorted_) / len(sorted_)}


def _tile_share(size_CV: Tensor, threshold: float) -> float:
    """Share of the tiles that hold an entry >= threshold; a ragged edge makes tiles of its own."""
    blocks = torch.nn.functional.max_pool2d(size_CV.unsqueeze(0), TILE, ceil_mode=True)
    return float((blocks >= threshold).double().mean())


def measure(
    states: HeadStates, *, chunk_rows: int, max_token_kl: float = 1.0, exponents: range = range(10, 17)
) -> Iterator[dict[str, Any]]:
    """One row per kind of rows and threshold 2^-exponent, the dense product last."""
    for kind in ("kl", "policy"):
        if kind == "kl":
            hidden, head = states.distill_hidden, states.head
            dz_NV = kl_dz(hidden, states.teacher_hidden, head, max_token_kl)
        else:
            hidden, head = states.policy_hidden, states.head
            dz_NV = policy_dz(hidden, states.policy_targets, head)
        dropping = Dropping(dz_NV, hidden, head, chunk_rows)
        for threshold in (*(2.0**-k for k in exponents), 0.0):
            yield {"kind": kind, "rows": len(hidden), "chunk_rows": chunk_rows, **dropping.row(threshold)}


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| rows | threshold | live columns | dH error | centred | dH, bf16 dz | dW error | dropped max | mean | tiles "
        "| sorted |",
        "|" + "---|" * 11,
    ]
    for row in rows:
        threshold = f"2^{torch.tensor(row['threshold']).log2():.0f}" if row["threshold"] else "dense"
        errors = ("dhidden_error", "dhidden_error_centred", "dhidden_error_bf16", "dhead_error")
        shares = (row[key] for key in ("live_share", *errors))
        tiles = (row[key] for key in ("tiles_unsorted", "tiles_sorted"))
        first, last = (" | ".join(f"{100 * x:.3g} %" for x in group) for group in (shares, tiles))
        dropped = f"{row['dropped_max']:.2e} | {row['dropped_mean']:.2e}"
        lines.append(f"| {row['kind']} | {threshold} | {first} | {dropped} | {last} |")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, help="a local model folder")
    source.add_argument("--calibrated", type=int, nargs=2, metavar=("H", "V"), help="synthetic states of this shape")
    parser.add_argument("--data", type=Path, default=sources.DEFAULT_DATA, help="JSONL with problem, answer, solution")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=512, help="rows that share one set of live columns")
    parser.add_argument("--exponents", type=int, nargs=2, default=(10, 16), metavar=("FROM", "TO"), help="of 2^-k")
    parser.add_argument("--max-token-kl", type=float, default=1.0, help="rows above are masked; inf masks none")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, help=".pt file that keeps the model's states")
    parser.add_argument("--out", type=Path, default=Path("runs/live_columns.jsonl"))
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    if min(options.rows, options.chunk) < 1:
        raise SgpoError("--rows and --chunk must be at least 1.")
    if options.model is not None:
        states = sources.real(options.model, options.data, options.rows, device=options.device, cache=options.cache)
    else:
        hidden, vocab = options.calibrated
        shape = (options.rows, options.rows, hidden, vocab)
        states = sources.calibrated(*shape, device=options.device, seed=options.seed)
    common = {
        "benchmark": "live_columns",
        "hidden": states.head.shape[1],
        "vocab": states.head.shape[0],
        "max_token_kl": options.max_token_kl,
        "source": states.source,
        "states": sources.summary(states, rows=options.rows),
        "commit": provenance.commit(),
        "versions": provenance.versions(),
        "command": " ".join(["python -m benchmarks.live_columns", *sys.argv[1:]]),
    }
    print(json.dumps(common["states"]), file=sys.stderr)
    rows = []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a", encoding="utf-8") as file:
        exponents = range(options.exponents[0], options.exponents[1] + 1)
        for row in measure(states, chunk_rows=options.chunk, max_token_kl=options.max_token_kl, exponents=exponents):
            rows.append(row)
            file.write(json.dumps({**common, **row}) + "\n")
            file.flush()
    print(table(rows))


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        run(parse(arguments))
    except SgpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
