"""From completions to micro-batches under a token budget, with the rows that the loss reads.

The hidden state at position t predicts token t + 1, so a completion of C tokens after a prompt of L tokens reads the
rows L - 1 .. L + C - 2. Padded: one sequence a row, padded on the right; attention is causal, so padding changes no
real row, and no attention mask is needed. Packed: all sequences behind one another in one row, no padding; the model
keeps them apart by their lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from sgpo.types import TrainSequence


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """input_ids [B, T] int64; rows [N] int64 into the flattened [B * T] positions; labels [N] int64.

    A row's label is the id that it predicts. `lengths`: of the sequences in a packed row [1, T], which sum to T; None
    where the batch is padded.
    """

    input_ids: torch.Tensor
    rows: torch.Tensor
    labels: torch.Tensor
    lengths: tuple[int, ...] | None = None

    def to(self, device: torch.device) -> TokenBatch:
        """The same batch on another device."""
        return TokenBatch(self.input_ids.to(device), self.rows.to(device), self.labels.to(device), self.lengths)


@dataclass(frozen=True, slots=True)
class Contexts:
    """What goes forward without being learnt: completions after one prompt each, or two (`teacher`: the other)."""

    student: TokenBatch
    teacher: TokenBatch | None = None

    @property
    def labels(self) -> torch.Tensor:
        """The token that each of the student's rows predicts, int64 [N]."""
        return self.student.labels


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward and backward over some sequences.

    `student.rows` lists the N_p rows of the policy loss, then the N_t rows that are distilled or imitated. advantages,
    policy_weight and old_logprobs [N_p] fp32; distill_weight [N_t] fp32. `teacher` holds the distilled completions
    after their guided prompts, its rows in the order of the distilled rows; None where nothing is distilled.
    """

    student: TokenBatch
    advantages: torch.Tensor
    policy_weight: torch.Tensor
    old_logprobs: torch.Tensor | None
    distill_weight: torch.Tensor
    teacher: TokenBatch | None

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch on another device."""
        return MicroBatch(
            self.student.to(device),
            self.advantages.to(device),
            self.policy_weight.to(device),
            None if self.old_logprobs is None else self.old_logprobs.to(device),
            self.distill_weight.to(device),
            None if self.teacher is None else self.teacher.to(device),
        )

    @property
    def labels(self) -> torch.Tensor:
        """The token that each of the student's rows predicts, int64 [N_p + N_t]."""
        return self.student.labels

    @property
    def tokens(self) -> int:
        """Tokens of the forward passes of both contexts, padding included."""
        return self.student.input_ids.numel() + (self.teacher.input_ids.numel() if self.teacher else 0)


def length_sorted(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Groups indices so that rows x longest row stays within `token_budget`; the longest come first.

    An index longer than the budget gets a group of its own. Ties keep their order, so the result is deterministic.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    for index in order:
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= token_budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def first_fit(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Groups indices so that their lengths sum to at most `token_budget`: the longest first, each into the first group
    with room. An index longer than the budget gets a group of its own; the result is deterministic.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        chosen = next((g for g, free in enumerate(room) if free >= lengths[index]), len(groups))
        if chosen == len(groups):
            groups.append([])
            room.append(token_budget)
        groups[chosen].append(index)
        room[chosen] -= lengths[index]
    return groups


def grouped(lengths: Sequence[int], token_budget: int, *, packed: bool) -> list[list[int]]:
    """Indices of each micro-batch: `first_fit` where sequences are packed, else `length_sorted`."""
    return first_fit(lengths, token_budget) if packed else length_sorted(lengths, token_budget)


def collate(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_id: int, *, packed: bool = False
) -> TokenBatch:
    """Joins prompt + completion, one a row and padded on the right or all in one row, and lists the rows that predict
    completion tokens.

    No sequence at all gives one padding token and no rows: the step of a rank that has run out of work.
    """
    joined = [
        torch.tensor([*prompt, *completion], dtype=torch.int64)
        for prompt, completion in zip(prompts, completions, strict=True)
    ] or [torch.tensor([pad_id])]
    lengths = tuple(len(ids) for ids in joined)
    if packed:
        input_ids = torch.cat(joined)[None]
        starts = [sum(lengths[:index]) for index in range(len(lengths))]
    else:
        input_ids = pad_sequence(joined, batch_first=True, padding_value=pad_id)
        starts = [index * max(lengths) for index in range(len(lengths))]
    rows, labels = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
    for start, ids, prompt, completion in zip(starts, joined, prompts, completions, strict=False):
        first = start + len(prompt) - 1
        rows.append(torch.arange(first, first + len(completion)))
        labels.append(ids[len(prompt) :])
    return TokenBatch(input_ids, torch.cat(rows), torch.cat(labels), lengths if packed else None)


def collate_training(
    sequences: Sequence[TrainSequence], pad_id: int, *, with_teacher: bool, packed: bool = False
) -> MicroBatch:
    """Builds the micro-batch of some live sequences, or of none.

    `with_teacher` asks for a teacher batch even where no sequence here is distilled: under ZeRO-3 every rank must make
    the same forward passes.
    """
    student = collate([s.prompt_ids for s in sequences], [s.completion_ids for s in sequences], pad_id, packed=packed)
    lengths = torch.tensor([len(s.completion_ids) for s in sequences], dtype=torch.int64)

    def per_row(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32).repeat_interleave(lengths)

    advantages = per_row([s.advantage for s in sequences])
    policy_weight = per_row([s.policy_weight for s in sequences])
    distill_weight = per_row([s.distill_weight for s in sequences])
    policy, distilled = (policy_weight * advantages) != 0, distill_weight != 0
    if any(s.importance for s in sequences):
        importance = [s.importance or (1.0,) * len(s.completion_ids) for s in sequences]
        policy_weight = policy_weight * torch.tensor([x for row in importance for x in row], dtype=torch.float32)
    old_logprobs = None
    if any(s.old_logprobs for s in sequences):
        if any(s.policy_weight * s.advantage and not s.old_logprobs for s in sequences):
            raise ValueError("old_logprobs are given for some policy sequences of a micro-batch and not for others")
        old = [s.old_logprobs or (0.0,) * len(s.completion_ids) for s in sequences]
        old_logprobs = torch.tensor([x for row in old for x in row], dtype=torch.float32)[policy]
    teacher = None
    if with_teacher:
        taught = [s for s in sequences if s.distill_weight]
        prompts = [s.teacher_prompt_ids or () for s in taught]
        if not all(prompts):
            raise ValueError("a distilled sequence has no teacher_prompt_ids")
        teacher = collate(prompts, [s.completion_ids for s in taught], pad_id, packed=packed)
    return MicroBatch(
        student=TokenBatch(
            student.input_ids,
            torch.cat([student.rows[policy], student.rows[distilled]]),
            torch.cat([student.labels[policy], student.labels[distilled]]),
            student.lengths,
        ),
        advantages=advantages[policy],
        policy_weight=policy_weight[policy],
        old_logprobs=old_logprobs,
        distill_weight=distill_weight[distilled],
        teacher=teacher,
    )
