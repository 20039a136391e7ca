"""Ulysses sequence parallelism: ranks that share every forward pass, each with an equal slice of its tokens.

Each rank goes on owning its sequences. The members of a group lay their batches behind one another in one packed row
and run the layers on a slice of it each; attention exchanges tokens for heads and back through DeepSpeed
(arXiv 2309.14509). After the last layer every selected row goes home to its owner, where final norm, head and loss
run as without a group. The exchanges carry gradients back, so a weight's gradient is still the sum over all ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sgpo.model.activations import attend_per_sequence, packed_inputs, require_full_attention


class SequenceParallel:
    """The `size` neighbouring ranks, this one among them, that share the forward passes of `lm`. Collective.

    Raises SgpoError for a model whose layers mix tokens by anything but full causal attention.
    """

    def __init__(self, lm: Any, size: int, *, timeout_s: float) -> None:
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

        self.size = size
        require_full_attention(lm, "engine.sequence_parallel_size above 1", "set it to 1")
        core = attend_per_sequence(lm)
        self._lm = lm
        self._group = _group(size, timeout_s)
        text = lm.config.get_text_config()
        self._attention = UlyssesSPAttentionHF(
            attn=core,
            batch_size=1,
            attn_head_count=text.num_attention_heads,
            attn_head_size=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            kv_head_count=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            num_hidden_layers=text.num_hidden_layers,
            process_group=self._group,
            seq_length_is_variable=True,
        )

    def share(
        self, input_ids: torch.Tensor, rows: torch.Tensor, lengths: Sequence[int] | None
    ) -> tuple[torch.Tensor, dict[str, Any], Callable[[torch.Tensor], torch.Tensor]]:
        """What this rank computes of the forward pass over the batches of its group. Collective in the group.

        Args:
            input_ids, rows, lengths: this rank's own batch, as `PolicyModel.hidden` takes it.

        Returns:
            ids [1, t] of this rank's slice; the backbone's other arguments; and a function from the slice's states
            [1, t, H] to those of this rank's `rows` [N, H], collective too.
        """
        sequences = tuple(lengths or [input_ids.shape[1]] * len(input_ids))
        batches: list[Any] = [None] * self.size
        dist.all_gather_object(batches, (input_ids.flatten().cpu(), rows.cpu(), sequences), group=self._group)
        ids = torch.cat([own for own, _, _ in batches])
        width = -(-len(ids) // self.size)
        padding = width * self.size - len(ids)  # one more sequence, at the end
        ids = torch.nn.functional.pad(ids, (0, padding))
        ends = torch.tensor([len(own) for own, _, _ in batches]).cumsum(0)
        wanted = [end - len(own) + of_owner for end, (own, of_owner, _) in zip(ends, batches, strict=True)]

        me = dist.get_rank(self._group)
        mine = slice(me * width, (me + 1) * width)
        inputs = packed_inputs(
            self._lm,
            [length for _, _, part in batches for length in part] + [padding] * (padding > 0),
            input_ids.device,
        )
        inputs["position_ids"] = inputs["position_ids"][:, mine]
        sent = [rows_of[rows_of // width == me] - mine.start for rows_of in wanted]
        holders = wanted[me] // width  # of this rank's rows, which arrive ordered by holder
        back = holders.argsort(stable=True).argsort()
        counts = [len(part) for part in sent], holders.bincount(minlength=self.size).tolist()

        def send_home(states: torch.Tensor) -> torch.Tensor:
            found = states.flatten(0, 1)[torch.cat(sent).to(states.device)]
            return _Exchange.apply(found, *counts, self._group)[back.to(states.device)]

        return ids[None, mine].to(input_ids.device), {**inputs, "across_ranks": self._attention}, send_home


class _Exchange(torch.autograd.Function):
    """Rows [N, H] in blocks, block j for member j -> the blocks that all members had for this one [M, H]."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, sent: list[int], received: list[int], group: Any) -> torch.Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _all_to_all(grad, ctx.received, ctx.sent, ctx.group), None, None, None


def _all_to_all(rows: torch.Tensor, sent: list[int], received: list[int], group: Any) -> torch.Tensor:
    found = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(found, rows.contiguous(), received, sent, group=group)
    return found


@functools.cache
def _group(size: int, timeout_s: float) -> Any:
    """One group of communicators for all models of a run: on a GPU each costs memory."""
    return dist.new_subgroups(size, timeout=timedelta(seconds=timeout_s))[0]
