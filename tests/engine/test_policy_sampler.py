"""What a rollout engine of one's own owes for its requests: anything else is one sentence that names its fault."""

from dataclasses import replace

import pytest

from sgpo.engine.weight_sync import PolicySampler
from sgpo.types import Rollout, RolloutRequest, SamplingParams, SgpoError

REQUESTS = [RolloutRequest(0, "guided", k, (1, 2), seed=k) for k in range(3)]
GOOD = [Rollout(request, (5, 6), (-0.1, -0.2), truncated=False, policy_version=0) for request in REQUESTS]


class Engine:
    def __init__(self, rollouts):
        self.rollouts = rollouts

    def generate(self, requests, sampling, on_progress=None, on_rollout=None):
        return list(self.rollouts)


def sampler_of(rollouts):
    sampler = PolicySampler(None, Engine(rollouts), probe_ids=(), tolerance=1.0, token_budget=8, pad_id=0)
    sampler.policy_version = 0
    return sampler


FAULTS = {
    "no token": (
        [*GOOD[:2], replace(GOOD[2], completion_ids=(), rollout_logprobs=())],
        "0 tokens .*sample 2 with stra",
    ),
    "a log-prob too few": ([*GOOD[:2], replace(GOOD[2], rollout_logprobs=(-0.1,))], "2 tokens with 1 log-probs"),
    "one too few": (GOOD[:2], "2 completions for 3 requests"),
    "one too many": ([*GOOD, GOOD[0]], "4 completions for 3 requests"),
    "another order": (GOOD[::-1], "not in their order"),
}


@pytest.mark.parametrize("ahead", [False, True], ids=["at once", "ahead"])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_an_engine_must_not_give(fault, ahead):
    rollouts, words = FAULTS[fault]
    sampler, sampling = sampler_of(rollouts), SamplingParams(1.0, 1.0, 4)
    if ahead:
        sampler.begin(REQUESTS, sampling)
    with pytest.raises(SgpoError, match=rf"the rollout engine gave .*{words}.*mend the engine; the last checkpoint"):
        _ = sampler.collect(0) if ahead else sampler.generate(REQUESTS, sampling)


def test_what_it_owes_is_handed_on():
    assert sampler_of(GOOD).generate(REQUESTS, SamplingParams(1.0, 1.0, 4)) == GOOD
