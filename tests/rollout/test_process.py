"""The engine in a process of its own: the same answers, and what happens when that process fails."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from engine_builders import NO_VLLM, make_failing, make_hanging, make_hf, make_vllm, with_adapters
from processes import PATIENCE_S, PROMPT_S, wait_until

from sgpo.data.builtin import END, make_model, vocabulary
from sgpo.model.loading import load_causal_lm
from sgpo.rollout import process
from sgpo.rollout.process import EngineProcess
from sgpo.rollout.transport import buckets, receive, share
from sgpo.types import EngineFailure, RolloutRequest, SamplingParams, SgpoError
from sgpo.utils.checksums import checksum
from sgpo.utils.lora_names import is_adapter, plain_name

EOS = vocabulary().index(END)
REQUESTS = [RolloutRequest(i, "auto", 0, tuple(range(3, 10 + i)), i) for i in range(24)]
FREE = SamplingParams(1.0, 1.0, 12)
PROBE = tuple(range(5, 40))


def weights(seed=3):
    return {name: p.detach() for name, p in make_model(seed=seed).named_parameters()}


@pytest.fixture(scope="module")
def local(builtin_folder):
    return make_hf(builtin_folder, [EOS], 100)


@pytest.fixture
def start(builtin_folder):
    """Starts engines in processes; ends them all."""
    started = []

    def start(make=make_hf, *arguments, stall_s=PATIENCE_S, **options):
        arguments = arguments or (builtin_folder, [EOS], 100)
        started.append(EngineProcess(partial(make, *arguments, **options), stall_s=stall_s))
        return started[-1]

    yield start
    for engine in started:
        engine.close()


@pytest.mark.parametrize("make", [pytest.param(make_hf, id="hf"), pytest.param(make_vllm, id="vllm", marks=NO_VLLM)])
def test_it_answers_as_the_engine_in_this_process(start, builtin_folder, monkeypatch, make):
    monkeypatch.setattr(process, "_BUCKET_BYTES", 100_000)  # several buckets
    there, here = start(make), make(builtin_folder, [EOS], 100)
    for named in (None, weights()):
        if named is not None:
            receipts = [engine.load_weights(named.items(), 4, PROBE) for engine in (here, there)]
            assert receipts[0].checksums == receipts[1].checksums == {n: checksum(p) for n, p in named.items()}
            assert receipts[0].probe_logprobs == pytest.approx(receipts[1].probe_logprobs, abs=1e-5)
        progress, streamed = [], []
        wanted = here.generate(REQUESTS, FREE)
        found = there.generate(REQUESTS, FREE, partial(_append, progress), streamed.append)
        assert [r.completion_ids for r in found] == [r.completion_ids for r in wanted]
        assert {r.policy_version for r in found} == {0 if named is None else 4}
        assert sorted(r.request.seed for r in streamed) == [r.seed for r in REQUESTS]
        assert progress[-1] == (len(REQUESTS), sum(len(r.completion_ids) for r in found))
    there.sleep()
    there.wake()
    here.close()


def _append(progress, *counts):
    progress.append(counts)


def test_what_the_engine_refuses_is_refused_and_the_process_lives_on(start, local):
    engine = start()
    pid = engine.pid
    named = weights()
    with pytest.raises(SgpoError, match="has no weight what") as error:
        engine.load_weights([*named.items(), ("what", torch.zeros(3))], 1)
    assert not isinstance(error.value, EngineFailure)
    with pytest.raises(SgpoError, match="load_weights"):
        engine.generate(REQUESTS, FREE)
    engine.load_weights(named.items(), 2)
    assert engine.generate(REQUESTS[:2], FREE)[0].policy_version == 2
    assert engine.pid == pid


def test_a_source_that_breaks_off_does_not_confuse_the_next_sync(start):
    engine = start()

    def broken():
        yield next(iter(weights().items()))
        raise ValueError("the source broke")

    with pytest.raises(ValueError, match="broke"):
        engine.load_weights(broken(), 1)
    engine.load_weights(weights().items(), 2)
    assert engine.generate(REQUESTS[:2], FREE)[0].policy_version == 2


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_engine_is_noticed_at_once_and_started_anew_by_the_next_sync(start, blow):
    engine = start()
    engine.load_weights(weights().items(), 1)
    wanted = engine.generate(REQUESTS, FREE)
    began = time.monotonic()
    with pytest.raises(EngineFailure, match=f"rollout: .*{blow.name}"):
        engine.generate(REQUESTS, FREE, None, lambda rollout: os.kill(engine.pid, blow) if engine.pid else None)
    assert time.monotonic() - began < PROMPT_S
    with pytest.raises(EngineFailure, match="gone"):
        engine.generate(REQUESTS, FREE)
    engine.load_weights(weights().items(), 1)
    assert engine.generate(REQUESTS, FREE) == wanted


def test_an_engine_started_anew_needs_the_frozen_weights_beside_its_adapters(start, builtin_folder):
    lm = with_adapters(load_causal_lm(builtin_folder, dtype="float32"))
    named = {plain_name(name): p.detach() for name, p in lm.named_parameters()}
    adapters = {name: p for name, p in named.items() if is_adapter(name)}
    engine = start(make_hf, builtin_folder, [EOS], 100, adapters=True)
    assert not engine.holds_base()
    with pytest.raises(SgpoError, match="no new value arrived"):
        engine.load_weights(adapters.items(), 1)
    engine.load_weights(named.items(), 1)
    assert engine.holds_base()
    assert engine.load_weights(adapters.items(), 2).checksums.keys() == adapters.keys()
    os.kill(engine.pid, signal.SIGKILL)
    assert not engine.holds_base()
    with pytest.raises(SgpoError, match="no new value arrived"):
        engine.load_weights(adapters.items(), 3)


def test_an_engine_that_died_unnoticed_is_found_by_asking_what_it_holds(start):
    """As PolicySampler does before it sends anything."""
    engine = start()
    engine.load_weights(weights().items(), 1)
    os.kill(engine.pid, signal.SIGKILL)
    assert not engine.holds_base()
    engine.load_weights(weights().items(), 2)
    assert {rollout.policy_version for rollout in engine.generate(REQUESTS, FREE)} == {2}


def test_an_engine_killed_within_a_sync_is_noticed(start):
    engine = start()

    def named():
        for index, item in enumerate(weights().items()):
            if index == 5:
                os.kill(engine.pid, signal.SIGKILL)
            yield item

    with pytest.raises(EngineFailure, match=r"weight sync: .*SIGKILL"):
        engine.load_weights(named(), 1)


def test_a_frozen_process_is_killed_after_the_limit(start):
    engine = start()
    engine._stall_s = 2.0  # not before it has started, which may take longer
    pid = engine.pid
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(EngineFailure, match=r"rollout: .*no sign of life for 2 s"):
        engine.generate(REQUESTS, FREE)
    assert time.monotonic() - began < PROMPT_S
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_generation_that_hangs_is_cut_though_its_process_still_beats(start, builtin_folder):
    engine = start(make_hanging, builtin_folder, [EOS], 100)
    began = time.monotonic()
    with pytest.raises(EngineFailure, match=r"rollout: .*exit code 3"):
        engine.generate(REQUESTS, FREE)
    assert time.monotonic() - began < PROMPT_S


def test_an_engine_that_cannot_start_says_why(builtin_folder):
    with pytest.raises(EngineFailure, match=r"(?s)start of the rollout engine: .*ZeroDivisionError"):
        EngineProcess(partial(make_failing, ZeroDivisionError), stall_s=PATIENCE_S)
    with pytest.raises(SgpoError, match="no such folder"):
        EngineProcess(partial(make_failing, SgpoError, "no such folder"), stall_s=PATIENCE_S)


def test_a_killed_trainer_leaves_no_engine_behind(builtin_folder):
    code = f"""
import os, sys
from functools import partial
from engine_builders import make_hf
from sgpo.rollout.process import EngineProcess
if __name__ == "__main__":
    engine = EngineProcess(partial(make_hf, {str(builtin_folder)!r}, [{EOS}], 100), stall_s={PATIENCE_S})
    print(engine.pid, flush=True)
    os.kill(os.getpid(), 9)
"""
    path = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True)
    pid = int(done.stdout.split()[0])

    def gone():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        return False

    wait_until(gone, "the engine outlives its trainer")


def test_shared_memory_carries_every_dtype_and_shape():
    generator = torch.Generator().manual_seed(0)
    sent = [
        ("float32", torch.randn(7, 3, generator=generator)),
        ("bfloat16", torch.randn(5, generator=generator).bfloat16()),
        ("view", torch.randn(8, 6, generator=generator).T[::2]),
        ("scalar", torch.tensor(3.0)),
        ("empty", torch.zeros(0, 4)),
        ("bool", torch.tensor([True, False, True])),
        ("int64", torch.arange(9)),
    ]
    descriptor, layout = share(sent)
    found = list(receive(descriptor, layout))
    for (name, tensor), (wanted_name, wanted) in zip(found, sent, strict=True):
        assert name == wanted_name
        assert tensor.dtype == wanted.dtype
        assert torch.equal(tensor, wanted)
        assert checksum(tensor) == checksum(wanted)


def test_buckets_keep_order_and_respect_the_limit():
    named = [(str(i), torch.zeros(size)) for i, size in enumerate((10, 10, 100, 1, 1, 1))]
    found = list(buckets(named, 80))
    assert [[name for name, _ in bucket] for bucket in found] == [["0", "1"], ["2"], ["3", "4", "5"]]
    assert list(buckets([], 80)) == []
