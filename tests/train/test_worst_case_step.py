"""The worst-case step: which sequences it is made of, and what is said where they do not fit."""

import pytest
import torch

from sgpo.builders.loss import training_loss
from sgpo.config import Config
from sgpo.train.worst_case_step import longest_micro_batch, wants_worst_case, worst_case_step
from sgpo.types import PromptPair, SgpoError

PROMPTS = [PromptPair((1, 2), (1, 2, 3)), PromptPair((1, 2, 3), (4,) * 6), PromptPair((1,), None)]


def config_of(tokens=100, n_guided=2, **algorithm):
    return Config.model_validate(
        {"model": {"path": "builtin"}, "data": {"train": "builtin"}, "engine": {"micro_batch_tokens": tokens},
         "rollout": {"engine": "hf", "n_auto": 2, "n_guided": n_guided, "max_new_tokens": 10}, "algorithm": algorithm}
    )  # fmt: skip


def test_it_fills_a_micro_batch_with_the_longest_sequences():
    sequences = longest_micro_batch(config_of(), PROMPTS, pad_id=0)
    assert len(sequences) == 6  # 100 tokens hold six of 6 + 10
    assert {len(s.completion_ids) for s in sequences} == {10}
    assert {s.prompt_ids for s in sequences} == {(1, 2, 3)}
    assert [s.teacher_prompt_ids for s in sequences] == [None] * 5 + [(4,) * 6]
    assert all(s.is_live for s in sequences)
    assert max(s.length for s in sequences) * 6 <= 100


@pytest.mark.parametrize(
    ("algorithm", "targets", "teachers"),
    [({"distillation": "sft"}, 1, 0), ({"method": "grpo"}, 0, 0), ({"method": "luffy"}, 1, 0), ({}, 1, 1)],
)
def test_it_holds_what_the_method_trains_on(algorithm, targets, teachers):
    guided = 0 if "method" in algorithm else 2
    sequences = longest_micro_batch(config_of(n_guided=guided, **algorithm), PROMPTS, pad_id=0)
    assert sum(s.distill_weight > 0 for s in sequences) == targets
    assert sum(s.teacher_prompt_ids is not None for s in sequences) == teachers


def test_a_sequence_longer_than_the_budget_still_goes_alone():
    assert len(longest_micro_batch(config_of(tokens=5), PROMPTS, pad_id=0)) == 1


def test_where_it_does_not_fit_the_knobs_are_named():
    class Full:
        device = torch.device("cpu")

        def dry_step(self, loss, micro_batches):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(SgpoError, match=r"longest micro-batch .*lower engine\.micro_batch_tokens"):
        worst_case_step(Full(), training_loss(config_of()), config_of(), PROMPTS, pad_id=0)


def test_by_default_it_runs_on_a_gpu_alone():
    asked = config_of().model_copy(update={"plan": config_of().plan.model_copy(update={"worst_case_step": True})})
    assert wants_worst_case(asked, torch.device("cpu"))
    assert not wants_worst_case(config_of(), torch.device("cpu"))
    assert wants_worst_case(config_of(), torch.device("cuda"))
