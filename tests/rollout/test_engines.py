"""One suite for every RolloutEngine: what is sampled, from which distribution, and that nothing else decides it.

A new engine joins by one entry in ENGINES: make(folder, eos_ids, max_batch_tokens) -> RolloutEngine.
"""

import json
import math
import shutil

import pytest
import torch
from engine_builders import NO_VLLM, make_hf, make_vllm

from sgpo.data.builtin import END, make_model, make_tokenizer, vocabulary
from sgpo.data.builtin import PAD as PAD_TOKEN
from sgpo.model.loading import load_causal_lm
from sgpo.rollout.hf_engine import HfEngine, SeededSampler, nucleus_floor
from sgpo.types import RolloutRequest, SamplingParams, SgpoError
from sgpo.utils.checksums import checksum

EOS, PAD, VOCAB = vocabulary().index(END), vocabulary().index(PAD_TOKEN), len(vocabulary())
LONG = 8


ENGINES = [pytest.param(make_hf, id="hf"), pytest.param(make_vllm, id="vllm", marks=NO_VLLM)]


def sharp_model(seed):
    """The small model with its last norm turned up: an untrained one is close to uniform, and would hide errors."""
    lm = make_model(seed=seed, hidden=128, layers=2)
    with torch.no_grad():
        lm.model.norm.weight.mul_(5.0)
    return lm.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("engines") / "model"
    sharp_model(0).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def truth(folder):
    return load_causal_lm(folder, dtype="float32").eval()


@pytest.fixture(scope="module", params=ENGINES)
def make_engine(request, folder, truth):
    """Builds engines, each kind once, for a start takes seconds; one that was there before gets its weights back."""
    built = {}

    def make(*, eos_ids=(EOS,), max_batch_tokens=4096, path=folder):
        key = (eos_ids, max_batch_tokens, path)
        if key in built:
            built[key].load_weights(truth.named_parameters(), 0)
        else:
            built[key] = request.param(path, list(eos_ids), max_batch_tokens)
        return built[key]

    yield make
    for engine in built.values():
        engine.close()


@pytest.fixture
def engine(make_engine):
    return make_engine()


@pytest.fixture(scope="module")
def free(make_engine):
    """What the untouched engine samples."""
    return make_engine().generate(REQUESTS, FREE)


def request_of(index, *, seed=None, length=None):
    """Prompts of different lengths."""
    generator = torch.Generator().manual_seed(1000 + index)
    prompt = torch.randint(3, VOCAB, (length or 2 + 3 * (index % 4),), generator=generator)
    return RolloutRequest(index, "auto", 0, tuple(prompt.tolist()), index if seed is None else seed)


FREE = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=LONG)
REQUESTS = [request_of(i) for i in range(7)]


@torch.no_grad()
def next_logits(lm, *parts):
    """[V] after the parts, and all before: no cache, no batch, no padding."""
    return lm(input_ids=torch.tensor([[token for part in parts for token in part]]), use_cache=False).logits[0]


def nucleus(logits, temperature, top_p):
    """{token: probability} of the smallest set of the likeliest tokens whose mass reaches top_p, renormalised."""
    probs = (logits.double() / temperature).softmax(-1).tolist()
    kept, mass = {}, 0.0
    for token in sorted(range(len(probs)), key=lambda t: -probs[t]):
        if mass >= top_p:
            break
        kept[token] = probs[token]
        mass += probs[token]
    return {token: p / mass for token, p in kept.items()}


def texts(rollouts):
    return [r.completion_ids for r in rollouts]


def assert_same(found, wanted):
    """Same tokens; log-probs up to the rounding that another batch shape brings."""
    assert texts(found) == texts(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.rollout_logprobs == pytest.approx(other.rollout_logprobs, abs=1e-4)


def chi_square_bound(counts, probs, draws):
    """Asserts that counts [K] are draws from probs [K]; cells expected below 5 are one cell. Bound: about 5 sigma."""
    counts, expected = torch.tensor(counts, dtype=torch.float64), torch.tensor(probs, dtype=torch.float64) * draws
    small = expected < 5
    counts = torch.cat([counts[~small], counts[small].sum()[None]])
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(counts) - 1
    assert freedom >= 2
    assert float(((counts - expected) ** 2 / expected).sum()) < freedom + 5 * math.sqrt(2 * freedom)


def test_greedy_is_the_plain_argmax_loop(engine, truth):
    for request, rollout in zip(REQUESTS, engine.generate(REQUESTS, SamplingParams(0.0, 1.0, LONG)), strict=True):
        ids = []
        while len(ids) < LONG and ids[-1:] != [EOS]:
            ids.append(int(next_logits(truth, request.prompt_ids, ids)[-1].argmax()))
        assert rollout.completion_ids == tuple(ids)
        assert rollout.request == request


def test_greedy_does_not_look_at_the_seed_or_at_top_p(engine):
    one = engine.generate([request_of(i, seed=1) for i in range(4)], SamplingParams(0.0, 1.0, LONG))
    other = engine.generate([request_of(i, seed=2) for i in range(4)], SamplingParams(0.0, 0.3, LONG))
    assert texts(one) == texts(other)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_logprobs_are_those_of_the_distribution_sampled_from(engine, truth, temperature, top_p):
    rollouts = engine.generate(REQUESTS, SamplingParams(temperature, top_p, LONG))
    tokens = 0
    for rollout in rollouts:
        prompt, ids = rollout.request.prompt_ids, rollout.completion_ids
        logits = next_logits(truth, prompt, ids)[len(prompt) - 1 : -1]
        for row, token, found in zip(logits, ids, rollout.rollout_logprobs, strict=True):
            # Rounding may move a token across the border of the nucleus: either side of it is right.
            wide, narrow = (nucleus(row, temperature, p) for p in (min(top_p + 1e-5, 1.0), top_p - 1e-5))
            assert token in wide
            candidates = [math.log(kept[token]) for kept in (wide, narrow) if token in kept]
            assert min(abs(found - wanted) for wanted in candidates) < 1e-4
            tokens += 1
    assert tokens > 40


def test_completions_do_not_depend_on_order_or_company(engine):
    sampling = SamplingParams(1.0, 0.95, LONG)
    together = engine.generate(REQUESTS, sampling)
    assert_same(engine.generate(REQUESTS[::-1], sampling)[::-1], together)
    assert_same([engine.generate([request], sampling)[0] for request in REQUESTS[:5]], together[:5])
    assert_same(engine.generate(REQUESTS[2:6], sampling), together[2:6])
    assert_same(engine.generate(REQUESTS, sampling), together)


@pytest.mark.parametrize("max_batch_tokens", [1, 40, 10**6])
def test_completions_do_not_depend_on_the_batch_size(free, make_engine, max_batch_tokens):
    assert_same(make_engine(max_batch_tokens=max_batch_tokens).generate(REQUESTS, FREE), free)


@NO_VLLM
def test_prompts_beyond_one_forward_pass_of_vllm_change_nothing(folder):
    engine = make_vllm(folder, [EOS], 4096, max_num_seqs=32, max_num_batched_tokens=64)
    requests = [request_of(i, length=50) for i in range(12)]
    try:
        together = engine.generate(requests, FREE)
        assert_same(together, [engine.generate([request], FREE)[0] for request in requests])
    finally:
        engine.close()


def test_a_shorter_limit_gives_the_beginning(engine, free):
    short = engine.generate(REQUESTS, SamplingParams(1.0, 1.0, 5))
    assert texts(short) == [ids[:5] for ids in texts(free)]


def test_different_seeds_differ_and_equal_seeds_do_not(engine):
    sampling = FREE
    requests = [request_of(0, seed=seed) for seed in (*range(8), 0)]
    found = texts(engine.generate(requests, sampling))
    assert len(set(found[:8])) == 8
    assert found[8] == found[0]


def test_large_seeds_are_seeds(engine):
    found = engine.generate([request_of(0, seed=s) for s in (2**63 - 1, 2**63 - 2, 0)], FREE)
    assert len(set(texts(found))) == 3


def test_rollouts_come_back_in_the_order_of_their_requests(engine):
    rollouts = engine.generate(REQUESTS, SamplingParams(1.0, 1.0, 3))
    assert [r.request for r in rollouts] == REQUESTS
    assert all(len(r.rollout_logprobs) == len(r.completion_ids) for r in rollouts)


def test_no_request_no_rollout(engine):
    assert engine.generate([], SamplingParams(1.0, 1.0, 4)) == []


def test_every_eos_ends_a_completion_and_belongs_to_it(free, make_engine):
    """Two tokens that the same seeds are known to sample become EOS ids: each cuts where it first occurred."""
    first, second = free[0].completion_ids[3], free[1].completion_ids[5]
    ended = make_engine(eos_ids=(first, second)).generate(REQUESTS, FREE)
    ends = set()
    for rollout, ids in zip(ended, texts(free), strict=True):
        end = next((t for t, token in enumerate(ids) if token in (first, second)), None)
        if end is None and EOS in ids:
            continue  # the other engine stopped there, this one goes on
        if end is None:
            assert rollout.completion_ids == ids
            assert rollout.truncated
            continue
        assert rollout.completion_ids == ids[: end + 1]
        assert not rollout.truncated
        assert len(rollout.rollout_logprobs) == end + 1
        ends.add(ids[end])
    assert ends == {first, second}


def test_eos_as_the_last_allowed_token_is_an_end_and_not_a_cut(engine, make_engine):
    token = texts(engine.generate(REQUESTS[:1], SamplingParams(1.0, 1.0, 1)))[0][0]
    (rollout,) = make_engine(eos_ids=(token,)).generate(REQUESTS[:1], SamplingParams(1.0, 1.0, 1))
    assert rollout.completion_ids == (token,)
    assert not rollout.truncated


def test_without_eos_a_completion_is_truncated_at_the_limit(make_engine):
    rollouts = make_engine(eos_ids=(VOCAB - 1,)).generate(REQUESTS, SamplingParams(1.0, 1.0, 4))
    for rollout in rollouts:
        assert rollout.truncated == (rollout.completion_ids[-1] != VOCAB - 1)
        assert len(rollout.completion_ids) == 4 or not rollout.truncated
    assert any(rollout.truncated for rollout in rollouts)


def test_sampled_padding_tokens_are_tokens(make_engine):
    """The pad id is an ordinary id to the sampler: it is neither skipped nor taken for an end."""
    requests = [request_of(0, seed=seed) for seed in range(300)]
    rollouts = make_engine(max_batch_tokens=10**6).generate(requests, SamplingParams(2.0, 1.0, 3))
    assert all(len(r.completion_ids) == 3 or r.completion_ids[-1] == EOS for r in rollouts)
    assert any(PAD in r.completion_ids[:-1] for r in rollouts)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (1.5, 0.8)])
def test_sampled_frequencies_match_the_distribution(make_engine, truth, temperature, top_p):
    draws = 3000
    requests = [request_of(0, seed=seed) for seed in range(draws)]
    found = make_engine(max_batch_tokens=10**6).generate(requests, SamplingParams(temperature, top_p, 1))
    tokens = torch.tensor([r.completion_ids[0] for r in found])
    probs = nucleus(next_logits(truth, requests[0].prompt_ids)[-1], temperature, top_p)
    assert set(tokens.tolist()) <= set(probs)
    counts = tokens.bincount(minlength=VOCAB).tolist()
    chi_square_bound(counts, [probs.get(token, 0.0) for token in range(VOCAB)], draws)


def test_progress_counts_requests_and_tokens(engine, make_engine):
    calls = []
    rollouts = make_engine(max_batch_tokens=40).generate(
        REQUESTS, SamplingParams(1.0, 1.0, 6), lambda done, tokens: calls.append((done, tokens))
    )
    assert calls == sorted(calls)
    assert calls[-1] == (len(REQUESTS), sum(len(r.completion_ids) for r in rollouts))


def other_weights():
    return sharp_model(7)


def test_loaded_weights_are_the_ones_that_sample(make_engine):
    engine, other = make_engine(), other_weights()
    before = engine.generate(REQUESTS, SamplingParams(0.0, 1.0, LONG))
    assert {r.policy_version for r in before} == {0}
    engine.load_weights(other.named_parameters(), 3)
    after = engine.generate(REQUESTS, SamplingParams(0.0, 1.0, LONG))
    assert {r.policy_version for r in after} == {3}
    for request, rollout in zip(REQUESTS, after, strict=True):
        ids = []
        while len(ids) < LONG and ids[-1:] != [EOS]:
            ids.append(int(next_logits(other, request.prompt_ids, ids)[-1].argmax()))
        assert rollout.completion_ids == tuple(ids)
    assert texts(before) != texts(after)


def test_tied_weights_may_be_sent_once_or_twice(make_engine):
    """named_parameters has the tied matrix once, state_dict under both of its names."""
    other = other_weights()
    found = []
    for tensors in (other.named_parameters(), other.state_dict().items()):
        engine = make_engine()
        engine.load_weights(tensors, 1)
        found.append(texts(engine.generate(REQUESTS, FREE)))
    assert found[0] == found[1]


def test_weights_are_copied_and_not_shared(make_engine):
    engine, other = make_engine(), other_weights()
    engine.load_weights(other.named_parameters(), 1)
    before = engine.generate(REQUESTS, FREE)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    assert_same(engine.generate(REQUESTS, FREE), before)


def test_weights_of_another_dtype_are_converted(make_engine):
    engine, other = make_engine(), other_weights()
    engine.load_weights(((name, p.detach().double()) for name, p in other.named_parameters()), 1)
    converted = engine.generate(REQUESTS, SamplingParams(0.0, 1.0, LONG))
    engine.load_weights(other.named_parameters(), 2)
    assert texts(engine.generate(REQUESTS, SamplingParams(0.0, 1.0, LONG))) == texts(converted)


@pytest.mark.parametrize("fault", ["missing", "unknown", "wrong_shape", "nothing"])
def test_weights_that_do_not_fit_are_refused(make_engine, truth, free, fault):
    engine = make_engine()
    tensors = {name: p.detach() for name, p in other_weights().named_parameters()}
    name = "model.layers.1.mlp.down_proj.weight"
    if fault == "missing":
        del tensors[name]
    elif fault == "unknown":
        tensors[name.replace("layers.1", "layers.9")] = tensors[name]
        name = name.replace("layers.1", "layers.9")
    elif fault == "wrong_shape":
        tensors[name] = tensors[name].T
    else:
        tensors, name = {}, "weight"
    with pytest.raises(SgpoError, match=name.removesuffix(".weight").replace(".", r"\.")) as error:
        engine.load_weights(tensors.items(), 5)
    assert "\n" not in str(error.value)
    with pytest.raises(SgpoError, match="load_weights"):
        engine.generate(REQUESTS[:1], FREE)
    engine.load_weights(truth.named_parameters(), 6)
    assert_same(engine.generate(REQUESTS, FREE), free)


def test_sleep_and_wake_keep_the_engine_usable(make_engine):
    engine, other = make_engine(), other_weights()
    engine.sleep()
    engine.wake()
    engine.load_weights(other.named_parameters(), 1)
    assert engine.generate(REQUESTS[:2], SamplingParams(1.0, 1.0, 2))[0].policy_version == 1


@pytest.mark.parametrize(
    "setting",
    [
        {"repetition_penalty": 1.5}, {"do_sample": True, "temperature": 0.1, "top_k": 2, "top_p": 0.1},
        {"min_new_tokens": LONG}, {"suppress_tokens": list(range(3, 50))}, {"bad_words_ids": [[7], [50]]},
        {"max_length": 4}, {"num_beams": 3}, {"no_repeat_ngram_size": 1}, {"forced_eos_token_id": EOS},
        {"stop_strings": "farm"},
    ],
    ids=lambda setting: next(reversed(setting)),
)  # fmt: skip
def test_the_generation_config_of_the_model_changes_nothing(make_engine, free, folder, tmp_path, setting):
    """Qwen2.5-Instruct ships repetition_penalty 1.05: rollouts would not be samples of the policy that is trained."""
    path = shutil.copytree(folder, tmp_path / "model")
    config = path / "generation_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **setting}))
    assert_same(make_engine(path=path).generate(REQUESTS, FREE), free)


def limit_memory(monkeypatch, engine, rows):
    """A step over more than `rows` requests runs out of memory; returns the sizes that were tried."""
    tried = []

    def check(size):
        tried.append(size)
        if size > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    if isinstance(engine, HfEngine):
        generate = engine._lm.generate
        monkeypatch.setattr(engine._lm, "generate", lambda **kw: (check(len(kw["input_ids"])), generate(**kw))[1])
    else:
        runner = engine._engine.model_executor.driver_worker.worker.model_runner
        execute = runner.execute_model
        monkeypatch.setattr(
            runner,
            "execute_model",
            lambda output, *rest: (check(len(output.num_scheduled_tokens)), execute(output, *rest))[1],
        )
    return tried


def test_out_of_memory_goes_on_with_fewer_requests_at_once(make_engine, free, monkeypatch, capsys):
    engine = make_engine(max_batch_tokens=10**6)
    tried = limit_memory(monkeypatch, engine, 2)
    streamed = []
    found = engine.generate(REQUESTS, FREE, None, streamed.append)
    assert_same(found, free)
    assert max(tried) > 2
    assert sorted(r.request.seed for r in streamed) == [r.seed for r in REQUESTS]
    assert "memory ran out with" in capsys.readouterr().out
    monkeypatch.undo()
    assert_same(engine.generate(REQUESTS, FREE), free)


def test_out_of_memory_for_a_single_request_is_one_sentence(make_engine, free, monkeypatch):
    engine = make_engine(max_batch_tokens=10**6)
    limit_memory(monkeypatch, engine, 0)
    with pytest.raises(SgpoError, match="one rollout at a time") as error:
        engine.generate(REQUESTS, FREE)
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    assert_same(make_engine(max_batch_tokens=10**6).generate(REQUESTS, FREE), free)


def test_every_completion_is_handed_out_once_as_it_ends(engine, free):
    streamed = []
    found = engine.generate(REQUESTS, FREE, None, streamed.append)
    assert texts(found) == texts(free)
    assert sorted(streamed, key=lambda r: r.request.seed) == sorted(found, key=lambda r: r.request.seed)


def test_the_receipt_tells_what_arrived_and_what_the_new_weights_say(make_engine):
    engine, other = make_engine(), other_weights()
    named = dict(other.named_parameters())
    probe = tuple(range(3, 60))
    receipt = engine.load_weights(named.items(), 1, probe)
    assert receipt.checksums == {name: checksum(tensor) for name, tensor in named.items()}
    wanted = next_logits(other, probe)[:-1].log_softmax(-1).gather(-1, torch.tensor(probe[1:])[:, None])[:, 0]
    assert receipt.probe_logprobs == pytest.approx(wanted.tolist(), abs=1e-4)
    assert engine.load_weights(named.items(), 2).probe_logprobs == ()


# The sampler of the hf engine by itself.

LOGITS = torch.tensor([2.0, 0.5, -1.0, 1.0, 0.0, -0.5, 1.5, -3.0])


def draw(logits, temperature=1.0, top_p=1.0, seeds=(0,), steps=1):
    """tokens [steps, B] and log-probs [steps, B]."""
    sampler = SeededSampler(seeds, SamplingParams(temperature, top_p, steps), torch.device("cpu"))
    scores = logits.expand(len(seeds), -1) if logits.dim() == 1 else logits
    chosen = [sampler(torch.empty(0), scores) for _ in range(steps)]
    for one in chosen:
        assert ((one == 0).sum(-1) == 1).all()
        assert (one.isneginf().sum(-1) == logits.shape[-1] - 1).all()
    return torch.stack([one.argmax(-1) for one in chosen]), torch.stack(sampler.logprobs)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.9), (0.7, 0.85)])
@pytest.mark.parametrize("across", ["seeds", "steps"])
def test_draws_follow_the_softmax_across_seeds_and_along_a_completion(temperature, top_p, across):
    count = 3000
    seeds, steps = (range(count), 1) if across == "seeds" else ((123,), count)
    tokens, logprobs = draw(LOGITS, temperature, top_p, seeds, steps)
    probs = nucleus(LOGITS, temperature, top_p)
    assert set(tokens.flatten().tolist()) <= set(probs)
    chi_square_bound(tokens.flatten().bincount(minlength=8).tolist(), [probs.get(t, 0.0) for t in range(8)], count)
    wanted = torch.tensor([math.log(probs[int(t)]) for t in tokens.flatten()])
    torch.testing.assert_close(logprobs.flatten(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("probs", "top_p", "kept"),
    [
        ([0.5, 0.25, 0.125, 0.125], 0.5, {0}),
        ([0.5, 0.25, 0.125, 0.125], 0.51, {0, 1}),
        ([0.5, 0.25, 0.125, 0.125], 0.75, {0, 1}),
        ([0.125, 0.5, 0.25, 0.125], 0.8, {0, 1, 2, 3}),  # what is tied with the last one inside is inside
        ([0.5, 0.25, 0.125, 0.125], 1e-9, {0}),
        ([0.5, 0.25, 0.125, 0.125], 1.0, {0, 1, 2, 3}),
    ],
)
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(probs, top_p, kept):
    tokens, _ = draw(torch.tensor(probs).log(), top_p=top_p, seeds=range(400))
    assert set(tokens.flatten().tolist()) == kept


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.8, 0.99, 0.999999])
def test_the_nucleus_does_not_depend_on_how_many_tokens_are_looked_at_first(top_p):
    """Flat and steep rows together: some need all their tokens, some only a few."""
    steepness = torch.tensor([0.0, 0.1, 1.0, 3.0, 10.0, 50.0])[:, None]
    probs = (steepness * torch.randn(6, 300, generator=torch.Generator().manual_seed(1))).softmax(-1)
    whole = nucleus_floor(probs, top_p, likeliest=300)
    for likeliest in (1, 2, 17, 299, 1000):
        assert torch.equal(nucleus_floor(probs, top_p, likeliest=likeliest), whole)
    for row, floor in zip(probs[1:], whole[1:], strict=True):
        wanted = nucleus(row.double().log(), 1.0, top_p)
        assert set((row >= floor).nonzero().flatten().tolist()) == set(wanted)


def test_a_row_draws_its_own_seed_whatever_its_neighbours():
    rows = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    together, _ = draw(rows, seeds=(3, 1, 4, 1, 5), steps=20)
    for i, seed in enumerate((3, 1, 4, 1, 5)):
        assert torch.equal(together[:, i], draw(rows[i], seeds=(seed,), steps=20)[0][:, 0])


def test_impossible_tokens_are_never_drawn():
    """-inf at both ends of the vocabulary and a distribution of one token; extreme logits stay finite."""
    tokens, logprobs = draw(torch.tensor([-math.inf, 1.0, 1.0, -math.inf]), seeds=range(300))
    assert set(tokens.flatten().tolist()) == {1, 2}
    assert torch.allclose(logprobs, torch.tensor(math.log(0.5)), atol=1e-6)
    tokens, logprobs = draw(torch.tensor([-1e4, 1e4, -1e4]), seeds=range(50))
    assert set(tokens.flatten().tolist()) == {1}
    assert logprobs.abs().max() == 0


def test_greedy_takes_the_first_of_the_likeliest():
    tokens, logprobs = draw(torch.tensor([0.0, 2.0, 2.0]), temperature=0.0, seeds=(1, 2))
    assert tokens.tolist() == [[1, 1]]
    assert logprobs[0, 0] == pytest.approx(float(torch.tensor([0.0, 2.0, 2.0]).log_softmax(-1)[1]))
