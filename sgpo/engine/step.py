"""One optimizer step from training sequences, and scoring without gradient: what warm-up and training share.

Under ZeRO-3 a forward pass is a collective, so all ranks agree beforehand on the number of micro-batches and on which
of them have a teacher pass; a rank without work of its own joins in with an empty micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from sgpo.algorithm.loss import LabelLogprobs
from sgpo.engine.batching import Contexts, MicroBatch, collate, collate_training, grouped
from sgpo.engine.not_finite import name_not_finite, nan_if_not_finite, prompt_length
from sgpo.engine.zero import MicroBatchLoss, ZeroEngine
from sgpo.types import SgpoError, TrainSequence
from sgpo.utils import distributed


@dataclass(frozen=True, slots=True)
class MicroBatchResult:
    """A micro-batch that went through: its sequences in row order, its statistics (on the device), its tokens."""

    sequences: list[TrainSequence]
    stats: Any
    tokens: int
    padding: int


@dataclass(frozen=True, slots=True)
class StepResult:
    """`grad_norm` is None where no sequence of any rank was live and the optimizer was not stepped, or where the step
    was skipped because something in it was not finite: `skipped` says what."""

    passes: list[MicroBatchResult]
    loss: float
    grad_norm: float | None
    skipped: str | None = None


def optimizer_step(
    engine: ZeroEngine,
    sequences: Sequence[TrainSequence],
    loss: MicroBatchLoss,
    *,
    token_budget: int,
    pad_id: int,
    lr: float,
    non_finite: Literal["stop", "skip"] = "stop",
    name: Callable[[TrainSequence], str] = prompt_length,
) -> StepResult:
    """Accumulates the gradient of all live sequences, micro-batch by micro-batch, and applies it once. Collective.

    Args:
        non_finite: where a log-prob, the loss or the gradient of any rank is not finite, no rank applies the step:
            "stop" raises SgpoError that says where, "skip" returns it.
        name: what a sequence is called there.
    """
    passes: list[MicroBatchResult] = []
    losses: list[torch.Tensor] = []
    live = [sequence for sequence in sequences if sequence.is_live]
    packed, shared_by = engine.model.packed, engine.model.shared_by
    for chosen, micro in micro_batches(
        live, token_budget=token_budget, pad_id=pad_id, packed=packed, shared_by=shared_by
    ):
        micro = micro.to(engine.device)
        value, stats = engine.loss(loss, micro)
        engine.backward(nan_if_not_finite(value, stats))
        losses.append(value.detach())
        passes.append(MicroBatchResult(chosen, stats, micro.tokens, micro.tokens - _real_tokens(chosen, micro)))
    if not passes:
        return StepResult([], 0.0, None)
    norm = engine.step(lr)
    if math.isfinite(norm):
        return StepResult(passes, float(torch.stack(losses).sum()), norm)
    named = [name_not_finite(done.sequences, done.stats, name) for done in passes]
    places = [place for part in distributed.gather(named) for found in part for place in found]
    where = f"{places[0]} ({len(places)} in all)" if places else "no log-prob, but the gradient itself"
    sentence = f"not finite: {where}; the gradient norm is {norm} and the step was not applied"
    if non_finite == "stop":
        raise SgpoError(
            f"{sentence}. The last checkpoint is whole: go on from it with optim.non_finite: skip, which leaves such "
            "steps out, or begin anew with a lower learning rate"
        )
    return StepResult([], 0.0, None, sentence)


def micro_batches(
    sequences: Sequence[TrainSequence], *, token_budget: int, pad_id: int, packed: bool = False, shared_by: int = 1
) -> Iterator[tuple[list[TrainSequence], MicroBatch]]:
    """Micro-batches within the budget, the longest first; as many of them, and of teacher passes, on every rank.

    `shared_by`: so many ranks share each forward pass (sgpo.model.sequence_parallel) and add up their budgets for it.
    """
    lengths = [s.length for s in sequences]
    own = _own_groups(lengths, token_budget, packed=packed, shared_by=shared_by)
    groups = [[sequences[i] for i in group] for group in own]
    teacher_passes = distributed.gather([any(_is_distilled(s) for s in group) for group in groups])
    for k in range(max(len(passes) for passes in teacher_passes)):
        chosen = groups[k] if k < len(groups) else []
        with_teacher = any(k < len(passes) and passes[k] for passes in teacher_passes)
        yield chosen, collate_training(chosen, pad_id, with_teacher=with_teacher, packed=packed)


def _own_groups(lengths: Sequence[int], token_budget: int, *, packed: bool, shared_by: int) -> list[list[int]]:
    """Indices of this rank's sequences in each micro-batch; the ranks that share micro-batches form them together."""
    if shared_by == 1:
        return grouped(lengths, token_budget, packed=packed)
    first = distributed.rank() // shared_by * shared_by
    members = distributed.gather(list(lengths))[first : first + shared_by]
    start = sum(len(member) for member in members[: distributed.rank() - first])
    joint = grouped([length for member in members for length in member], shared_by * token_budget, packed=packed)
    return [[i - start for i in group if start <= i < start + len(lengths)] for group in joint]


def score_contexts(
    engine: ZeroEngine,
    contexts: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    token_budget: int,
    pad_id: int,
    temperature: float = 1.0,
) -> list[list[float]]:
    """log pi(token | prompt, tokens before) of each (prompt ids, completion ids), current weights. Collective."""
    packed = engine.model.packed
    lengths = [len(prompt) + len(completion) for prompt, completion in contexts]
    groups = _own_groups(lengths, token_budget, packed=packed, shared_by=engine.model.shared_by)
    score, scores = LabelLogprobs(temperature), dict[int, list[float]]()
    for k in range(max(distributed.gather(len(groups)))):
        group = groups[k] if k < len(groups) else []
        prompts, completions = [contexts[i][0] for i in group], [contexts[i][1] for i in group]
        batch = collate(prompts, completions, pad_id, packed=packed).to(engine.device)
        logprobs = engine.evaluate(score, Contexts(batch))
        counts = [len(contexts[i][1]) for i in group]
        scores.update(zip(group, (part.tolist() for part in logprobs.split(counts)), strict=True))
    return [scores[i] for i in range(len(contexts))]


def _is_distilled(sequence: TrainSequence) -> bool:
    return sequence.distill_weight != 0.0 and sequence.teacher_prompt_ids is not None


def _real_tokens(sequences: Sequence[TrainSequence], micro: MicroBatch) -> int:
    student = sum(len(s.prompt_ids) + len(s.completion_ids) for s in sequences)
    if micro.teacher is None:
        return student
    return student + sum(len(s.teacher_prompt_ids or ()) + len(s.completion_ids) for s in sequences if _is_distilled(s))
