"""The reward pool: order, limits, hostile completions, workers that die, a trainer that is killed."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import wait
from pathlib import Path

import pytest

pytest.importorskip("pebble")
pytest.importorskip("math_verify")

import hostile_answers
from processes import PATIENCE_S, PROMPT_S, scaled, wait_until

from sgpo.rewards.pool import RewardItem, RewardPool
from sgpo.types import RewardResult, SgpoError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and process death are tested on Linux")

REPO = Path(__file__).parents[2]
TIMEOUT_S = scaled(1.5)  # of a result; good ones must be there by then on a busy machine too
MAX_CHARS = 1_100_000

PLUGIN = """
import os, signal, sys, time

def reward(completion, answer, problem):
    if completion == "pid":
        return os.getpid()
    if completion == "foreign modules":
        return sum(name in sys.modules for name in ("torch", "deepspeed", "transformers"))
    if completion == "spin":
        while True:
            pass
    if completion == "sleep":
        time.sleep(1000)
    if completion == "exit":
        os._exit(3)
    if completion == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if completion == "memory":
        return len(bytearray(2**31))
    if completion == "raise":
        class Unpicklable(Exception):
            pass
        raise Unpicklable("on purpose")
    if completion == "text":
        return "five"
    return len(completion) + len(problem) / 10

not_a_function = 3
"""

BOMB = r"\boxed{10^{10^{10^{10}}}}"

HOSTILE = {
    "tower": r"\boxed{9^{9^{9^{9}}}}",
    "tower of ten": r"\boxed{10^{10^{10}}}",
    "python tower": r"\boxed{9**9**9**9}",
    "plain tower": "The answer is 9**9**9**9",
    "factorial": r"\boxed{999999999!}",
    "factorials": r"\boxed{((((9!)!)!)!)!}",
    "binomial": r"\boxed{\binom{10^{9}}{5 \cdot 10^{8}}}",
    "sum": r"\boxed{\sum_{k=1}^{10^{12}} \frac{1}{k^{k}}}",
    "product": r"\boxed{\prod_{k=1}^{10^{9}} k}",
    "integral": r"\boxed{\int_0^{\infty} \frac{\sin(x^{x^{x}})}{\ln(\tan(x^{9}))} dx}",
    "limit": r"\boxed{\lim_{x \to 0} \frac{\sin(\tan(x)) - \tan(\sin(x))}{x^{70}}}",
    "derivative": r"\boxed{\frac{d}{dx} x^{x^{x^{x^{x^{x^{x}}}}}}}",
    "expansion": r"\boxed{(a+b+c+d+e+f)^{400}}",
    "polynomial": r"\boxed{(x^{999}-1)(x^{998}-1)(x^{997}-1)}",
    "huge modulus": r"\boxed{7^{10^{18}} \bmod 11}",
    "huge decimal": r"\boxed{" + "9" * 100_000 + "}",
    "huge exponent": r"\boxed{1e999999999999}",
    "huge root": r"\boxed{\sqrt[10^{9}]{10^{10^{9}}}}",
    "matrix": r"\boxed{\begin{pmatrix}" + " & ".join(["1"] * 300) + r"\end{pmatrix}}",
    "matrix power": r"\boxed{\begin{pmatrix}1&1\\1&0\end{pmatrix}^{10^{9}}}",
    "set": r"\boxed{\{" + ", ".join(map(str, range(3000))) + r"\}}",
    "interval": r"\boxed{[1, \infty) \cup (-\infty, 10^{10^{10}}]}",
    "zero division": r"\boxed{\frac{1}{0}}",
    "zero power": r"\boxed{0^{0^{0}}}",
    "infinity": r"\boxed{\infty - \infty}",
    "deep braces": r"\boxed{" + "{" * 100_000 + "7" + "}" * 100_000 + "}",
    "deep fractions": r"\boxed{" + r"\frac{1}{" * 2_000 + "7" + "}" * 2_000 + "}",
    "deep roots": r"\boxed{" + r"\sqrt{" * 5_000 + "7" + "}" * 5_000 + "}",
    "deep parentheses": r"\boxed{" + "(" * 10_000 + "7" + ")" * 10_000 + "}",
    "unbalanced": r"\boxed{" + "{" * 100_000 + "5",
    "many boxes": r"\boxed{7}" * 20_000,
    "dollars": r"\boxed{" + "$" * 50_000 + "}",
    "signs": r"\boxed{" + "-" * 20_001 + "5}",
    "plus chain": r"\boxed{" + "1+" * 5_000 + "1}",
    "letters": r"\boxed{" + "abcdefghij" * 2_000 + "}",
    "nul": "\\boxed{5\x00}",
    "nuls": "\x00" * 50_000 + "\\boxed{\x00}",
    "surrogate": "\\boxed{\ud800}",
    "other digits": "\\boxed{٧৭๗}",
    "superscripts": "\\boxed{x²⁹⁹⁹⁹}",
    "emoji": "\\boxed{🙂}",
    "right to left": "\\boxed{\u202e6\u202c}",
    "code": r"\boxed{__import__('os')._exit(7)}",
    "code in text": r"\boxed{\text{__import__('os')._exit(7)}}",
    "megabyte of answers": "answer is $" * 90_000,
    "megabyte": "5" * 1_000_000,
    "too long": "\\boxed{5}" + " " * MAX_CHARS,
}


@pytest.fixture(scope="module")
def pool():
    with RewardPool(
        "math_verify", workers=2, timeout_s=TIMEOUT_S, memory_mib=256, max_chars=MAX_CHARS, require_box=False
    ) as pool:
        yield pool


@pytest.fixture(scope="module")
def plugin_pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "plugin_for_tests.py").write_text(PLUGIN)
    sys.path.append(str(folder))
    try:
        with RewardPool("plugin_for_tests:reward", workers=2, timeout_s=TIMEOUT_S, memory_mib=256) as pool:
            yield pool
    finally:
        sys.path.remove(str(folder))


def process_runs(pid):
    """Whether the process exists and is not just a zombie that nobody has reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for_end(*pids):
    wait_until(lambda: not any(map(process_runs, pids)), f"end of {pids}")


def test_results_come_in_order_and_are_counted_with_duplicates(pool):
    before = pool.counts.copy()
    items = [RewardItem(f"\\boxed{{{i % 50}}}", f"{i % 3}.0") for i in range(300)]
    assert [result.reward for result in pool.score(items)] == [float(i % 50 == i % 3) for i in range(300)]
    assert pool.counts["ok"] - before["ok"] == 300
    assert pool.score([]) == []


def test_hostile_completions_cost_a_timeout_at_most_and_leave_a_working_pool(pool):
    items = [RewardItem(text, "5") for text in HOSTILE.values()]
    before = pool.counts.copy()
    start = time.monotonic()
    results = dict(zip(HOSTILE, pool.score(items), strict=True))
    elapsed_s = time.monotonic() - start
    # Two workers; a kill and a new worker take well below a second.
    killed = sum(result.status in ("timeout", "error") for result in results.values())
    assert elapsed_s < PROMPT_S + killed / 2 * (TIMEOUT_S + 2) + 0.5 * len(items)
    assert [name for name, result in results.items() if result.reward != 0] == []
    assert results["tower"].status == "timeout"
    assert results["too long"].status == "too_long"
    assert {result.status for result in results.values()} <= {"ok", "no_answer", "too_long", "timeout", "error"}
    assert sum(pool.counts.values()) - sum(before.values()) == len(items)
    assert pool.score([RewardItem(r"\boxed{\frac{10}{2}}", "5"), RewardItem(r"\boxed{6.5}", "5")]) == [
        RewardResult(1.0),
        RewardResult(0.0),
    ]


def test_generated_hostile_strings_end_in_a_result_within_bounded_memory():
    """A sample of the 10,000 that `hostile_answers.py` runs."""
    count = 80
    found = hostile_answers.run(count, seed=1, timeout_s=TIMEOUT_S / 2, memory_mib=256)
    assert sum(found["statuses"].values()) == count
    assert found["statuses"].keys() <= {"ok", "no_answer", "too_long", "timeout", "error"}
    assert found["statuses"]["ok"] > count / 4
    assert found["seconds"] < PROMPT_S + count * (TIMEOUT_S / 2 + 1)
    assert [row for row in found["rewarded"] if row[0] not in hostile_answers.MAY_BE_RIGHT] == []
    assert not found["trap_sprung"]
    assert found["works_afterwards"]
    assert 30 < found["worker_peak_mib"] < 150 + 256
    assert found["own_growth_mib"] < 64


def test_good_answers_between_bombs_are_scored(pool):
    items = [RewardItem(BOMB, f"{i}.5") if i % 10 == 5 else RewardItem(f"\\boxed{{{i}}}", f"{i}.0") for i in range(30)]
    results = pool.score(items)
    assert [i for i, result in enumerate(results) if result == RewardResult(0.0, "timeout")] == [5, 15, 25]
    assert all(result == RewardResult(1.0) for i, result in enumerate(results) if i % 10 != 5)
    assert "no result within" in pool.last_cause


def test_same_answer_to_the_same_gold_is_verified_once(pool):
    before = pool._finished_tasks
    results = pool.score([RewardItem(f"way {i}: {BOMB}", "5") for i in range(20)])
    assert results == [RewardResult(0.0, "timeout")] * 20
    assert pool._finished_tasks - before == 1


def test_what_was_begun_early_is_scored_once(plugin_pool):
    items = [RewardItem("a" * n, "gold", "q") for n in (1, 2, 3, 2)]
    before = plugin_pool._finished_tasks
    for item in reversed(items):
        plugin_pool.begin(item)
    wait(list(plugin_pool._begun.values()))
    assert plugin_pool._finished_tasks - before == 3
    results = plugin_pool.score(items)
    assert [result.reward for result in results] == pytest.approx([1.1, 2.1, 3.1, 2.1])
    assert plugin_pool._finished_tasks - before == 3
    assert not plugin_pool._begun
    assert plugin_pool.score(items) == results


def test_what_was_begun_on_workers_that_died_is_scored_on_new_ones(plugin_pool):
    plugin_pool.begin(RewardItem("sleep", "gold"))
    plugin_pool.begin(RewardItem("abc", "gold"))
    plugin_pool._replace_pool()
    assert plugin_pool.score([RewardItem("abc", "gold")])[0].reward == 3.0


def test_submit_gives_futures(pool):
    futures = [pool.submit(RewardItem(text, "5")) for text in ("\\boxed{5}", BOMB, "\\boxed{6}", "x" * (MAX_CHARS + 1))]
    done, _ = wait(futures, timeout=PATIENCE_S)
    assert len(done) == 4
    statuses = [future.result().status for future in futures]
    assert statuses == ["ok", "timeout", "ok", "too_long"]
    assert futures[0].result() == RewardResult(1.0)


def test_an_unreadable_gold_answer_is_an_error(pool):
    results = pool.score([RewardItem(r"\boxed{5}", ""), RewardItem(r"\boxed{5}", "5")])
    assert results == [RewardResult(0.0, "error"), RewardResult(1.0)]
    assert "cannot read the gold answer" in pool.last_cause
    with pytest.raises(SgpoError, match=r"failed on all 2 completions.*cannot read the gold answer"):
        pool.score([RewardItem(r"\boxed{5}", "")] * 2)


def test_a_reward_of_ones_own_sees_the_whole_completion_and_the_problem(plugin_pool):
    assert plugin_pool.score([RewardItem("abc", "", "12"), RewardItem("abc", "")]) == [
        RewardResult(3.2),
        RewardResult(3.0),
    ]


@pytest.mark.parametrize(
    ("completion", "status", "cause"),
    [
        ("spin", "timeout", "no result within"),
        ("sleep", "timeout", "no result within"),
        ("exit", "error", "died with exit code 3"),
        ("segfault", "error", "died with exit code -11"),
        ("memory", "error", "MemoryError"),
        ("raise", "error", "Unpicklable: on purpose"),
        ("text", "error", "returned 'five': expected a finite number"),
    ],
)
def test_what_goes_wrong_is_named_and_counted(plugin_pool, completion, status, cause):
    before = plugin_pool.counts[status]
    assert plugin_pool.score([RewardItem(completion, ""), RewardItem("abcd", "")]) == [
        RewardResult(0.0, status),
        RewardResult(4.0),
    ]
    assert plugin_pool.counts[status] == before + 1
    assert cause in plugin_pool.last_cause
    assert status != "timeout" or f"{TIMEOUT_S} s" in plugin_pool.last_cause


def test_a_reward_that_always_fails_stops_the_run(plugin_pool):
    with pytest.raises(SgpoError, match="failed on all 2 completions; first cause: Unpicklable: on purpose"):
        plugin_pool.score([RewardItem("raise", "")] * 2)
    assert plugin_pool.score([RewardItem("ab", "")]) == [RewardResult(2.0)]


def test_workers_do_not_import_the_training_stack(plugin_pool):
    assert plugin_pool.score([RewardItem("foreign modules", "")]) == [RewardResult(0.0)]


def test_a_worker_killed_from_outside_is_replaced(plugin_pool):
    pid = int(plugin_pool.score([RewardItem("pid", "")])[0].reward)
    os.kill(pid, signal.SIGKILL)
    wait_for_end(pid)
    time.sleep(0.3)  # pebble notices, and gives the whole pool up: its idle workers should never end
    assert plugin_pool.score([RewardItem("ab", ""), RewardItem("abc", "")]) == [RewardResult(2.0), RewardResult(3.0)]


def test_workers_that_stop_answering_are_replaced(monkeypatch, tmp_path):
    (tmp_path / "plugin_to_stop.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sgpo.rewards.pool._STALL_S", 5.0)
    with RewardPool("plugin_to_stop:reward", workers=1, timeout_s=TIMEOUT_S) as pool:
        pid = int(pool.score([RewardItem("pid", "")])[0].reward)
        os.kill(pid, signal.SIGSTOP)  # as good as a lock that a dead process holds: no task is ever taken
        assert pool.score([RewardItem("ab", ""), RewardItem("abc", "")]) == [RewardResult(2.0), RewardResult(3.0)]
    wait_for_end(pid)


def test_close_kills_busy_workers_and_ends_what_is_pending(tmp_path, monkeypatch):
    (tmp_path / "plugin_to_close.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    pool = RewardPool("plugin_to_close:reward", workers=1, timeout_s=PATIENCE_S)
    pid = int(pool.submit(RewardItem("pid", "")).result(timeout=PATIENCE_S).reward)
    pending = [pool.submit(RewardItem(text, "")) for text in ["spin", *(f"{i}" * 100_000 for i in range(30))]]
    time.sleep(0.3)
    start = time.monotonic()
    pool.close()
    pool.close()
    assert time.monotonic() - start < PROMPT_S
    wait_for_end(pid)
    assert [future.result(timeout=PROMPT_S) for future in pending] == [RewardResult(0.0, "error")] * 31
    with pytest.raises(SgpoError, match="reward pool is closed"):
        pool.score([RewardItem("a", "")])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_module_of_mine:fn", "'no_such_module_of_mine:fn' cannot be imported"),
        ("plugin_that_breaks:fn", "'plugin_that_breaks:fn' cannot be used: ZeroDivisionError"),
        ("plugin_that_kills:fn", "'plugin_that_kills:fn' cannot be used: the worker process died while loading it"),
    ],
)
def test_a_reward_that_cannot_be_loaded_is_an_error_at_the_start(spec, message, tmp_path, monkeypatch):
    (tmp_path / "plugin_that_breaks.py").write_text("1 / 0\n")
    (tmp_path / "plugin_that_kills.py").write_text("import os\nos._exit(4)\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SgpoError, match=message):
        RewardPool(spec, workers=1)


def test_limits_must_be_positive():
    with pytest.raises(SgpoError, match="above 0"):
        RewardPool(timeout_s=0)


TRAINER = """
import time
open("started", "a").write("x")
from sgpo.rewards.pool import RewardItem, RewardPool
pool = RewardPool("plugin_to_orphan:reward", workers=2, timeout_s=1000)
pids = set()
while len(pids) < 2:
    futures = [pool.submit(RewardItem("pid", "", str(i))) for i in range(20)]
    pids |= {int(future.result().reward) for future in futures}
pool.submit(RewardItem("spin", ""))
pool.submit(RewardItem("sleep", ""))
time.sleep(0.5)
print(*pids, flush=True)
time.sleep(1000)
"""


def test_a_killed_trainer_leaves_no_workers_and_its_script_runs_once(tmp_path):
    (tmp_path / "plugin_to_orphan.py").write_text(PLUGIN)
    (tmp_path / "train.py").write_text(TRAINER)
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    trainer = subprocess.Popen(
        [sys.executable, "train.py"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert trainer.stdout is not None
        pids = [int(pid) for pid in trainer.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(process_runs, pids))
    finally:
        trainer.kill()
        trainer.wait()
    wait_for_end(*pids)
    assert (tmp_path / "started").read_text() == "x"
