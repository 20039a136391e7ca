"""From completions to padded micro-batches under a token budget, with the rows that the loss reads.

The hidden state at position t predicts token t + 1, so a completion of C tokens after a prompt of L tokens reads the
rows L - 1 .. L + C - 2. Sequences are padded on the right and attention is causal: padding changes no real row, and no
attention mask is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sgpo.schema import TrainSequence


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """input_ids [B, T] int64; rows [N] int64 into the flattened [B * T] positions; targets [N] int64."""

    input_ids: torch.Tensor
    rows: torch.Tensor
    targets: torch.Tensor


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward and backward. Row vectors of the two kinds of completion, both into `student.input_ids`.

    policy_* [N_p] and target_* [N_t]; advantages and weights fp32. `teacher` holds the distilled completions after
    their guided prompts, its rows in the order of `target_rows`; None where nothing is distilled.
    """

    input_ids: torch.Tensor
    policy_rows: torch.Tensor
    policy_targets: torch.Tensor
    advantages: torch.Tensor
    policy_weight: torch.Tensor
    old_logprobs: torch.Tensor | None
    target_rows: torch.Tensor
    target_targets: torch.Tensor
    target_weight: torch.Tensor
    teacher: TokenBatch | None

    @property
    def tokens(self) -> int:
        return self.input_ids.numel() + (self.teacher.input_ids.numel() if self.teacher else 0)


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


def collate(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_id: int) -> TokenBatch:
    """Pads prompt + completion on the right and lists the rows that predict completion tokens."""
    width = max(len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True))
    input_ids = torch.full((len(prompts), width), pad_id, dtype=torch.int64)
    rows, targets = [], []
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        ids = torch.tensor([*prompt, *completion], dtype=torch.int64)
        input_ids[index, : len(ids)] = ids
        first = index * width + len(prompt) - 1
        rows.append(torch.arange(first, first + len(completion)))
        targets.append(ids[len(prompt) :])
    return TokenBatch(input_ids, torch.cat(rows), torch.cat(targets))


def collate_training(sequences: Sequence[TrainSequence], pad_id: int) -> MicroBatch:
    """Builds the micro-batch of some live sequences. All of them or none carry `old_logprobs`."""
    student = collate([s.prompt_ids for s in sequences], [s.completion_ids for s in sequences], pad_id)
    lengths = torch.tensor([len(s.completion_ids) for s in sequences])

    def per_row(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32).repeat_interleave(lengths)

    policy_weight = per_row([s.policy_weight if s.advantage else 0.0 for s in sequences])
    target_weight = per_row([s.target_weight for s in sequences])
    policy, target = policy_weight != 0, target_weight != 0
    old = [s.old_logprobs for s in sequences]
    old_logprobs = None
    if any(o is not None for o in old):
        filled = [o if o is not None else (0.0,) * len(s.completion_ids) for o, s in zip(old, sequences, strict=True)]
        old_logprobs = torch.tensor([x for row in filled for x in row], dtype=torch.float32)[policy]
    distilled = [s for s in sequences if s.target_weight and s.teacher_prompt_ids is not None]
    teacher = None
    if distilled:
        prompts = [s.teacher_prompt_ids for s in distilled if s.teacher_prompt_ids is not None]
        teacher = collate(prompts, [s.completion_ids for s in distilled], pad_id)
    return MicroBatch(
        input_ids=student.input_ids,
        policy_rows=student.rows[policy],
        policy_targets=student.targets[policy],
        advantages=per_row([s.advantage for s in sequences])[policy],
        policy_weight=policy_weight[policy],
        old_logprobs=old_logprobs,
        target_rows=student.rows[target],
        target_targets=student.targets[target],
        target_weight=target_weight[target],
        teacher=teacher,
    )
