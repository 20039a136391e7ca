"""transformers' generate, of families that take no padding on the left or have a cache that cannot be handed on."""

import pytest
import torch

from benchmarks.tiny_models import make_tiny
from sgpo.rollout import hf_engine
from sgpo.rollout.hf_engine import HfEngine
from sgpo.types import RolloutRequest, SamplingParams, SgpoError

PROMPTS = [tuple(range(5, 5 + length)) for length in (5, 11, 3)]
REQUESTS = [RolloutRequest(i, "auto", j, ids, 10 * i + j) for i, ids in enumerate(PROMPTS) for j in range(2)]
SAMPLING = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=8)


def engine_of(family):
    return HfEngine(make_tiny(family), eos_ids=[2], pad_id=0, device=torch.device("cpu"), max_batch_tokens=4096)


@torch.no_grad()
def own_logprobs(lm, rollout):
    """The model's, one token after the other: no batch, no padding, no cache."""
    ids, found = list(rollout.request.prompt_ids), []
    for token in rollout.completion_ids:
        logits = lm(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        found.append(float(logits.double().log_softmax(-1)[token]))
        ids.append(token)
    return found


@pytest.mark.parametrize(
    ("family", "padded", "shared"), [("qwen3", True, True), ("bart", False, True), ("mamba", True, False)]
)
def test_the_fastest_way_that_is_right_is_taken(family, padded, shared):
    engine = engine_of(family)
    rollouts = engine.generate(REQUESTS, SAMPLING)
    assert engine._way is not None
    assert (engine._way.padded, engine._way.shared) == (padded, shared)
    for rollout in rollouts:
        assert rollout.rollout_logprobs == pytest.approx(own_logprobs(engine._lm, rollout), abs=1e-4)


def test_a_sync_finds_the_way_before_any_rollout():
    engine, weights = engine_of("bart"), make_tiny("bart", seed=1).state_dict()
    engine.load_weights(((n, t) for n, t in weights.items() if n in engine._weights), 3, PROMPTS[1])
    assert engine._way is not None
    assert not engine._way.padded
    assert engine.policy_version == 3


def test_a_family_that_cannot_be_sampled_is_refused_by_name(monkeypatch):
    engine = engine_of("qwen3")
    monkeypatch.setattr(engine, "_gaps", lambda rollout: [1.5])
    with pytest.raises(SgpoError, match=r"rollout.engine: hf cannot sample from qwen3: .* 1.5 nats .* vllm"):
        engine.generate(REQUESTS, SAMPLING)
    assert engine.policy_version is None


def test_a_failure_inside_the_family_is_not_the_end(monkeypatch):
    """A cache that cannot be handed on fails in the family's code; the next way does without."""
    engine, tried = engine_of("qwen3"), []

    def fail(*_):
        tried.append(True)
        raise AttributeError("no batch_select_indices")

    monkeypatch.setattr(engine, "_prefill", fail)
    assert len(engine.generate(REQUESTS, SAMPLING)) == len(REQUESTS)
    assert len(tried) == 1
    assert engine._way == hf_engine._WAYS[1]
