"""The row arithmetic as a contract: the functions that both implementations have, and the tensors between them.

`backend_torch` (plain torch) and `backend_triton` (Triton) are two modules with the functions of `Backend`. The chunk
loop calls them stage by stage, for the C rows of one chunk:
  scan             logits of one context -> statistics [STAT_ROWS, C] of this rank's columns
  *_row_values     the statistics of all vocabulary shards -> values [VALUE_ROWS, N] of the group's rows, and the table
                   [TABLE_ROWS, C] that dz is computed from
  divergence_sums  distillation rows only, between pair_row_values and divergence_row_values
  live_columns     per column the largest |dz| of the chunk relative to the row's weight, and whether that is enough
  gradient         dz of all columns, or of the live ones

Every plane of those tensors has its name here, in Triton too (`triton_tiles` makes compile-time constants of them).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sgpo_kernels.inputs import ClipRange, KlLimit

# Planes of the statistics of one context: max z, sum e^(z - max), sum e^(z - max) (z - max), the label's logit (-inf
# where the label is not a column of this rank). Where both contexts are scanned, the teacher's four planes follow.
TOP, EXP_SUM, WEIGHTED_SUM, LABEL_LOGIT = range(4)
STAT_ROWS = 4

# Planes of a chunk's table, in the accumulation dtype.
MAX, LOG_SUM = 0, 1  # log p_j = (z_j - MAX) - LOG_SUM
SLOPE = 2  # dz = SLOPE * core; holds the weight, the gate, 1 / temperature and 1 / scale
STRENGTH = 3  # |SLOPE| relative to the row's weight: ratio and gate
ENTROPY_SLOPE = 4  # score rows: dz gets -ENTROPY_SLOPE p (log p + ENTROPY)
CENTRE = 4  # reverse KL and JS: sum p_S x, which dz = p_S (x - CENTRE) takes off
ENTROPY = 5
TEACHER_MAX, TEACHER_LOG_SUM = 6, 7
TOTAL = 8  # an upper bound of sum |core| over this rank's columns
TABLE_ROWS = 9

# Planes of the values of a group's rows. The second names are those of distillation rows.
LOGPROB, ROW_ENTROPY, RATIO, CLIPPED, ROW_LOSS, DROPPED, SHARE = range(7)
DIVERGENCE, TEACHER_ENTROPY, OVER = LOGPROB, RATIO, CLIPPED
VALUE_ROWS = 7

# Planes of the sums over the vocabulary that a divergence needs: its value, its CENTRE, and the size of its core.
DIVERGENCE_SUM, CENTRE_SUM, SIZE_SUM = range(3)
SUM_ROWS = 3


class Logits(NamedTuple):
    """One context of a chunk: products h Wᵀ [C, V], and what turns them into logits (`backend_torch.scan` overwrites
    the products). inv_temperature_C: 1 / temperature of each row, None for 1. `notes` holds what `scan` leaves for
    later stages of the same implementation."""

    products_CV: Tensor
    bias_V: Tensor | None
    softcap: float | None
    inv_temperature_C: Tensor | None
    notes: dict[str, Tensor] | None = None


class Sweep(NamedTuple):
    """One context of a chunk that gets no logits (impl="triton-nologits"): what they would be made of, the log-probs of
    the sampling policy (None where no gradient is wanted), and what `scan` leaves for later stages."""

    hidden_CH: Tensor
    head_VH: Tensor
    inv_temperature_C: Tensor | None
    old_C: Tensor | None
    notes: dict[str, Tensor]


class LiveColumns(NamedTuple):
    """Columns of a chunk that carry gradient, ascending. `taken` (0-d): only the first so many of columns_A, a number
    that only the device knows; None: all of them."""

    columns_A: Tensor
    taken: Tensor | None


class Backend(Protocol):
    """The functions of `backend_torch` and `backend_triton`, which are modules: hence no `self` there.

    Common arguments: parts, the statistics of all vocabulary shards [ranks, STAT_ROWS, C] (both contexts: [ranks,
    2 * STAT_ROWS, C]), and rank, the own place among them; labels_C int64, columns of this rank, negative for none;
    rows_C int64, where the chunk's rows stand among the N of their group; factor_C, what row gradients are multiplied
    by, None where no gradient is wanted; `values` [VALUE_ROWS, N], written at rows_C; kind "score" or a divergence.
    """

    def scan(self, logits: Logits, labels_C: Tensor | None) -> Tensor:
        """The statistics [STAT_ROWS, C] of one context over this rank's columns; without labels LABEL_LOGIT is void."""
        ...

    def score_row_values(
        self,
        parts_R4C: Tensor,
        rank: int,
        labels_C: Tensor,
        slopes: tuple[Tensor, Tensor] | None,
        rows_C: Tensor,
        factor_C: Tensor | None,
        values: Tensor,
    ) -> Tensor:
        """Without `slopes`: log-prob and entropy into `values`. With slopes, the upstream gradients of the two, [N]
        each: nothing is written. Returns the table either way."""
        ...

    def policy_row_values(
        self,
        parts_R4C: Tensor,
        rank: int,
        labels_C: Tensor,
        old_N: Tensor | None,
        advantages_N: Tensor,
        weight_N: Tensor,
        clip_range: ClipRange,
        rows_C: Tensor,
        factor_C: Tensor | None,
        values: Tensor,
    ) -> Tensor:
        """Log-prob, entropy, ratio, clipped and loss into `values`; returns the table. old_N: log-probs of the sampling
        policy, None for a ratio of 1."""
        ...

    def pair_row_values(self, parts_R8C: Tensor, rank: int, rows_C: Tensor, values: Tensor) -> Tensor:
        """The entropies of both contexts into `values`; returns a table with the normalisers of both."""
        ...

    def divergence_sums(self, kind: str, student: Logits, teacher: Logits, table: Tensor) -> Tensor:
        """[SUM_ROWS, C] over this rank's columns: the divergence, the centre (reverse KL, JS), and sum |dz| (forward
        KL) or sum p_S |x| (the others), from which the bound of dropped columns is made."""
        ...

    def divergence_row_values(
        self,
        sums_3C: Tensor,
        weight_N: Tensor,
        kl_limit: KlLimit,
        rows_C: Tensor,
        factor_C: Tensor | None,
        values: Tensor,
        table: Tensor,
    ) -> None:
        """From the sums over all shards: divergence, over and loss into `values`, slopes into the table."""
        ...

    def column_threshold(self, table: Tensor, tolerance: float) -> Tensor:
        """0-d: the peak from which a column lives, tolerance * min(1, the chunk's largest STRENGTH * TOTAL)."""
        ...

    def live_columns(
        self,
        kind: str,
        student: Logits,
        teacher: Logits | None,
        table: Tensor,
        labels_C: Tensor | None,
        threshold: Tensor,
        *,
        all_peaks: bool,
    ) -> tuple[LiveColumns, Tensor]:
        """(live columns, peaks [V]): a column lives where its peak, the largest |core| * STRENGTH over the chunk's
        rows, is not below the threshold (0-d). Peaks from the threshold on come back as 0; unless `all_peaks` is asked
        for, any smaller one may too. NaN lives; a peak of 0 never does. Where the count stays on the device and is
        above `sizes.dense_limit`, every column lives."""
        ...

    def gradient(
        self,
        kind: str,
        student: Logits,
        teacher: Logits | None,
        table: Tensor,
        labels_C: Tensor | None,
        out_CV: Tensor | None,
        *,
        with_entropy: bool = False,
    ) -> Tensor:
        """dz of every column [C, V], into `out_CV` (rounded to its dtype), or in place of the student's products."""
        ...

    def gradient_columns(
        self,
        kind: str,
        student: Logits,
        teacher: Logits | None,
        table: Tensor,
        labels_C: Tensor | None,
        live: LiveColumns,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dz [C, A] of the live columns in `dtype`, what they hold of TOTAL [C], their sum of dz before rounding [C]).
        Behind those that are taken, dz is 0 up to a multiple of 16 and then not written."""
        ...

    def finish_columns(
        self,
        table: Tensor,
        kept_C: Tensor,
        sum_C: Tensor | None,
        live: LiveColumns,
        scale: Tensor,
        rows_C: Tensor,
        vocab: int,
        values: Tensor,
    ) -> None:
        """Writes DROPPED and SHARE of the chunk's rows: the bound of what the dropped columns hold, plus, where their
        sum is given back to dH (`sum_C`), the size of that sum."""
        ...

    def live_hidden(self, dz_CA: Tensor, head_VH: Tensor, live: LiveColumns) -> Tensor:
        """dz_A W_A [C, H] in the accumulation dtype."""
        ...

    def add_live_head(
        self,
        sums_VH: Tensor,
        first_V: Tensor | None,
        number: int,
        dz_CA: Tensor,
        hidden_CH: Tensor,
        live: LiveColumns,
    ) -> None:
        """sums_VH[A] += dz_Aᵀ h. With first_V (int32), rows of sums_VH where it is 0 hold nothing yet: they are set,
        and first_V becomes `number`, > 0 and another one in every call."""
        ...

    def rescaled(self, grad: Tensor, factor: Tensor, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
        """grad * factor (0-d) in `dtype`, multiplied in that of factor and rounded once; zeros in the rows of a matrix
        where `rows` (int32) is 0."""
        ...
