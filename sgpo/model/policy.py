"""A Hugging Face causal language model as the trainer needs it: hidden states, and a head that never makes logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from sgpo.model.activations import checkpoint_layers, pack_attention, packed_inputs, tile_mlps, use_liger
from sgpo.model.sequence_parallel import SequenceParallel


class LossHead(nn.Module):
    """Holds the output weight so that its own forward, not a product with all rows, is where the loss is formed.

    Being a module matters under ZeRO-3: the engine gathers a module's parameters around its forward and backward.
    """

    def __init__(self, output: nn.Module) -> None:
        super().__init__()
        self.weight = output.weight
        self.bias = getattr(output, "bias", None)

    def forward(self, loss: Callable[..., Any], *rows: Any) -> Any:
        """loss(head weight, head bias or None, *rows): where SgpoLoss is called."""
        return loss(self.weight, self.bias, *rows)


class PolicyModel(nn.Module):
    """Backbone and head of `lm`. Every method takes int64 ids [B, T] and flat row indices [N].

    Args:
        packed: rows hold several sequences each ([1, T], with their lengths) in place of one padded sequence.
        activation_offload: checkpoints (which it needs) wait for backward on the host.
        mlp_tile_tokens: tokens that an MLP takes at a time; None: all.
        liger: "auto", "on" or "off", see `sgpo.model.activations.use_liger`.
        parallel: the ranks that share every forward pass of `lm`; all of its calls are then collective among them.
    """

    def __init__(
        self,
        lm: Any,
        *,
        packed: bool = False,
        gradient_checkpointing: bool = False,
        activation_offload: bool = False,
        mlp_tile_tokens: int | None = None,
        liger: str = "off",
        parallel: SequenceParallel | None = None,
    ) -> None:
        super().__init__()
        self.lm = lm
        self.head = LossHead(lm.get_output_embeddings())
        self.packed = packed
        self._parallel = parallel
        self._pick: Callable[[torch.Tensor], torch.Tensor] | None = None
        lm.config.use_cache = False
        if packed and parallel is None:
            pack_attention(lm)
        use_liger(lm, liger)
        if gradient_checkpointing:
            checkpoint_layers(lm, offload=activation_offload)
        if mlp_tile_tokens is not None:
            tile_mlps(lm, mlp_tile_tokens)
        if isinstance(norm := getattr(lm.base_model, "norm", None), nn.Module):
            norm.register_forward_pre_hook(self._select)

    @property
    def shared_by(self) -> int:
        """Number of ranks that share a forward pass."""
        return 1 if self._parallel is None else self._parallel.size

    def hidden(self, input_ids: torch.Tensor, rows: torch.Tensor, lengths: Sequence[int] | None = None) -> torch.Tensor:
        """Last hidden states [N, H] of the selected positions.

        The final norm runs on them alone, so no other state outlives the last layer. `lengths`: of the sequences in a
        packed row; None: each row is one sequence, padded on the right.
        """
        if self._parallel is not None:
            input_ids, arguments, pick = self._parallel.share(input_ids, rows, lengths)
        else:
            arguments = {} if lengths is None else packed_inputs(self.lm, lengths, input_ids.device)
            pick = partial(_selected, rows)
        self._pick = pick
        try:
            states = self.lm.base_model(input_ids=input_ids, use_cache=False, **arguments).last_hidden_state
            return states if self._pick is None else pick(states)
        finally:
            self._pick = None

    def _select(self, _: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Before the final norm: the selected rows of [B, T, H]."""
        if self._pick is None:  # somebody else calls the backbone
            return arguments
        pick, self._pick = self._pick, None
        return (pick(arguments[0]), *arguments[1:])

    def forward(self, loss: Callable[..., Any], micro_batch: Any) -> Any:
        """loss(head weight [V, H], head bias or None, hidden rows, teacher's hidden rows or None, micro_batch).

        The rows are those of micro_batch.student and .teacher (sgpo.engine.batching); the teacher's carry no gradient.
        """
        batch, teacher, teacher_hidden = micro_batch.student, micro_batch.teacher, None
        if teacher is not None:
            with torch.no_grad():
                teacher_hidden = self.hidden(teacher.input_ids, teacher.rows, teacher.lengths)
        return self.head(loss, self.hidden(batch.input_ids, batch.rows, batch.lengths), teacher_hidden, micro_batch)


def _selected(rows: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Rows [N, H] of [B, T, H]."""
    return states.flatten(0, 1)[rows]
