"""The sinks leave the rows they were given, also after a crash and a resume, and the display never gets in the way."""

from __future__ import annotations

import io
import json
import math
import sys
import types
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console

from sgpo.reporting.live_display import LiveDisplay, sparkline
from sgpo.reporting.run_files import read_jsonl
from sgpo.reporting.run_logs import MetricsLogger, RolloutTable
from sgpo.types import SgpoError


def _log_run(run_dir: Path, steps: range, resume_step: Mapping[str, int] | None = None) -> None:
    with MetricsLogger(run_dir, resume_step=resume_step) as logger:
        for step in steps:
            logger.log("train", step, {"accuracy_auto": step / 10, "loss": 1.0 / step})
            if step % 2 == 0:
                logger.log("eval", step, {"accuracy": step / 20, "k": 4})


def test_rows_start_with_phase_and_step_and_keep_the_keys_in_order(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path / "new" / "run") as logger:
        logger.log("train", 3, {"zeta": 1, "alpha_mean": 0.25, "note": "first", "missing": None})
    line = (tmp_path / "new" / "run" / "metrics.jsonl").read_text()
    expected = '{"phase": "train", "step": 3, "zeta": 1, "alpha_mean": 0.25, "note": "first", "missing": null}\n'
    assert line == expected


def test_a_row_is_on_disk_before_close(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path)
    logger.log("train", 1, {"loss": 0.5})
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"phase": "train", "step": 1, "loss": 0.5}]
    logger.close()
    logger.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_floats_become_null(tmp_path: Path, value: float) -> None:
    with MetricsLogger(tmp_path) as logger:
        logger.log("train", 1, {"loss": value})
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] is None


def test_a_resumed_run_leaves_the_same_file_as_a_straight_one(tmp_path: Path) -> None:
    _log_run(tmp_path / "straight", range(1, 9))
    _log_run(tmp_path / "resumed", range(1, 8))
    with (tmp_path / "resumed" / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "train", "step": 8, "accu')  # the crash
    _log_run(tmp_path / "resumed", range(5, 9), resume_step={"train": 4, "eval": 4})
    straight = (tmp_path / "straight" / "metrics.jsonl").read_bytes()
    assert (tmp_path / "resumed" / "metrics.jsonl").read_bytes() == straight
    assert [path.name for path in (tmp_path / "resumed").iterdir()] == ["metrics.jsonl"]


def test_a_phase_that_resume_does_not_name_keeps_its_rows_and_minus_one_drops_a_phase(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path) as logger:
        logger.log("warmup", 90, {"loss": 2.0})
        logger.log("eval", 0, {"accuracy": 0.1})
        logger.log("train", 1, {"loss": 1.0})
    MetricsLogger(tmp_path, resume_step={"train": -1, "eval": 0}).close()
    assert [row["phase"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == ["warmup", "eval"]


def test_without_resume_rows_are_appended_and_only_a_torn_line_goes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"phase": "warmup", "step": 1}\n{"phase": "warmup", "step": 2, "note": "\xe2\x82')
    _log_run(tmp_path, range(1, 2))
    assert [(row["phase"], row["step"]) for row in read_jsonl(path)] == [("warmup", 1), ("train", 1)]


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"phase": "warmup", "step": 1}')
    _log_run(tmp_path, range(1, 2))
    assert len(read_jsonl(path)) == 2


def test_a_crash_during_the_rewrite_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _log_run(tmp_path, range(1, 5))
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def crash(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", crash)
    with pytest.raises(OSError, match="disk full"):
        MetricsLogger(tmp_path, resume_step={"train": 1})
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("bad", ["{torn", "[1, 2]", ""])
def test_a_bad_line_in_the_middle_is_an_error_with_file_and_line(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 2}}\n')
    with pytest.raises(SgpoError, match=r"rows\.jsonl:2: "):
        read_jsonl(path)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SgpoError, match="file not found"):
        read_jsonl(tmp_path / "none.jsonl")


def test_unknown_phases_and_reserved_names_are_refused(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path)
    with pytest.raises(ValueError, match="phase"):
        logger.log("training", 1, {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='"step"'):
        logger.log("train", 1, {"step": 2})
    with pytest.raises(ValueError, match="phase"):
        MetricsLogger(tmp_path, resume_step={"trian": 3})
    logger.close()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path / "run", is_main=False, tensorboard=True, wandb_project="p") as logger:
        logger.log("train", 1, {"loss": 1.0})
    with RolloutTable(tmp_path / "run", is_main=False) as table:
        table.add_trajectory(1, problem_id="a", tokens=["x"], kl=[0.1], masked=[False], max_token_kl=1.0)
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_the_numbers_and_a_resume_hides_the_dropped_steps(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLogger(tmp_path, tensorboard=True) as logger:
        logger.log("warmup", 9, {"loss": 3.0})
        for step in (1, 2, 3):
            logger.log("train", step, {"loss": float(step), "note": "text", "lr": None})
    with MetricsLogger(tmp_path, tensorboard=True, resume_step={"train": 1}) as logger:
        logger.log("train", 2, {"loss": 20.0})
    train = EventAccumulator(str(tmp_path / "tensorboard" / "train")).Reload()
    assert train.Tags()["scalars"] == ["train/loss"]
    assert [(event.step, event.value) for event in train.Scalars("train/loss")] == [(1, 1.0), (2, 20.0)]
    warmup = EventAccumulator(str(tmp_path / "tensorboard" / "warmup")).Reload()
    assert [event.step for event in warmup.Scalars("warmup/loss")] == [9]


def test_a_missing_wandb_or_tensorboard_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SgpoError, match="wandb package is not installed"):
        MetricsLogger(tmp_path, wandb_project="sgpo")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SgpoError, match="tensorboard package is not installed"):
        MetricsLogger(tmp_path, tensorboard=True)


class _FakeWandb:
    """Stands in for the wandb module and for the run it returns."""

    def __init__(self) -> None:
        self.inits: list[dict] = []
        self.rows: list[dict] = []
        self.finished = 0

    def init(self, **settings: object) -> _FakeWandb:
        self.inits.append(settings)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        assert name.split("/")[0] == step_metric.split("/")[0]

    def log(self, row: dict) -> None:
        self.rows.append(row)

    def finish(self) -> None:
        self.finished += 1


def test_wandb_gets_prefixed_rows_and_a_resumed_run_keeps_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = _FakeWandb()
    module = types.ModuleType("wandb")
    module.__dict__["init"] = fake.init
    monkeypatch.setitem(sys.modules, "wandb", module)
    for step in (1, 2):
        with MetricsLogger(tmp_path / "my-run", wandb_project="sgpo") as logger:
            logger.log("train", step, {"loss": 0.5, "note": "text"})
    assert fake.rows == [{"train/step": 1, "train/loss": 0.5}, {"train/step": 2, "train/loss": 0.5}]
    assert fake.finished == 2
    assert fake.inits[0]["name"] == "my-run"
    assert fake.inits[0]["id"] == fake.inits[1]["id"]


def _fill_table(run_dir: Path, steps: range, resume_step: int | None = None) -> None:
    with RolloutTable(run_dir, resume_step=resume_step) as table:
        for step in steps:
            table.add_rollout(
                step,
                problem_id="p1",
                kind="guided",
                reward=1.0,
                status="ok",
                truncated=False,
                is_target=True,
                text="über\n\\boxed{4}\u2028",
                length=7,
            )
            table.add_trajectory(
                step, problem_id="p1", tokens=["a", "$b"], kl=[0.5, math.inf], masked=[False, True], max_token_kl=1.0
            )


def test_rollout_table_rows_and_resume(tmp_path: Path) -> None:
    _fill_table(tmp_path / "straight", range(1, 5))
    _fill_table(tmp_path / "resumed", range(1, 4))
    _fill_table(tmp_path / "resumed", range(3, 5), resume_step=2)
    for name in ("rollouts.jsonl", "trajectories.jsonl"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    row = read_jsonl(tmp_path / "straight" / "rollouts.jsonl")[-1]
    assert row == {
        "step": 4,
        "problem_id": "p1",
        "kind": "guided",
        "reward": 1.0,
        "status": "ok",
        "truncated": False,
        "is_target": True,
        "text": "über\n\\boxed{4}\u2028",
        "length": 7,
    }
    trajectory = read_jsonl(tmp_path / "straight" / "trajectories.jsonl")[0]
    assert trajectory["kl"] == [0.5, None]
    assert trajectory["masked"] == [False, True]


def test_a_trajectory_of_unequal_lengths_is_refused(tmp_path: Path) -> None:
    with RolloutTable(tmp_path) as table, pytest.raises(ValueError, match="equal lengths, got 2, 1 and 2"):
        table.add_trajectory(1, problem_id="p", tokens=["a", "b"], kl=[0.1], masked=[False, False], max_token_kl=None)


def test_sparkline_has_a_fixed_scale() -> None:
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([0.5, 0.5]) == "▅▅"
    assert sparkline([-1.0, 2.0, math.inf, math.nan], ascii_only=True) == "_@@ "


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_when_not_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream, clock = io.StringIO(), _Clock()
    with LiveDisplay(5, console=Console(file=stream), clock=clock) as display:
        display.stage("rollout", total=8)
        display.advance(4, 1000)
        clock.now = 10.0
        display.step(1, {"accuracy_auto": 0.25, "kl_masked_share": 0.031, "lr": 1e-6, "note": "x", "entropy": None})
        display.step(1, {"accuracy": 0.5, "k": 4}, phase="eval")
        clock.now = 30.0
        display.step(2, {})
    assert stream.getvalue().splitlines() == [
        "train 1/5 | accuracy without strategy 0.250 | masked 3.1% | lr 1.00e-06 | ETA ?",
        "eval 1/5 | accuracy 0.500 | k 4 | ETA ?",
        "train 2/5 | ETA 0:01:00",
    ]


def test_the_time_left_counts_steps_also_after_a_resume_and_with_rare_reports() -> None:
    stream, clock = io.StringIO(), _Clock()
    with LiveDisplay(100, console=Console(file=stream), clock=clock) as display:
        for step in (50, 60, 80):
            clock.now += 10.0
            display.step(step, {}, phase="warmup")
    etas = [line.split("ETA ")[1] for line in stream.getvalue().splitlines()]
    assert etas == ["?", "0:00:40", "0:00:13"]


def test_other_ranks_display_nothing() -> None:
    stream = io.StringIO()
    with LiveDisplay(5, console=Console(file=stream), is_main=False) as display:
        display.step(1, {"accuracy_auto": 0.25})
    assert stream.getvalue() == ""


class _Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", [30, 120])
def test_live_panel_on_a_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream, clock = _Terminal(), _Clock()
    console = Console(file=stream, force_terminal=True, width=width, height=40)
    with LiveDisplay(30, title="run [bold]", console=console, clock=clock) as display:
        display.stage("rollout", total=96)
        clock.now = 2.0
        display.advance(48, 5000)
        for step in range(1, 26):
            display.step(step, {"accuracy_auto": step / 50, "alpha_mean": 0.4321, "loss": math.nan, "grad_norm": None})
        display.step(25, {"accuracy": 0.375, "accuracy_low": 0.3}, phase="eval")
        display.stage("sync")
    text = stream.getvalue()
    assert "\x1b[" in text  # it did draw in place
    if width == 120:
        for part in ("run [bold]", "step 25/30", "sync", "0.432", "held-out accuracy", "0.375", "▁", "+0.200", "ETA"):
            assert part in text


def test_the_terminal_is_given_back_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = _Terminal()

    def run() -> None:
        with LiveDisplay(3, console=Console(file=stream, force_terminal=True, width=80)) as display:
            display.stage("train", total=0)
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        run()
    assert stream.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor is visible again
