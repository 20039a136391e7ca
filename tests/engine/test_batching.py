"""Micro-batches: the rows that predict the completion's tokens, padding that changes nothing, the token budget."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sgpo.data.builtin import make_model, vocabulary
from sgpo.engine.batching import collate, collate_training, first_fit, grouped, length_sorted
from sgpo.model.policy import PolicyModel
from sgpo.types import TrainSequence

PAD, VOCAB = 0, len(vocabulary())


def ids(seed, count):
    return tuple(torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


PROMPTS = [ids(1, 5), ids(2, 1), ids(3, 9), ids(4, 2)]
COMPLETIONS = [ids(5, 3), ids(6, 7), ids(7, 1), ids(8, 4)]


@pytest.fixture(scope="module")
def model():
    return PolicyModel(make_model(seed=0, hidden=32, layers=2).eval()).requires_grad_(False)


def unpadded(model, prompt, completion):
    """Hidden states that predict the completion, from a forward of this sequence alone."""
    states = model.lm.base_model(input_ids=torch.tensor([[*prompt, *completion]])).last_hidden_state[0]
    return states[len(prompt) - 1 : len(prompt) + len(completion) - 1]


def test_rows_and_targets_by_hand():
    batch = collate([(7, 8), (9,)], [(4,), (5, 6, 3)], PAD)
    assert batch.input_ids.tolist() == [[7, 8, 4, PAD], [9, 5, 6, 3]]
    assert batch.rows.tolist() == [1, 4, 5, 6]
    assert batch.labels.tolist() == [4, 5, 6, 3]
    assert {t.dtype for t in (batch.input_ids, batch.rows, batch.labels)} == {torch.int64}


def test_a_target_is_the_token_after_its_row():
    batch = collate(PROMPTS, COMPLETIONS, PAD)
    assert torch.equal(batch.input_ids.flatten()[batch.rows + 1], batch.labels)
    assert batch.labels.tolist() == [token for completion in COMPLETIONS for token in completion]


def test_rows_are_those_of_an_unpadded_forward(model):
    batch = collate(PROMPTS, COMPLETIONS, PAD)
    found = model.hidden(batch.input_ids, batch.rows).split([len(c) for c in COMPLETIONS])
    for hidden, prompt, completion in zip(found, PROMPTS, COMPLETIONS, strict=True):
        torch.testing.assert_close(hidden, unpadded(model, prompt, completion), rtol=1e-4, atol=1e-5)


def test_what_stands_in_the_padding_changes_no_row(model):
    batch = collate(PROMPTS, COMPLETIONS, PAD)
    other = batch.input_ids.clone()
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        length = len(prompt) + len(completion)
        other[row, length:] = torch.arange(3, 3 + other.shape[1] - length)
    assert not torch.equal(other, batch.input_ids)
    assert torch.equal(model.hidden(batch.input_ids, batch.rows), model.hidden(other, batch.rows))


def test_the_padding_id_may_be_a_real_token():
    """A tokenizer without a pad token pads with EOS, which also ends the completions."""
    plain, with_eos = collate(PROMPTS, COMPLETIONS, PAD), collate(PROMPTS, COMPLETIONS, COMPLETIONS[0][-1])
    assert torch.equal(plain.rows, with_eos.rows)
    assert torch.equal(plain.labels, with_eos.labels)


def test_no_sequence_at_all_is_one_padding_token_without_rows(model):
    batch = collate([], [], PAD)
    assert batch.input_ids.tolist() == [[PAD]]
    assert batch.rows.dtype == batch.labels.dtype == torch.int64
    assert model.hidden(batch.input_ids, batch.rows).shape == (0, 32)
    for with_teacher in (False, True):
        micro = collate_training([], PAD, with_teacher=with_teacher)
        sizes = [len(t) for t in (micro.student.rows, micro.advantages, micro.policy_weight, micro.distill_weight)]
        assert sizes == [0, 0, 0, 0]
        assert micro.old_logprobs is None
        assert (micro.teacher is not None) == with_teacher
        assert micro.tokens == 1 + with_teacher


def test_prompts_and_completions_must_pair_up():
    with pytest.raises(ValueError):
        collate([(1,)], [(2,), (3,)], PAD)


@given(st.lists(st.integers(1, 40), max_size=25), st.integers(1, 100))
def test_groups_stay_within_the_budget_and_lose_nothing(lengths, budget):
    groups = length_sorted(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= budget
    longest = [max(lengths[i] for i in group) for group in groups]
    assert longest == sorted(longest, reverse=True)
    assert groups == length_sorted(lengths, budget)


def test_groups_by_hand():
    assert length_sorted([2, 5, 5, 3, 2, 9], 10) == [[5], [1, 2], [3, 0, 4]]
    assert length_sorted([4, 4, 4], 8) == [[0, 1], [2]]  # ties keep their order
    assert length_sorted([30, 4], 8) == [[0], [1]]  # longer than the budget: alone
    assert length_sorted([], 8) == []


@given(st.lists(st.integers(1, 40), max_size=25), st.integers(1, 100))
def test_packed_groups_stay_within_the_budget_and_lose_nothing(lengths, budget):
    groups = first_fit(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in group) for group in groups]
    assert all(total <= budget or len(group) == 1 for total, group in zip(sums, groups, strict=True))
    for k, group in enumerate(groups):  # nothing that begins a group would have found room in an earlier one
        earlier = [sum(lengths[i] for i in other if lengths[i] >= lengths[group[0]]) for other in groups[:k]]
        assert all(total + lengths[group[0]] > budget for total in earlier)


def test_packed_groups_by_hand():
    assert first_fit([2, 5, 5, 3, 2, 9], 10) == [[5], [1, 2], [3, 0, 4]]
    assert first_fit([4, 4, 4], 8) == [[0, 1], [2]]
    assert first_fit([6, 3, 4, 7], 10) == [[3, 1], [0, 2]]  # a sum of exactly the budget fits
    assert first_fit([30, 4], 8) == [[0], [1]]
    assert grouped([1, 6, 6, 1], 8, packed=True) == [[1, 0, 3], [2]]
    assert grouped([1, 6, 6, 1], 8, packed=False) == [[1], [2], [0, 3]]


def test_the_padded_batch_of_a_group_is_within_the_budget():
    sequences = [
        TrainSequence(p, c, distill_weight=1.0, teacher_prompt_ids=ids(i, 6))
        for i, (p, c) in enumerate(zip(PROMPTS * 3, COMPLETIONS * 3, strict=True))
    ]
    for group in length_sorted([s.length for s in sequences], 40):
        micro = collate_training([sequences[i] for i in group], PAD, with_teacher=True)
        assert micro.student.input_ids.numel() <= 40
        assert micro.teacher.input_ids.numel() <= 40
        assert micro.tokens == micro.student.input_ids.numel() + micro.teacher.input_ids.numel()


def policy(i, **fields):
    return TrainSequence(PROMPTS[i], COMPLETIONS[i], **{"advantage": 1.5 - i, "policy_weight": 0.1 + i, **fields})


def target(i, **fields):
    return TrainSequence(
        PROMPTS[i],
        COMPLETIONS[i],
        **{"distill_weight": 0.2 + i, "teacher_prompt_ids": ids(20 + i, 3 + 4 * i), **fields},
    )


MIXED = [target(0), policy(1), target(2), policy(3)]  # kinds interleaved on purpose


def test_policy_rows_come_first_and_weights_stand_beside_their_rows(model):
    micro = collate_training(MIXED, PAD, with_teacher=True)
    tokens = [len(MIXED[i].completion_ids) for i in (1, 3, 0, 2)]
    assert micro.student.labels.tolist() == [t for i in (1, 3, 0, 2) for t in COMPLETIONS[i]]
    assert micro.advantages.tolist() == [0.5] * tokens[0] + [-1.5] * tokens[1]
    assert micro.policy_weight.tolist() == pytest.approx([1.1] * tokens[0] + [3.1] * tokens[1])
    assert micro.distill_weight.tolist() == pytest.approx([0.2] * tokens[2] + [2.2] * tokens[3])
    assert {t.dtype for t in (micro.advantages, micro.policy_weight, micro.distill_weight)} == {torch.float32}
    hidden = model.hidden(micro.student.input_ids, micro.student.rows).split(tokens)
    for found, i in zip(hidden, (1, 3, 0, 2), strict=True):
        torch.testing.assert_close(found, unpadded(model, PROMPTS[i], COMPLETIONS[i]), rtol=1e-4, atol=1e-5)


def test_teacher_rows_are_in_the_order_of_the_target_rows(model):
    micro = collate_training(MIXED, PAD, with_teacher=True)
    assert micro.teacher.labels.tolist() == [*COMPLETIONS[0], *COMPLETIONS[2]]
    assert micro.teacher.labels.tolist() == micro.student.labels[len(micro.advantages) :].tolist()
    hidden = model.hidden(micro.teacher.input_ids, micro.teacher.rows).split([len(COMPLETIONS[i]) for i in (0, 2)])
    for found, i in zip(hidden, (0, 2), strict=True):
        wanted = unpadded(model, MIXED[i].teacher_prompt_ids, COMPLETIONS[i])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_without_a_teacher_the_target_rows_remain():
    micro = collate_training(MIXED, PAD, with_teacher=False)
    assert micro.teacher is None
    assert len(micro.distill_weight) == len(COMPLETIONS[0]) + len(COMPLETIONS[2])


def test_a_teacher_batch_is_made_where_another_rank_needs_one():
    micro = collate_training([policy(1)], PAD, with_teacher=True)
    assert len(micro.teacher.rows) == 0
    assert micro.teacher.input_ids.shape == (1, 1)


@pytest.mark.parametrize("dead", [{"advantage": 0.0}, {"policy_weight": 0.0}])
def test_sequences_that_carry_no_loss_have_no_rows(dead):
    micro = collate_training([policy(0, **dead), policy(1)], PAD, with_teacher=False)
    assert micro.student.labels.tolist() == list(COMPLETIONS[1])
    assert len(micro.advantages) == len(COMPLETIONS[1])


def test_a_sequence_of_both_kinds_has_its_rows_twice():
    micro = collate_training([policy(0, distill_weight=0.5, teacher_prompt_ids=ids(9, 2))], PAD, with_teacher=True)
    assert micro.student.labels.tolist() == [*COMPLETIONS[0], *COMPLETIONS[0]]
    assert micro.student.rows[:3].tolist() == micro.student.rows[3:].tolist() == [4, 5, 6]


def test_old_logprobs_stand_beside_their_rows():
    old = {i: tuple(-0.1 * i - 0.01 * t for t in range(len(COMPLETIONS[i]))) for i in (1, 3)}
    sequences = [target(0), policy(1, old_logprobs=old[1]), policy(2, advantage=0.0), policy(3, old_logprobs=old[3])]
    micro = collate_training(sequences, PAD, with_teacher=True)
    assert micro.old_logprobs.tolist() == pytest.approx([*old[1], *old[3]])
    assert micro.old_logprobs.dtype == torch.float32
    assert collate_training(MIXED, PAD, with_teacher=True).old_logprobs is None


def test_importance_multiplies_the_policy_weight_of_its_own_row_and_nothing_else():
    weights = tuple(0.5 + t for t in range(len(COMPLETIONS[1])))
    plain = [target(0), policy(1), policy(2, advantage=0.0), policy(3)]
    weighted = [target(0), policy(1, importance=weights), policy(2, advantage=0.0), policy(3)]
    before, after = (collate_training(sequences, PAD, with_teacher=True) for sequences in (plain, weighted))
    split = len(weights)
    assert after.policy_weight[:split].tolist() == pytest.approx(
        [w * x for w, x in zip(weights, before.policy_weight[:split].tolist(), strict=True)]
    )
    assert torch.equal(after.policy_weight[split:], before.policy_weight[split:])
    assert torch.equal(after.distill_weight, before.distill_weight)
    assert torch.equal(after.student.rows, before.student.rows)


def test_policy_rows_without_old_logprobs_beside_rows_that_have_them_are_refused():
    """A missing old log-prob is not log 1: the ratio would be the probability itself."""
    with pytest.raises(ValueError, match="old_logprobs"):
        collate_training([policy(1, old_logprobs=(-1.0,) * 7), policy(3)], PAD, with_teacher=False)


def test_a_distilled_sequence_without_a_teacher_prompt_is_refused():
    """Its first row would be the one before the batch, which is the last one."""
    with pytest.raises(ValueError, match="teacher"):
        collate_training([target(0, teacher_prompt_ids=None)], PAD, with_teacher=True)


def test_moving_a_batch_keeps_its_parts():
    micro = collate_training(MIXED, PAD, with_teacher=True)
    moved = micro.to(torch.device("cpu"))
    assert torch.equal(moved.student.rows, micro.student.rows)
    assert torch.equal(moved.teacher.input_ids, micro.teacher.input_ids)
    assert moved.old_logprobs is None
    assert moved.tokens == micro.tokens
