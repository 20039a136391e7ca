"""Files of samples, and the statements made from them."""

import json

import pytest

from sgpo.evaluation.sample_log import SampleLog, missing, read_samples
from sgpo.evaluation.scores import compare, compare_files, score
from sgpo.types import SgpoError

SETTING = {"benchmark": "b", "problem_count": 3, "problems": "hash", "samples": 4, "temperature": 0.6}


def row(name, sample, reward, **more):
    return {"id": name, "sample": sample, "reward": reward, "tokens": 10, "truncated": False, "status": "ok", **more}


def write(path, table, **setting):
    """One problem per row of `table`, one sample per reward."""
    lines = [{"setting": {**SETTING, "problem_count": len(table), "samples": len(table[0]), **setting}}]
    lines += [row(f"p{i}", k, reward) for i, rewards in enumerate(table) for k, reward in enumerate(rewards)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_score_by_hand(tmp_path):
    samples = read_samples(write(tmp_path / "a.jsonl", [[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]))
    samples.rows["p2", 0].update(status="timeout", tokens=34, truncated=True)
    found = score(samples, seed=0)
    assert (found.problems, found.samples, found.accuracy) == (3, 4, pytest.approx(1.25 / 3))
    # pass@2 of one right in four: 1 - C(3,2)/C(4,2) = 1/2.
    assert [(rate.k, rate.value) for rate in found.pass_at] == [
        (1, pytest.approx(1.25 / 3)), (2, pytest.approx(1.5 / 3)), (4, pytest.approx(2 / 3)),
    ]  # fmt: skip
    assert found.interval == (0.0, 1.0)
    assert (found.length, found.truncated, found.statuses) == (12.0, pytest.approx(1 / 12), {"ok": 11, "timeout": 1})
    clean = score(samples, seed=0, leave_out={"p2"})
    assert (clean.problems, clean.accuracy, clean.statuses) == (2, pytest.approx(1.25 / 2), {"ok": 8})
    with pytest.raises(SgpoError, match="no problem left"):
        score(samples, seed=0, leave_out={"p0", "p1", "p2"})


def test_a_sample_is_correct_above_the_threshold_of_its_setting(tmp_path):
    """A reward of exactly 0.5 is wrong there, and right where files of before say nothing of a threshold."""
    table = [[1.0, 0.5], [0.75, 0.25]]
    assert score(read_samples(write(tmp_path / "a.jsonl", table, correct_above=0.5)), seed=0).accuracy == 0.5
    assert score(read_samples(write(tmp_path / "b.jsonl", table)), seed=0).accuracy == 1.0


def test_the_nested_interval_is_the_wider_one(tmp_path):
    table = [[int((7 * i + 3 * k) % 5 < 2) for k in range(5)] for i in range(30)]
    found = score(read_samples(write(tmp_path / "a.jsonl", table)), seed=0)
    assert [rate.k for rate in found.pass_at] == [1, 2, 4, 5]
    assert found.interval == (0.4, 0.4)  # every problem: two of five
    assert found.nested_interval[0] < 0.39
    assert found.nested_interval[1] > 0.41


def test_a_comparison_by_hand(tmp_path):
    a = write(tmp_path / "a.jsonl", [[0, 0], [1, 0], [1, 1], [0, 0]], model="x")
    b = write(tmp_path / "b.jsonl", [[1, 1], [1, 1], [1, 0], [0, 0]], model="y")
    (found,) = compare_files(a, b)
    assert (found.accuracy_a, found.accuracy_b, found.difference) == (0.375, 0.625, 0.25)
    assert (found.wins, found.losses, found.ties, found.problems) == (2, 1, 1, 4)
    # |±1 ±.5 ±.5| >= 1 for 6 of the 8 signs.
    assert found.p_value == pytest.approx(6 / 8)
    assert found.interval[0] < 0.25 < found.interval[1]
    assert found.notes == ()
    (back,) = compare_files(b, a)
    assert (back.difference, back.wins, back.losses, back.p_value) == (-0.25, 1, 2, found.p_value)


def test_only_the_same_problems_are_compared(tmp_path):
    a = read_samples(write(tmp_path / "a.jsonl", [[1], [0]]))
    with pytest.raises(SgpoError, match=r"different problems \(1 are in one only, first 'p2'\)"):
        compare(a, read_samples(write(tmp_path / "more.jsonl", [[1], [0], [0]])))
    with pytest.raises(SgpoError, match="texts or answers do not"):
        compare(a, read_samples(write(tmp_path / "text.jsonl", [[1], [0]], problems="other")))
    with pytest.raises(SgpoError, match=r"is over b and .* over c"):
        compare(a, read_samples(write(tmp_path / "c.jsonl", [[1], [0]], benchmark="c")))
    with pytest.raises(SgpoError, match="unfinished: 2 of 6"):
        compare(a, read_samples(write(tmp_path / "rest.jsonl", [[1], [0]], problem_count=3, samples=2)))
    other = read_samples(write(tmp_path / "other.jsonl", [[1], [0]], temperature=1.0))
    assert compare(a, other).notes == ("temperature: 0.6, now 1.0",)
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    with pytest.raises(SgpoError, match="no benchmark in common"):
        compare_files(tmp_path / "x", tmp_path / "y")


def test_a_torn_last_line_is_dropped_and_written_again(tmp_path):
    path = tmp_path / "log.jsonl"
    text = "half \ud800 and \u2028 whole"
    with SampleLog(path, SETTING, {"v": 1}) as log:
        log.append(row("p0", 0, 1.0, text=text))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"id": "p0", "sample": 1, "rew')
    with SampleLog(path, SETTING, {"v": 2}) as log:
        assert list(log.samples.rows) == [("p0", 0)]
        assert log.samples.rows["p0", 0]["text"] == text
        assert missing(log.samples, ["p0", "p1"], 2) == [("p0", 1), ("p1", 0), ("p1", 1)]
        log.append(row("p0", 1, 0.0))
        log.finish()
        log.append(row("p1", 0, 0.0))  # too late
    assert path.read_bytes().startswith(whole)
    assert list(read_samples(path).rows) == [("p0", 0), ("p0", 1)]


@pytest.mark.parametrize("cut", [0, 5])
def test_a_header_that_was_cut_off_is_written_again(tmp_path, cut):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"setting": {'[:cut])
    with SampleLog(path, SETTING, {}):
        pass
    assert read_samples(path).setting == SETTING


def test_one_process_at_a_time_and_one_setting(tmp_path):
    path = tmp_path / "log.jsonl"
    with SampleLog(path, SETTING, {}), pytest.raises(SgpoError, match="being written by another"):
        SampleLog(path, SETTING, {})
    with pytest.raises(SgpoError, match=r"another setting \(temperature: 0.6, now 0.7\)"):
        SampleLog(path, {**SETTING, "temperature": 0.7}, {})
    with SampleLog(path, SETTING, {}):
        pass


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", ":2 is no sample"),
        ('{"id": "p0"}', ":2 is no sample"),
        ("[1]", ":2 is no sample"),
        (json.dumps(row("p9", 0, 1)) + "\n" + json.dumps(row("p9", 0, 1)), ":3 repeats sample 0 of 'p9'"),
    ],
)
def test_a_damaged_file_is_named_by_line(tmp_path, line, message):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"setting": SETTING}) + "\n" + line + "\n")
    with pytest.raises(SgpoError, match=message):
        SampleLog(path, SETTING, {})
    with pytest.raises(SgpoError, match="cannot be read"):
        read_samples(tmp_path / "absent.jsonl")


def test_a_full_disk_is_an_error_and_not_a_lost_sample(tmp_path):
    with open("/dev/full", "wb", buffering=0) as full, SampleLog(tmp_path / "log.jsonl", SETTING, {}) as log:
        file, log._file = log._file, full
        log.append(row("p0", 0, 1.0))
        log._file = file
        with pytest.raises(SgpoError, match="cannot be written: No space left"):
            log.check()
        assert ("p0", 0) not in log.samples.rows
