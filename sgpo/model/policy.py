"""A Hugging Face causal language model as the trainer needs it: hidden states, and a head that never makes logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from sgpo.algorithm.loss import PLAIN, LogitTransform
from sgpo.model.activations import checkpoint_layers, pack_attention, packed_inputs, tile_mlps, use_liger
from sgpo.model.proof import Proof
from sgpo.model.sequence_parallel import SequenceParallel
from sgpo.types import SgpoError


class LossHead(nn.Module):
    """Holds the output weight so that its own forward, not a product with all rows, is where the loss is formed.

    Being a module matters under ZeRO-3: the engine gathers a module's parameters around its forward and backward.
    """

    def __init__(self, output: nn.Module) -> None:
        super().__init__()
        self.weight: Any = output.weight  # the parameter itself
        self.bias: Any = getattr(output, "bias", None)
        self.logits = PLAIN
        self.columns = len(self.weight)
        self.closed: torch.Tensor | None
        self.register_buffer("closed", None, persistent=False)

    def become(self, logits: LogitTransform, columns: int, closed: torch.Tensor | None) -> None:
        """What the model makes of the products: a transform, only the first `columns` of the vocabulary [V], and
        no probability for those of them that are `closed` (bool [columns])."""
        self.logits, self.columns = logits, columns
        if closed is not None:
            self.closed = torch.zeros(columns, device=closed.device).masked_fill_(closed, -torch.inf)

    def forward(self, loss: Callable[..., Any], *rows: Any) -> Any:
        """loss(head weight, head bias or None, *rows): where SgpoLoss is called; with `logits` where the model bends
        or scales its products. Hidden states get the dtype of the weight: some backbones end in float32."""
        weight, bias = self.weight, self.bias
        rows = tuple(x.to(weight.dtype) if isinstance(x, torch.Tensor) else x for x in rows)
        if self.columns < len(weight):
            weight, bias = weight[: self.columns], None if bias is None else bias[: self.columns]
        if self.closed is not None:
            bias = self.closed if bias is None else bias + self.closed
        return loss(weight, bias, *rows) if self.logits == PLAIN else loss(weight, bias, *rows, logits=self.logits)


class PolicyModel(nn.Module):
    """Backbone and head of `lm`. Every method takes int64 ids [B, T] and flat row indices [N].

    Its log-probs are proven to be the model's own (sgpo.model.proof), as loaded and after each change that is asked
    for: SgpoError where one is not, or cannot be made. `lm` should be on the device where it will run.

    Args:
        packed: rows hold several sequences each ([1, T], with their lengths) in place of one padded sequence.
        activation_offload: checkpoints (which it needs) wait for backward on the host.
        mlp_tile_tokens: tokens that an MLP takes at a time; None: all.
        liger: "auto", "on" or "off", see `sgpo.model.activations.use_liger`.
        parallel: makes the ranks that share every forward pass of `lm`; all calls are then collective among them.
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
        parallel: Callable[[Any], SequenceParallel] | None = None,
    ) -> None:
        super().__init__()
        proof = Proof(lm)
        self.lm = lm
        self.ordinary_ids = proof.ordinary_ids
        self.head = LossHead(lm.get_output_embeddings())
        self.packed = False
        self._backbone = [_backbone_of(lm)]  # in a list: lm's parts are not to be listed twice
        self._parallel: SequenceParallel | None = None
        self._pick: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._knows_last_module = False
        self._selects: Any = None
        lm.config.use_cache = False
        proof.measure_logits(self)
        if parallel is not None:
            self._parallel, self.packed = parallel(lm), packed
            proof.check(self, "engine.sequence_parallel_size above 1", "set it to 1")
        elif packed:
            pack_attention(lm)
            self.packed = True
            proof.check(self, "engine.packing: packed", "set engine.packing to padded")
        else:
            proof.check(
                self, "engine.packing: padded", "it sees what follows a token, and only packed rows may be right for it"
            )
        if use_liger(lm, liger):
            proof.check(self, "model.liger", "set it to off")
        if gradient_checkpointing:
            checkpoint_layers(lm, offload=activation_offload)
            proof.check(self, "model.gradient_checkpointing", "set it to false")
        if mlp_tile_tokens is not None:
            tile_mlps(lm, mlp_tile_tokens)
            proof.check(self, "model.mlp_tile_tokens", "leave it out")

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
        arguments = {"input_ids": input_ids, "use_cache": False, **arguments}
        if not self._knows_last_module:
            return pick(self._find_last_module(arguments))
        self._pick = pick
        try:
            states = self._backbone[0](**arguments).last_hidden_state
            return states[0] if self._pick is None else pick(states)
        finally:
            self._pick = None

    def _find_last_module(self, arguments: dict[str, Any]) -> torch.Tensor:
        """All last hidden states [B, T, H] of a pass that looks for the module which makes them, row by row and behind
        all layers: from then on it is given the selected rows alone. Where there is none, rows are selected behind the
        backbone."""
        backbone, calls = self._backbone[0], dict[nn.Module, list[Any]]()

        def note(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            calls.setdefault(module, []).append((given, output))

        hooks = [module.register_forward_hook(note) for module in _outside_of_layers(backbone)]
        try:
            states = backbone(**arguments).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        for module, found in calls.items():
            given, output = found[0]
            if len(found) == 1 and output is states and len(given) == 1 and given[0].shape[:-1] == states.shape[:-1]:
                self._selects = module.register_forward_pre_hook(self._select)
                break
        self._knows_last_module = True
        return states

    @property
    def selects_early(self) -> bool:
        """Whether rows are selected before the last module of the backbone, and not behind it."""
        return self._selects is not None

    def select_behind_backbone(self) -> None:
        """From now on."""
        self._selects.remove()
        self._selects = None

    def _select(self, _: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Before the last module: the selected rows [1, N, H] of [B, T, H]."""
        if self._pick is None:  # somebody else calls the backbone
            return arguments
        pick, self._pick = self._pick, None
        return (pick(arguments[0])[None], *arguments[1:])

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


def _outside_of_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The parts that have no parts themselves; a list holds layers, which a checkpoint may run a second time."""
    parts = list(module.children())
    if not parts:
        yield module
    elif not isinstance(module, nn.ModuleList):
        for part in parts:
            yield from _outside_of_layers(part)


def _backbone_of(lm: Any) -> nn.Module:
    """The part of `lm` that ends with the hidden states: its base model or, where it names none, the model inside."""
    from transformers import PreTrainedModel

    if lm.base_model is not lm:
        return lm.base_model
    inside = [part for part in lm.children() if isinstance(part, PreTrainedModel)]
    if len(inside) != 1:
        raise SgpoError(f"{type(lm).__name__} has no single backbone that gives hidden states; take another model")
    return inside[0]
