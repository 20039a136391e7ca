"""The row arithmetic of policy rows and log-probs without logits, in Triton: impl="triton-nologits".

What: `scan`, `live_columns` and `gradient_columns` of `backend.Backend` for a `Sweep` in place of logits, by the
  kernels of `triton_products`; every other stage is that of backend_triton.
Equation: p_j = e^(z_j - guess) e^(guess - log sum). The guess of log sum is the label's logit minus its log-prob under
  the sampling policy, known before the product; so that p is bounded, column by column, in the product's own tiles.
Source: as backend_torch.py.
Gradient: as backend_torch.py, on live columns whose logits are formed a second time.
Memory: no logits; per chunk 3 C V / 128 floats of tile statistics and C / 128 V of column peaks.
Precision: as backend_triton.py. A guess that is off keeps more columns than it must, never fewer.
Limits: column_tolerance > 0 where gradients are wanted, and old_logprobs; no bias, soft-cap or vocabulary shards; rows
  of whole 16 bytes; compute capability 9.0. Other rows go the way of impl="triton".
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sgpo_kernels import backend_triton, sizes, triton_products
from sgpo_kernels.backend import LABEL_LOGIT, STAT_ROWS, LiveColumns, Sweep
from sgpo_kernels.backend_triton import (
    COMPILED,
    LIVE_PROGRAMS,
    TILE_STATS,
    add_live_head,
    column_threshold,
    finish_columns,
    live_hidden,
    policy_row_values,
    score_row_values,
    tile_options,
)

__all__ = [
    "add_live_head",
    "column_threshold",
    "finish_columns",
    "gradient_columns",
    "live_columns",
    "live_hidden",
    "policy_row_values",
    "scan",
    "score_row_values",
]

# Launch syntax is beyond type checkers.
products: Any = triton_products
GUESS_ROWS = 4
# Row tiles that share a column tile of the head while it is in the cache.
GROUP = 8


def takes(head: Tensor) -> bool:
    """Whether TMA descriptors can read the head [V, H], and rows as wide as its own, on this device."""
    steps = (head.stride(0), head.shape[1], head.data_ptr() // head.element_size())
    whole = head.stride(1) == 1 and all(step * head.element_size() % 16 == 0 for step in steps)
    on_device = not head.is_cuda or (
        head.element_size() == 2 and torch.cuda.get_device_capability(head.device) >= (9, 0)
    )
    return whole and on_device


def scan(sweep: Sweep, labels_C: Tensor) -> Tensor:
    """See `Backend.scan`; leaves what `live_columns` needs in the sweep's notes."""
    hidden, head = sweep.hidden_CH, sweep.head_VH
    (rows, width), vocab = hidden.shape, len(head)
    tiles = backend_triton.product_tiles("sweep", hidden)
    column_tiles, row_tiles = triton.cdiv(vocab, tiles.columns), triton.cdiv(rows, tiles.rows)
    halves = 2 * column_tiles
    stats_4C = hidden.new_empty(STAT_ROWS, rows, dtype=torch.float32)
    tile_stats = stats_4C.new_empty(TILE_STATS, halves, rows)
    inverse, flags = _temperature(sweep)
    taken_C, guess_C, peaks = stats_4C[LABEL_LOGIT], stats_4C, stats_4C
    if sweep.old_C is not None:
        guess_C, peaks = stats_4C.new_empty(rows), stats_4C.new_empty(row_tiles, vocab)
        products.label_guess[(triton.cdiv(rows, GUESS_ROWS),)](
            hidden, head, head.stride(0), labels_C, sweep.old_C, inverse, guess_C, rows, width,
            **flags, BLOCK_R=GUESS_ROWS, BLOCK_V=triton.next_power_of_2(width), num_warps=4, **COMPILED,
        )  # fmt: skip
        sweep.notes.update(guess=guess_C, peaks=peaks, taken=taken_C)
    programs = torch.cuda.get_device_properties(head.device).multi_processor_count if head.is_cuda else 4
    products.sweep[(min(programs, row_tiles * column_tiles),)](
        _descriptor(hidden, tiles.rows, tiles.depth), _descriptor(head, tiles.columns, tiles.depth),
        labels_C, guess_C, inverse, tile_stats, taken_C, peaks, rows, vocab, width, halves,
        PEAKS=sweep.old_C is not None, **flags, PROGRAMS=programs, GROUP=GROUP, **tile_options(tiles),
    )  # fmt: skip
    backend_triton.combine(tile_stats, (1, rows), stats_4C)
    return stats_4C


def _descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


def _temperature(sweep: Sweep) -> tuple[Tensor, dict[str, bool]]:
    """1 / temperature of each row (without one, a pointer that is never read), and the flag."""
    inverse = sweep.inv_temperature_C
    return sweep.hidden_CH if inverse is None else inverse, {"HAS_TEMPERATURE": inverse is not None}


def live_columns(
    kind: str,
    student: Sweep,
    teacher: None,
    table: Tensor,
    labels_C: Tensor,
    threshold: Tensor,
    *,
    all_peaks: bool,
) -> tuple[LiveColumns, Tensor]:
    """See `Backend.live_columns`; peaks are bounds. A label's column lives by its own gradient."""
    del kind, teacher, all_peaks
    peaks, rows = student.notes["peaks"], len(labels_C)
    reach_T = table.new_empty(len(peaks))
    forced_V = torch.zeros(peaks.shape[1], dtype=torch.bool, device=table.device)
    products.sweep_reach[(len(peaks),)](
        table, student.notes["guess"], student.notes["taken"], labels_C, threshold, reach_T, forced_V, rows,
        BLOCK=backend_triton.product_tiles("sweep", student.hidden_CH).rows, num_warps=4, **COMPILED,
    )  # fmt: skip
    return backend_triton.placed(peaks, threshold, reach_T, forced_V)


def gradient_columns(
    kind: str,
    student: Sweep,
    teacher: None,
    table: Tensor,
    labels_C: Tensor,
    live: LiveColumns,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Backend.gradient_columns`."""
    del kind, teacher
    hidden, head = student.hidden_CH, student.head_VH
    rows, width = hidden.shape
    tiles = backend_triton.product_tiles("gathered", hidden)
    dz_CA = sizes.padded_empty(rows, live.columns_A.numel(), like=table, dtype=dtype)
    sums = table.new_empty(2, rows, LIVE_PROGRAMS)
    inverse, flags = _temperature(student)
    products.gathered_gradient[(triton.cdiv(rows, tiles.rows), LIVE_PROGRAMS)](
        hidden, head, head.stride(0), inverse, table, labels_C, *live, dz_CA, dz_CA.stride(0), sums, rows, width,
        **flags, **tile_options(tiles),
    )  # fmt: skip
    kept_C, sum_C = sums.sum(2)
    return dz_CA, kept_C, sum_C
