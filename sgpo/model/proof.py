"""Before a model is trained: are the log-probs that the trainer computes from its hidden states the model's own?

No list of families can say. Two short sequences of random ids go through the whole model as it was loaded, alone and in
float32; what is between the head's products and its logits (a scale, a soft-cap, columns cut or closed) is measured,
and given to the losses if they can do it. Then every change that the trainer makes to the model is held against the
same log-probs: rows of several sequences, checkpoints, tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from sgpo.algorithm.loss import PLAIN, LabelLogprobs, LogitTransform
from sgpo.types import SgpoError

_LONG, _SHORT = 13, 7  # tokens of the two sequences
_LIMIT = 1e-4  # nats between two exact ways in float32
_NOISE = 8  # or so many times what the model's own rounding makes of a log-prob
_LOUD, _CAPPED = 1e4, 1e3  # logits of this size must come out as such; below the second number they were capped
_CLOSED = -1e4  # a column whose logits are all below it has no probability
_FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")  # no float32
_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, ImportError)


class Proof:
    """What `lm` itself says of two sequences; made before anything in it is changed, on the device where it will run.

    Raises SgpoError where its forward pass fails, or is not the same twice.
    """

    @torch.no_grad()
    def __init__(self, lm: Any) -> None:
        self._lm, self.family = lm, lm.config.get_text_config().model_type
        if lm.get_output_embeddings() is None:
            raise SgpoError(f"{self.family} has no output matrix: it is no language model that can be trained here")
        generator = torch.Generator().manual_seed(0)
        ids = _ordinary_ids(lm, _LONG + _SHORT, generator).to(lm.device)
        self._sequences = ids[:_LONG], ids[_LONG:]
        with self._named("as it is"), in_float32(lm):
            own = [self._logits(ids[None])[0] for ids in self._sequences]
            again = self._logits(self._sequences[0].expand(2, -1))[1]
            self._own_NV = torch.cat(own)
            self._closed_V = self._own_NV.amax(0) < _CLOSED
            open_NV = self._own_NV[:, ~self._closed_V]
            self._loud_V = self._loud_logits(float(open_NV.abs().amax()))
        if not open_NV.isfinite().all():
            raise SgpoError(
                f"the logits of {self.family} for random tokens are not finite: its weights hold NaN or infinity, or "
                "its activations overflow; check the checkpoint"
            )
        drawn = torch.randint(open_NV.shape[1], (len(ids),), generator=generator).to(ids.device)
        self._labels = torch.cat([(~self._closed_V).nonzero()[drawn, 0], self._own_NV.argmax(1)])
        self._logprobs = self._of_labels(self._own_NV)
        spread = float((self._of_labels(torch.cat([again, own[1]])) - self._logprobs).abs().amax())
        if not spread <= 100 * _LIMIT and _exact(lm):
            raise SgpoError(
                f"two forward passes of {self.family} over the same tokens differ by {spread:.2g} nats: dropout or "
                "noise that stays on outside of training; such a model cannot be trained"
            )
        self._limit = max(_LIMIT, _NOISE * spread)

    @torch.no_grad()
    def measure_logits(self, model: Any) -> None:
        """Sets `model.head` to what lies between its products and the logits; then one sequence alone must be right."""
        ids, rows, lengths = self._alone()
        with self._named("as it is"), in_float32(model):
            model.hidden(ids, rows, lengths)  # the first pass finds where rows are picked, the second one picks them
            products_NV = model.head(_products, model.hidden(ids, rows, lengths)).double()
        own_NV = self._own_NV[: len(rows)].double()
        columns = own_NV.shape[1]
        if columns > products_NV.shape[1]:
            raise SgpoError(
                f"{self.family} has {columns} logits, but an output matrix of {products_NV.shape[1]} rows: such a "
                "model cannot be trained here"
            )
        closed_V = self._closed_V
        transform = _fitted(products_NV[:, :columns][:, ~closed_V], own_NV[:, ~closed_V], self._loud_V[~closed_V])
        model.head.become(transform, columns, closed_V if closed_V.any() else None)
        gap = self._gap(model, ids, rows, lengths, slice(0, len(rows)))
        if not gap <= self._limit:
            raise SgpoError(
                f"the logits of {self.family} are not its last hidden states times its output matrix, nor a scale or "
                f"soft-cap of that: log-probs would be wrong by up to {gap:.2g} nats (rounding: "
                f"{self._limit:.1g}); such a model cannot be trained here"
            )

    @torch.no_grad()
    def check(self, model: Any, knob: str, instead: str) -> None:
        """Raises SgpoError, in the words of the knob, where `model` is not what it was before it was turned."""
        long, short = self._sequences
        if model.packed or model.shared_by > 1:
            ids, lengths = torch.cat([long, short])[None], (_LONG, _SHORT)
            rows = torch.arange(_LONG + _SHORT, device=ids.device)
        else:
            padding = long.new_full((_LONG - _SHORT,), _pad_id(self._lm))
            ids, lengths = torch.stack([long, torch.cat([short, padding])]), None
            rows = torch.arange(_LONG + _SHORT, device=ids.device)
        with self._named(knob):
            gap = self._gap(model, ids, rows, lengths, slice(None))
        limit = self._limit if _exact(model.lm) else max(self._limit, self._rounding())
        if not gap <= limit:
            raise SgpoError(
                f"{knob} changes what {self.family} computes: log-probs would be wrong by up to {gap:.2g} nats "
                f"(rounding: {limit:.1g}); {instead}"
            )

    def _alone(self) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...] | None]:
        ids = self._sequences[0]
        return ids[None], torch.arange(_LONG, device=ids.device), None

    def _gap(self, model: Any, ids: torch.Tensor, rows: torch.Tensor, lengths: Any, which: slice) -> float:
        """The largest difference of log-probs of two labels a row; infinite or NaN where they are not finite."""
        labels, own = (x.view(2, -1)[:, which].flatten() for x in (self._labels, self._logprobs))
        with in_float32(model):
            hidden = model.hidden(ids, rows, lengths)
            found = model.head(LabelLogprobs(impl="torch"), hidden.repeat(2, 1), None, SimpleNamespace(labels=labels))
        return float((found - own).abs().amax())

    def _rounding(self) -> float:
        """What the dtype of the weights makes of the log-probs, where attention knows no float32."""
        found = torch.cat([self._logits(ids[None])[0] for ids in self._sequences])
        return 4 * float((self._of_labels(found) - self._logprobs).abs().amax())

    def _logits(self, ids: torch.Tensor) -> torch.Tensor:
        """The model's own, [B, T, V] in float32 or wider."""
        logits = self._lm(input_ids=ids, use_cache=False).logits
        return logits if logits.dtype == torch.float64 else logits.float()

    def _loud_logits(self, largest: float) -> torch.Tensor:
        """The largest |logit| of each column, [V], where the head is given so much that they would reach _LOUD."""
        factor, calls = _LOUD / max(largest, 1e-6), []

        def louder(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            calls.append(True)
            return (arguments[0] * factor, *arguments[1:])

        handle = self._lm.get_output_embeddings().register_forward_pre_hook(louder)
        try:
            loud_V = self._logits(self._sequences[0][None])[0].abs().amax(0)
        finally:
            handle.remove()
        if len(calls) != 1:
            raise SgpoError(f"{self.family} calls its output layer {len(calls)} times for one forward pass, not once")
        return loud_V

    def _of_labels(self, logits_NV: torch.Tensor) -> torch.Tensor:
        """Log-probs [2 N] of two labels a row."""
        logprobs_NV = logits_NV.double().log_softmax(1)
        return logprobs_NV.gather(1, self._labels.view(2, -1).T).T.flatten()

    @contextmanager
    def _named(self, how: str) -> Iterator[None]:
        """A failure inside the model's code, as a sentence."""
        try:
            yield
        except (SgpoError, torch.OutOfMemoryError):
            raise
        except _FAILURES as error:
            what = str(error).strip().splitlines() or [""]
            raise SgpoError(
                f"{self.family} cannot be trained ({how}): its code fails with {type(error).__name__}: {what[0]}"
            ) from error


def _fitted(products_NV: torch.Tensor, own_NV: torch.Tensor, loud_V: torch.Tensor) -> LogitTransform:
    """scale and cap of own = cap tanh(scale products / cap), float64. Whether they are right is for others to see."""
    cap = float(loud_V.amax())
    softcap = cap if cap < _CAPPED else None
    if softcap is not None:  # what is nearly the cap tells nothing of the scale
        inner = own_NV.abs() < 0.9 * softcap
        products_NV, own_NV = products_NV[inner], softcap * (own_NV[inner] / softcap).atanh()
    scale = float((products_NV * own_NV).sum() / (products_NV * products_NV).sum())
    scale = 1.0 if abs(scale - 1) < 1e-5 or not scale > 0 else scale
    return PLAIN if scale == 1.0 and softcap is None else LogitTransform(scale, softcap)


def _products(weight: torch.Tensor, bias: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(hidden, weight, None if bias is None else bias.to(weight.dtype))


@contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """Modules of narrower weights compute in float32, each widened while it runs: no second copy of the model exists.
    Not where the attention takes no float32."""
    narrow = (torch.bfloat16, torch.float16)
    held: dict[nn.Parameter, torch.Tensor] = {}

    def widen(module: nn.Module, _: Any) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.dtype in narrow:
                held[parameter] = parameter.data
                parameter.data = parameter.data.float()

    def restore(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter in held:
                parameter.data = held.pop(parameter)

    modules = [m for m in model.modules() if any(p.dtype in narrow for p in m.parameters(recurse=False))]
    if not _exact(getattr(model, "lm", model)):
        modules = []
    hooks = [m.register_forward_pre_hook(widen, prepend=True) for m in modules]
    hooks += [m.register_forward_hook(restore, always_call=True) for m in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, data in held.items():
            parameter.data = data


def _exact(lm: Any) -> bool:
    return lm.config.get_text_config()._attn_implementation not in _FLASH


def _ordinary_ids(lm: Any, count: int, generator: torch.Generator) -> torch.Tensor:
    """Random ids [count] that stand for nothing special: no image, no padding."""
    special = {value for name, value in _entries(lm.config.to_dict()) if name.endswith(("_token_id", "_token_index"))}
    ids = torch.arange(min(lm.get_input_embeddings().weight.shape[0], 2**20))
    ids = ids[~torch.isin(ids, torch.tensor(sorted(special), dtype=torch.int64))] if special else ids
    return ids[torch.randint(len(ids), (count,), generator=generator)]


def _entries(settings: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """(name, integer) of a config and of those nested in it; a list gives each of its integers."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _entries(value)
        else:
            yield from ((name, v) for v in (value if isinstance(value, list) else [value]) if isinstance(v, int))


def _pad_id(lm: Any) -> int:
    pad = lm.config.get_text_config().pad_token_id
    return pad if isinstance(pad, int) and 0 <= pad < lm.get_input_embeddings().weight.shape[0] else 0
