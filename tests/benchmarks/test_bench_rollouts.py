"""The rollout benchmark: whole rows from the real engines, and engines that cheat are noticed."""

import importlib.util
import itertools
import json

import pytest
from engine_builders import NO_VLLM

from benchmarks import rollouts
from benchmarks.rollouts import Completion, Peer
from sgpo.types import SgpoError

EOS = 9
LIMITS = [3, 3, 4]
HONEST = [
    Completion((1, 2, 3), (-0.5, -0.1, 0.0), True),
    Completion((1, EOS), (-0.5, -0.1), False),
    Completion((4, 4, 4, EOS), (-1.0, -1.0, -1.0, -1.0), False),
]


def peer(name, completions=HONEST):
    return Peer(name, "made up", lambda count: completions[:count], list)


def rows_of(peers, least=1.0):
    return list(rollouts.compare(peers, LIMITS, [EOS], rounds=2, device="cpu", least=least))


@NO_VLLM
def test_the_engines_are_measured_and_agree(tmp_path):
    out = tmp_path / "rows.jsonl"
    arguments = ["--quick", "--peers", "ours,bare,hf", "--placements", "inprocess", "--out", str(out)]
    assert rollouts.main(arguments) == 0
    *sampled, synced = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["peer"] for row in sampled] == ["ours", "bare", "hf"]
    for row in sampled:
        assert (row["benchmark"], row["part"], row["status"]) == ("rollouts", "throughput", "ok")
        assert row["requests"] == 24
        assert 24 <= row["tokens"] <= 24 * 12
        for name in ("ms", "tokens_per_s", "ours_over_peer", "ours_over_peer_cpu"):
            assert 0 < row[f"{name}_p10"] <= row[f"{name}_p50"] <= row[f"{name}_p90"]
        assert row.keys() == sampled[0].keys()
        assert row["command"].startswith("python -m benchmarks.rollouts")
        assert {"commit", "dirty", "device_name", "versions", "seed", "dtype"} <= row.keys()
    ours, bare, _ = sampled
    assert ours["equal_share"] == bare["equal_share"] == 1.0
    assert ours["tokens"] == bare["tokens"]
    assert ours["logprob_gap_max"] < 1e-5
    assert ours["ours_over_peer_p50"] == 1.0
    assert (synced["part"], synced["placement"], synced["status"]) == ("sync", "inprocess", "ok")
    assert synced["bytes"] == 4 * synced["parameters"] > 0
    assert synced["probe_gap_mean"] < 1e-3
    assert synced["sync_ms_min"] > synced["copy_ms_min"] > 0


def test_honest_engines_are_compared():
    other = [one._replace(ids=one.ids[::-1]) if one.truncated else one for one in HONEST]
    ours, bare, hf = rows_of([peer("ours"), peer("bare"), peer("hf", other)])
    assert ours["status"] == bare["status"] == hf["status"] == "ok"
    assert (ours["tokens"], ours["equal_share"], hf["equal_share"]) == (9, 1.0, 2 / 3)
    for row in (ours, bare, hf):
        assert rollouts.table(row, "cpu").startswith(row["peer"])


@pytest.mark.parametrize(
    ("index", "change", "reason"),
    [
        (0, {"ids": (1, 2), "logprobs": (-0.5, -0.1)}, "has 2 tokens, its limit is 3"),
        (1, {"ids": (1,), "logprobs": (-0.5,)}, "which its tokens do not bear out"),
        (1, {"ids": (1,), "logprobs": (-0.5,), "truncated": True}, "has 1 tokens, its limit is 3"),
        (2, {"ids": (4, EOS, 4, EOS)}, "which its tokens do not bear out"),
        (0, {"ids": (1, 2, 3, 4)}, "has 4 tokens, its limit is 3"),
        (0, {"logprobs": (-0.5, -0.1)}, "log-probs"),
        (0, {"logprobs": (-0.5, -0.1, float("nan"))}, "log-probs"),
        (0, {"ids": (1, 2, 4)}, "only 0.667 of the completions"),
    ],
)
def test_an_engine_that_does_less_gets_no_time(index, change, reason):
    rigged = [one._replace(**change) if i == index else one for i, one in enumerate(HONEST)]
    ours, bare = rows_of([peer("ours", rigged), peer("bare")])
    assert ours["status"] == "wrong"
    assert reason in ours["reason"]
    assert "ms_p50" not in ours
    assert bare["ours_over_peer_p50"] is None
    assert reason in rollouts.table(ours, "cpu")


def test_a_lost_completion_and_a_single_bad_round_are_noticed():
    ours, _ = rows_of([peer("ours", HONEST[:2]), peer("bare")])
    assert ours["reason"] == "2 completions for 3 requests"
    calls = itertools.count()
    once = Peer("ours", "made up", lambda count: HONEST[: count - (next(calls) == 1)], list)
    assert rows_of([once, peer("bare")])[0]["status"] == "wrong"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "hf"], "--peers lacks bare, ours"),
        (["--peers", "ours,bare,nobody"], "Unknown --peers nobody"),
        (["--parts", "all"], "Unknown --parts all"),
        (["--placements", "here"], "Unknown --placements here"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--sync-shapes", "100x63x2"], "--sync-shapes takes"),
    ],
)
def test_usage_errors_are_one_sentence(arguments, message, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(SgpoError, match=message):
        rollouts.check(rollouts.parse(arguments))


def test_without_vllm_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert rollouts.main([]) == 2
    assert "needs vLLM" in capsys.readouterr().err
