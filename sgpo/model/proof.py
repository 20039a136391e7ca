"""Before a model is trained: are the log-probs that the trainer computes from its hidden states the model's own?

No list of families can say. Two short sequences of random ids go through the whole model as it was loaded, alone and in
float32; what is between the head's products and its logits (a scale, a soft-cap, columns cut or closed) is measured,
and given to the losses if they can do it. Then every change that the trainer makes to the model is held against the
same log-probs: rows of several sequences, checkpoints, tiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from sgpo.algorithm.loss import PLAIN, LabelLogprobs, LogitTransform
from sgpo.types import SgpoError

_LONG, _SHORT = 13, 7  # tokens of the two sequences
_ALONE = slice(2, _LONG)  # rows of the long sequence by itself: not all, so that selecting them shows
_LIMIT = 1e-4  # nats between two exact ways in float32
_NOISE = 8  # or so many times what the model's own rounding makes of a log-prob
_LOUD, _CAPPED = 1e4, 1e3  # logits of this size must come out as such; below the second number they were capped
_CLOSED = -1e4  # a column whose logits are all below it has no probability
_FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")  # no float32
_NARROW = (torch.bfloat16, torch.float16)
_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, ImportError)


class Proof:
    """What `lm` itself says of two sequences; made before anything in it is changed, on the device where it will run.
    `ordinary_ids` (int64, on the CPU) are the tokens that any text may hold and that have a logit.

    Raises SgpoError where its forward pass fails, or is not the same twice.
    """

    @torch.no_grad()
    def __init__(self, lm: Any) -> None:
        self._lm, self.family = lm, lm.config.get_text_config().model_type
        if lm.get_output_embeddings() is None:
            raise SgpoError(f"{self.family} has no output matrix: it is no language model that can be trained here")
        generator = torch.Generator().manual_seed(0)
        ordinary = _ordinary_ids(lm)
        ids = ordinary[torch.randint(len(ordinary), (_LONG + _SHORT,), generator=generator)].to(lm.device)
        self._sequences = ids[:_LONG], ids[_LONG:]
        self._wide = _knows_float32(lm)
        with self._named("as it is"):
            own = self._own_logits()
            if lm.dtype in _NARROW:  # some code only fails there
                self._logits(self._sequences[0][None])
        with self._named("as it is"), self._precision(lm):
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
        open_V = (~self._closed_V).cpu()
        self.ordinary_ids = ordinary[ordinary < len(open_V)]
        self.ordinary_ids = self.ordinary_ids[open_V[self.ordinary_ids]]
        drawn = self.ordinary_ids[torch.randint(len(self.ordinary_ids), (len(ids),), generator=generator)]
        self._labels = torch.cat([drawn.to(ids.device), self._own_NV.argmax(1)])
        self._logprobs = self._of_labels(self._own_NV)
        spread = float((self._of_labels(torch.cat([again, own[1]])) - self._logprobs).abs().amax())
        if not spread <= 100 * _LIMIT and self._wide:
            raise SgpoError(
                f"two forward passes of {self.family} over the same tokens differ by {spread:.2g} nats: dropout or "
                "noise that stays on outside of training; such a model cannot be trained"
            )
        # Without float32, one rounding of a logit is the least that two exact ways differ by.
        rounding = 0.0 if self._wide else 2 * torch.finfo(lm.dtype).eps * float(open_NV.abs().amax())
        self._limit = max(_LIMIT, _NOISE * spread, rounding)

    @torch.no_grad()
    def measure_logits(self, model: Any) -> None:
        """Sets `model.head` to what lies between its products and the logits; then one sequence alone must be right."""
        with self._named("as it is"), self._precision(model):
            model.hidden(*self._alone())  # the first pass looks for the place where later ones select rows
        try:
            gap = self._measured_gap(model)
        except SgpoError:
            if not model.selects_early:
                raise
            gap = math.inf
        if not gap <= self._limit and model.selects_early:
            model.select_behind_backbone()  # the place was a wrong one
            gap = self._measured_gap(model)
        if not gap <= self._limit:
            raise SgpoError(
                f"the logits of {self.family} are not its last hidden states times its output matrix, nor a scale or "
                f"soft-cap of that: log-probs would be wrong by up to {gap:.2g} nats (rounding: "
                f"{self._limit:.1g}); such a model cannot be trained here"
            )

    def _measured_gap(self, model: Any) -> float:
        with self._named("as it is"), self._precision(model):
            model.head.become(PLAIN, len(model.head.weight), None)
            hidden = model.hidden(*self._alone())
            products_NV = model.head(_products, hidden).double()
        own_NV, columns = self._own_NV[_ALONE].double(), self._own_NV.shape[1]
        if columns > products_NV.shape[1]:
            raise SgpoError(
                f"{self.family} has {columns} logits, but an output matrix of {products_NV.shape[1]} rows: such a "
                "model cannot be trained here"
            )
        closed_V = self._closed_V
        transform = _fitted(products_NV[:, :columns][:, ~closed_V], own_NV[:, ~closed_V], self._loud_V[~closed_V])
        model.head.become(transform, columns, closed_V if closed_V.any() else None)
        with self._precision(model):
            return self._gap(model, hidden, _ALONE)

    @torch.no_grad()
    def check(self, model: Any, knob: str, instead: str) -> None:
        """Raises SgpoError, in the words of the knob, where `model` is not what it was before it was turned."""
        long, short = self._sequences
        if model.packed or model.shared_by > 1:
            ids, lengths = torch.cat([long, short])[None], (_LONG, _SHORT)
            rows = torch.arange(_LONG + _SHORT, device=ids.device)
        else:
            # Any token may stand where padding stands: what is to be scored must not see it.
            ids, lengths = torch.stack([long, torch.cat([short, long[_SHORT:]])]), None
            rows = torch.arange(_LONG + _SHORT, device=ids.device)
        with self._named(knob), self._precision(model):
            gap = self._gap(model, model.hidden(ids, rows, lengths), slice(None))
        limit = self._limit if not self._wide or _knows_float32(model.lm) else max(self._limit, self._rounding())
        if not gap <= limit:
            raise SgpoError(
                f"{knob} changes what {self.family} computes: log-probs would be wrong by up to {gap:.2g} nats "
                f"(rounding: {limit:.1g}); {instead}"
            )

    def _alone(self) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...] | None]:
        ids = self._sequences[0]
        return ids[None], torch.arange(_LONG, device=ids.device)[_ALONE], None

    def _gap(self, model: Any, hidden: torch.Tensor, which: slice) -> float:
        """The largest difference of log-probs of two labels a row; infinite or NaN where they are not finite."""
        labels, own = (x.view(2, -1)[:, which].flatten() for x in (self._labels, self._logprobs))
        rows = SimpleNamespace(labels=labels)
        found = model.head(LabelLogprobs(impl="torch"), hidden.repeat(2, 1), None, rows)
        return float((found - own).abs().amax())

    def _precision(self, model: Any) -> AbstractContextManager[None]:
        """float32, where the model's code and its attention take it."""
        return in_float32(model) if self._wide and _knows_float32(getattr(model, "lm", model)) else nullcontext()

    def _rounding(self) -> float:
        """What the dtype of the weights makes of the log-probs, where attention knows no float32."""
        found = torch.cat([self._logits(ids[None])[0] for ids in self._sequences])
        return 4 * float((self._of_labels(found) - self._logprobs).abs().amax())

    def _own_logits(self) -> list[torch.Tensor]:
        """Of each sequence alone, [T, V]. Some code casts to the dtype of its weights and takes no float32."""
        try:
            with self._precision(self._lm):
                return [self._logits(ids[None])[0] for ids in self._sequences]
        except RuntimeError:
            if not self._wide or all(parameter.dtype not in _NARROW for parameter in self._lm.parameters()):
                raise
        self._wide = False
        return [self._logits(ids[None])[0] for ids in self._sequences]

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
    """The model computes in float32: a layer with narrower weights is widened while it runs, so that no second copy of
    the model exists."""
    held: dict[nn.Parameter, torch.Tensor] = {}

    def widen(module: nn.Module, _: Any) -> None:
        for parameter in module.parameters():
            if parameter.dtype in _NARROW:
                held[parameter] = parameter.data
                parameter.data = parameter.data.float()

    def restore(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters():
            if parameter in held:
                parameter.data = held.pop(parameter)

    def widened(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        return output.float()

    hooks = []
    for module in _layers(model):
        if all(parameter.dtype not in _NARROW for parameter in module.parameters()):
            continue
        if isinstance(module, nn.Embedding):  # a few rows of a large weight
            hooks.append(module.register_forward_hook(widened))
        else:
            hooks.append(module.register_forward_pre_hook(widen, prepend=True))
            hooks.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, data in held.items():
            parameter.data = data


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """What is widened as one: members of a list (a layer's parts read one another's weights), and what is no mere
    container elsewhere."""
    if isinstance(module, nn.ModuleList):
        yield from module
    elif any(True for _ in module.parameters(recurse=False)):
        yield module
    else:
        for part in module.children():
            yield from _layers(part)


def _knows_float32(lm: Any) -> bool:
    return lm.config.get_text_config()._attn_implementation not in _FLASH


def _ordinary_ids(lm: Any) -> torch.Tensor:
    """Ids that stand for nothing special, int64 on the CPU: no image, no padding."""
    special = {value for name, value in _entries(lm.config.to_dict()) if name.endswith(("_token_id", "_token_index"))}
    ids = torch.arange(lm.get_input_embeddings().weight.shape[0])
    return ids[~torch.isin(ids, torch.tensor(sorted(special), dtype=torch.int64))] if special else ids


def _entries(settings: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """(name, integer) of a config and of those nested in it; a list gives each of its integers."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _entries(value)
        else:
            yield from ((name, v) for v in (value if isinstance(value, list) else [value]) if isinstance(v, int))
