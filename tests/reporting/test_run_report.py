"""The report shows what a run logged, says what it did not, and never lets text of a rollout become markup."""

from __future__ import annotations

import base64
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from sgpo.reporting.comparison import COMPARED, compare_runs, draw_comparison, group_name
from sgpo.reporting.curves import CURVES, draw_curves, draw_held_out, draw_times, smooth
from sgpo.reporting.run_data import load_run, load_trajectory
from sgpo.reporting.run_logs import MetricsLogger, RolloutTable
from sgpo.reporting.run_report import write_report
from sgpo.reporting.trajectory import draw_trajectory
from sgpo.types import SgpoError

PNG_MAGIC = b"\x89PNG\r\n"
TRAIN_PLOTS = {"accuracy", "alpha", "entropy", "kl", "length", "loss", "problems", "times"}


def _log_run(run_dir: Path, steps: int, offset: float = 0.0) -> Path:
    with MetricsLogger(run_dir) as logger:
        logger.log("warmup", 1, {"loss": 2.0, "lr": 1e-5, "epoch": 0.5, "grad_norm": 1.0})
        logger.log("warmup", 1, {"val_loss": 2.5})
        for step in range(1, steps + 1):
            values = {
                "accuracy_auto": 0.3 + 0.01 * step + offset,
                "accuracy_guided": 0.7,
                "alpha_mean": 0.4,
                "alpha_uncapped_mean": 0.5,
                "alpha_live_share": 0.9,
                "kl_mean": 0.3,
                "kl_kept_mean": 0.1,
                "kl_masked_share": 0.02,
                "entropy": math.nan if step == 2 else 0.5,
                "length_auto": 100,
                "length_guided": 90,
                "zero_variance_share": 0.25,
                "target_share": 0.8,
                "loss": 0.1,
                "grad_norm": 0.5,
                "rollout_s": 4.0,
                "train_s": 3.0,
                "step_s": 10.0,
            }
            logger.log("train", step, values)
            if step % 2 == 0:
                accuracy = 0.4 + 0.01 * step + offset
                logger.log(
                    "eval",
                    step,
                    {"accuracy": accuracy, "accuracy_low": accuracy - 0.05, "accuracy_high": accuracy + 0.04, "k": 4},
                )
    return run_dir


def _log_samples(run_dir: Path, text: str, tokens: list[str]) -> None:
    with RolloutTable(run_dir) as table:
        for step in (1, 2):
            for index in range(6):
                table.add_rollout(
                    step,
                    problem_id="<p1>",
                    kind="guided" if index >= 4 else "auto",
                    reward=float(index == 5),
                    status="timeout" if index == 0 else "ok",
                    truncated=index == 1,
                    is_target=step == 1 and index == 5,
                    text=f"{text} step {step} sample {index}",
                )
            kl = [0.1] * (len(tokens) - 1) + [2.0]
            table.add_trajectory(
                step,
                problem_id="<p1> $x",
                tokens=tokens,
                kl=kl,
                masked=[value > 1 and step == 1 for value in kl],
                max_token_kl=1.0 if step == 1 else None,
            )


class _Page(HTMLParser):
    """The text of a page, the tags it uses, and whether every tag that opens also closes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text = ""
        self.tags: set[str] = set()
        self.sources: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_full_run_gives_every_plot_and_a_self_contained_page(tmp_path: Path) -> None:
    run_dir = _log_run(tmp_path / "run", 30)
    _log_samples(run_dir, "two plus two", ["two", " plus", "\n", "$two"])
    (run_dir / "summary.json").write_text('{"final_accuracy": 0.7312, "by_seed": [1, 2]}')
    (run_dir / "config.yaml").write_text("lr: 1.0e-6\n")
    report = write_report(run_dir)
    assert report == run_dir / "report.html"
    names = {path.stem for path in (run_dir / "plots").glob("*.png")}
    assert names == TRAIN_PLOTS | {"held_out", "trajectory", "warmup"}
    page = _Page(report.read_text(encoding="utf-8"))
    assert len(page.sources) == len(names)
    for source in page.sources:
        assert base64.b64decode(source.removeprefix("data:image/png;base64,")).startswith(PNG_MAGIC)
    for part in ("final_accuracy", "0.7312", "[1, 2]", "lr: 1.0e-6", "teacher completion", "timeout", "val_loss"):
        assert part in page.text
    assert "left out" not in page.text


def test_the_sample_shows_the_latest_step_that_has_a_target(tmp_path: Path) -> None:
    run_dir = _log_run(tmp_path / "run", 2)
    _log_samples(run_dir, "text", ["a"])
    text = _Page(write_report(run_dir).read_text()).text
    assert "text step 1 sample 5" in text
    assert "step 2 sample" not in text
    assert text.count("teacher completion") == 1


def test_all_text_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>&amp;"
    run_dir = _log_run(tmp_path / "run", 2)
    _log_samples(run_dir, evil, [evil, '"><b>'])
    with MetricsLogger(run_dir) as logger:
        logger.log("train", 3, {evil: evil})
    (run_dir / "summary.json").write_text(f'{{"{evil}": "{evil}"}}')
    (run_dir / "config.yaml").write_text(evil)
    page = _Page(write_report(run_dir).read_text())
    assert not page.tags & {"script", "b"}
    assert page.text.count(evil) >= 7  # twice in the summary, in the config, metrics, rollouts and the trajectory


def test_missing_data_is_a_sentence_and_not_an_error(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path) as logger:
        logger.log("train", 1, {"accuracy_auto": 0.5, "entropy": math.nan, "note": "text"})
    page = _Page(write_report(tmp_path).read_text())
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"accuracy.png"}
    for sentence in (
        "Entropy of the policy: left out, metrics.jsonl holds no number for entropy in phase train.",
        "Held-out accuracy: left out, metrics.jsonl holds no number for accuracy in phase eval.",
        "KL token by token: left out, trajectories.jsonl holds no trajectory.",
        "Left out, rollouts.jsonl holds no rollouts.",
        "summary.json is not there",
        "config.yaml is not there",
    ):
        assert sentence in page.text


def test_a_plot_that_lost_its_data_does_not_stay_behind(tmp_path: Path) -> None:
    write_report(_log_run(tmp_path, 4))
    assert (tmp_path / "plots" / "held_out.png").exists()
    MetricsLogger(tmp_path, resume_step={"eval": -1}).close()
    write_report(tmp_path)
    assert not (tmp_path / "plots" / "held_out.png").exists()
    assert (tmp_path / "plots" / "accuracy.png").exists()


def test_an_empty_metrics_file_gives_a_page(tmp_path: Path) -> None:
    MetricsLogger(tmp_path).close()
    assert "no rows yet" in _Page(write_report(tmp_path).read_text()).text


def test_damaged_input_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SgpoError, match=r"no metrics\.jsonl here"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"phase": "train", "step": 1}\n{"loss": 1}\n')
    with pytest.raises(SgpoError, match=r"metrics\.jsonl:2: "):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    for text, message in (("{", "not valid JSON"), ("[]", "expected a JSON object, got list")):
        (tmp_path / "summary.json").write_text(text)
        with pytest.raises(SgpoError, match=rf"summary\.json: {message}"):
            write_report(tmp_path)


def test_the_curves_carry_the_logged_numbers(tmp_path: Path) -> None:
    run = load_run(_log_run(tmp_path, 5))
    figure = draw_curves(run, CURVES[0])
    assert figure is not None
    auto, guided = figure.axes[0].lines
    np.testing.assert_array_equal(auto.get_xdata(), [1, 2, 3, 4, 5])
    np.testing.assert_allclose(np.asarray(auto.get_ydata()), [0.31, 0.32, 0.33, 0.34, 0.35])
    np.testing.assert_allclose(np.asarray(guided.get_ydata()), 0.7)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["without strategy", "with strategy"]
    steps, entropy = run.series("train", "entropy")
    np.testing.assert_array_equal(steps, [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(np.isnan(entropy), [False, True, False, False, False])


@pytest.mark.parametrize("plot", CURVES, ids=lambda plot: plot.name)
def test_every_axis_is_labelled_and_holds_its_data(tmp_path: Path, plot) -> None:
    figure = draw_curves(load_run(_log_run(tmp_path, 25)), plot)
    assert figure is not None
    assert figure.axes[-1].get_xlabel()
    for axes in figure.axes:
        assert axes.get_ylabel()
        low, high = axes.get_ylim()
        for line in axes.lines:
            values = np.asarray(line.get_ydata(), float)
            assert low <= np.nanmin(values)
            assert np.nanmax(values) <= high


def test_a_panel_without_data_is_left_out(tmp_path: Path) -> None:
    length = next(plot for plot in CURVES if plot.name == "length")
    figure = draw_curves(load_run(_log_run(tmp_path, 3)), length)  # the run logged no truncated shares
    assert figure is not None
    assert [axes.get_ylabel() for axes in figure.axes] == ["tokens"]


def test_the_interval_of_the_held_out_accuracy_is_the_logged_one(tmp_path: Path) -> None:
    figure = draw_held_out(load_run(_log_run(tmp_path, 4)))
    assert figure is not None
    (bars,) = figure.axes[0].containers
    segments = bars.lines[2][0].get_segments()
    np.testing.assert_allclose([segment[:, 1] for segment in segments], [[0.37, 0.46], [0.39, 0.48]])


def test_times_stack_up_to_the_whole_step(tmp_path: Path) -> None:
    figure = draw_times(load_run(_log_run(tmp_path, 200)))
    assert figure is not None
    heights = {str(bars.get_label()): [bar.get_height() for bar in bars] for bars in figure.axes[0].containers}
    assert {len(each) for each in heights.values()} == {60}
    np.testing.assert_allclose(np.sum(list(heights.values()), axis=0), 10.0)
    np.testing.assert_allclose(heights["other"], 3.0)


def test_smooth_is_a_centred_mean_that_skips_nan() -> None:
    np.testing.assert_allclose(smooth(np.array([1.0, 2.0, 6.0, np.nan]), 3), [1.5, 3.0, 4.0, 6.0])
    assert np.isnan(smooth(np.array([1.0, np.nan, np.nan, np.nan]), 3)).tolist() == [False, False, True, True]
    values = np.arange(5.0)
    np.testing.assert_array_equal(smooth(values, 1), values)


@pytest.mark.parametrize("count", [4, 60, 61, 300])
def test_a_trajectory_marks_masked_tokens_and_the_threshold(tmp_path: Path, count: int) -> None:
    _log_samples(tmp_path, "text", [f"t{index}" for index in range(count)])
    trajectory = load_trajectory(tmp_path)
    assert trajectory is not None
    assert trajectory.step == 1  # the later one has no masked token
    figure = draw_trajectory(trajectory)
    axes = figure.axes[-1]
    assert len(figure.axes) == (2 if count > 60 else 1)
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert len(labels) == min(count, 60)
    assert labels[-1] == f"t{count - 1}"  # the masked last token is in view
    bars = {str(container.get_label()): len(container) for container in axes.containers}
    assert bars == {"kept": min(count, 60) - 1, "masked": 1}
    np.testing.assert_array_equal(np.asarray(axes.lines[0].get_ydata()), 1.0)
    figure.savefig(tmp_path / "dollars.png")  # the "$" in the problem id must not start a formula


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("sgpo-seed3", "sgpo"),
        ("sgpo_s12", "sgpo"),
        ("sgpo/seed0", "sgpo"),
        ("sgpo/s1", "sgpo"),
        ("sgpo.SEED=4", "sgpo"),
        ("qwen-7b", "qwen-7b"),
        ("steps10", "steps10"),
    ],
)
def test_group_name(tmp_path: Path, folder: str, name: str) -> None:
    assert group_name(tmp_path / folder) == name


def test_a_comparison_is_the_mean_over_seeds_at_shared_steps(tmp_path: Path) -> None:
    long, short = _log_run(tmp_path / "a-seed0", 8), _log_run(tmp_path / "a-seed1", 6, offset=0.1)
    groups = {"a": [load_run(long), load_run(short)], "b": [load_run(_log_run(tmp_path / "b", 8, offset=0.2))]}
    figure = draw_comparison(groups, COMPARED[0])
    assert figure is not None
    mean, single = figure.axes[0].lines
    np.testing.assert_array_equal(mean.get_xdata(), [2, 4, 6])
    np.testing.assert_allclose(np.asarray(mean.get_ydata()), [0.47, 0.49, 0.51])
    np.testing.assert_array_equal(single.get_xdata(), [2, 4, 6, 8])
    (band,) = figure.axes[0].collections
    vertices = band.get_paths()[0].vertices
    assert (vertices[:, 1].min(), vertices[:, 1].max()) == pytest.approx((0.42, 0.56))


def test_compare_runs_writes_page_and_plots(tmp_path: Path) -> None:
    runs = [_log_run(tmp_path / f"sgpo-seed{seed}", 6, offset=0.1 * seed) for seed in (0, 1)]
    runs.append(_log_run(tmp_path / "gr<po", 6))
    page_path = compare_runs(runs, tmp_path / "out")
    page = _Page(page_path.read_text())
    assert page_path == tmp_path / "out" / "compare.html"
    assert len(page.sources) == len(COMPARED) == len(list((tmp_path / "out" / "plots").glob("*.png")))
    cells = re.sub(r"\s+", " ", page.text)
    assert "sgpo260.510.460.56" in cells  # 2 seeds, step 6, mean, lowest and highest
    assert "gr<po" in cells


def test_compare_says_what_is_missing(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path / "a") as logger:
        logger.log("train", 1, {"accuracy_auto": 0.5})
    page = _Page(compare_runs([tmp_path / "a"], tmp_path / "out").read_text())
    assert "Held-out accuracy: left out, no run name has accuracy" in page.text
    with pytest.raises(SgpoError, match="2 names"):
        compare_runs([tmp_path / "a"], tmp_path / "out", names=["x", "y"])
    with pytest.raises(SgpoError, match="0 runs"):
        compare_runs([], tmp_path / "out")
    with pytest.raises(SgpoError, match=r"no metrics\.jsonl"):
        compare_runs([tmp_path / "nowhere"], tmp_path / "out")
