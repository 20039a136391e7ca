"""The trainer as users start it: whole runs on the built-in task, killed, resumed, split, broken."""

import json
import math
import random
import resource
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from forked import Forked
from tiny_runs import BASE, WARMUP, digest, finish, finish_all, rows, start

from sgpo.config import RolloutConfig
from sgpo.data import builtin
from sgpo.data.prompt_template import PromptTemplate, packaged
from sgpo.reporting.comparison import compare_runs
from sgpo.reporting.run_report import write_report
from sgpo.train import update
from sgpo.types import TrainSequence
from sgpo.utils.config_rules import GONE, RENAMED


def wait_for_lines(process: subprocess.Popen | Forked, path: Path, count: int) -> None:
    """Until the process has appended `count` lines to `path`, or has ended."""
    size, lines = path.stat().st_size if path.exists() else 0, 0
    while process.poll() is None and lines < count:
        time.sleep(0.01)
        now = path.stat().st_size if path.exists() else 0
        lines += now > size
        size = now


STEPS = 24
WITH_WARMUP = {**BASE, "warmup": WARMUP, "train": {"max_steps": STEPS}}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The undisturbed run: warm-up and training."""
    folder = tmp_path_factory.mktemp("straight")
    finish(folder, config=WITH_WARMUP, anew=True)
    return folder / "runs" / "tiny"


def test_a_run_leaves_everything_people_look_at(straight):
    names = {path.name for path in straight.iterdir()}
    assert {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "rollouts.jsonl",
        "summary.json",
        "report.html",
    } <= names
    assert {"final", "best", "checkpoints", "warmup", "plots"} <= names
    summary = json.loads((straight / "summary.json").read_text())
    wanted = {"accuracy_before", "accuracy_after", "guided_accuracy_before", "steps", "wall_s", "seed", "commit"}
    assert wanted <= summary.keys()
    assert (summary["steps"], summary["seed"]) == (STEPS, 3)
    assert json.loads((straight / "environment.json").read_text())["versions"]["torch"]
    assert len(rows(straight)) == STEPS
    assert [row["step"] for row in rows(straight, "eval")] == [0, STEPS]
    assert rows(straight, "warmup")[-1]["val_loss"] is not None


def test_metrics_say_what_happened(straight):
    for row in rows(straight):
        assert 0 <= row["accuracy_auto"] <= 1
        assert 0 <= row["alpha_mean"] <= 0.8
        assert row["lr"] == 1e-3
        assert row["problems"] == 4
        assert row["ratio_mean"] in (None, pytest.approx(1.0))
        assert row["kl_kept_mean"] is None or row["kl_kept_mean"] <= row["kl_mean"] + 1e-12
    live = [row for row in rows(straight) if row["distill_rows"]]
    assert live
    assert all(row["grad_norm"] > 0 and row["kl_mean"] >= 0 for row in live)


def test_the_export_is_a_plain_hugging_face_folder(straight):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(straight / "final")
    tokenizer = AutoTokenizer.from_pretrained(straight / "final")
    turns = [{"role": "user", "content": "farm"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=4).shape[1] > ids["input_ids"].shape[1]


def test_the_prompt_template_travels_with_every_export(straight):
    of_run = PromptTemplate.load(straight / "prompt_template.yaml")
    assert of_run == PromptTemplate.load(packaged("builtin"))
    for export in ("final", "best", "warmup/best"):
        assert PromptTemplate.load(straight / export / "prompt_template.yaml") == of_run


def test_ten_kills_end_bit_for_bit_where_the_straight_run_ends(straight, tmp_path):
    rng = random.Random(0)
    run = tmp_path / "runs" / "tiny"
    seen = []
    for _ in range(10):
        process = start(tmp_path, config=WITH_WARMUP)[0]
        # Counted from the first lines it writes: importing is not a moment worth killing.
        wait_for_lines(process, run / "metrics.jsonl", rng.randint(1, 2))
        time.sleep(rng.uniform(0.0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        seen.append(len((run / "metrics.jsonl").read_text().splitlines()))
    assert len(set(seen)) > 4, "the kills did not fall at different moments"
    finish(tmp_path, config=WITH_WARMUP)
    assert digest(run) == digest(straight)
    assert [row["step"] for row in rows(run)] == list(range(1, STEPS + 1))
    for ours, theirs in zip(rows(run), rows(straight), strict=True):
        assert ours["loss"] == theirs["loss"]
        assert ours["accuracy_auto"] == theirs["accuracy_auto"]
    assert (
        json.loads((run / "summary.json").read_text())["accuracy_after"]
        == (json.loads((straight / "summary.json").read_text())["accuracy_after"])
    )


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    finish(folder, anew=True)
    return folder / "runs" / "tiny"


# In the last, the longest sequence is longer than micro_batch_tokens, and fits because two processes share it.
@pytest.mark.parametrize(
    "overrides",
    [
        ["--engine.zero_stage=0"],
        ["--engine.zero_stage=3"],
        ["--engine.zero_stage=2", "--engine.sequence_parallel_size=2", "--engine.micro_batch_tokens=32",
         "--engine.packing=packed", "--plan.worst_case_step=true"],
    ],
)  # fmt: skip
def test_two_processes_give_the_loss_curve_of_one(plain_run, tmp_path, overrides):
    finish(tmp_path, *overrides, processes=2)
    pair = tmp_path / "runs" / "tiny"
    for alone, both in zip(rows(plain_run), rows(pair), strict=True):
        for key in ("loss", "accuracy_auto", "accuracy_guided", "alpha_mean", "grad_norm", "policy_rows", "problems"):
            assert both[key] == pytest.approx(alone[key], rel=1e-3, abs=1e-6), key


def test_old_logprobs_are_computed_of_policy_sequences_alone():
    """A target needs none: it does not go through the model for them."""
    asked = []

    def score(contexts):
        asked.extend(contexts)
        return [[-1.0] * len(completion) for _, completion in contexts]

    made = [
        TrainSequence((1,), (2, 3), distill_weight=0.5),
        TrainSequence((1,), (4, 5), advantage=-1.0, policy_weight=0.5, rollout_logprobs=(-1.5, -0.5)),
        TrainSequence((1,), (6,), advantage=0.0, policy_weight=0.5, rollout_logprobs=(-1.0,)),
    ]
    fixed = update._with_old_logprobs(made, score, RolloutConfig(importance_cap=2.0, importance_level="token"))
    assert asked == [((1,), (4, 5))]
    assert [s.old_logprobs for s in fixed] == [None, (-1.0, -1.0), None]
    assert fixed[1].importance == pytest.approx((math.exp(0.5), math.exp(-0.5)))
    assert [replace(s, old_logprobs=None, importance=None) for s in fixed] == made


def test_checkpoints_and_small_micro_batches_give_the_same_loss_curve(plain_run, tmp_path):
    """Every guided prompt has 39 tokens, more than half of the 64 of a micro-batch."""
    finish(
        tmp_path, "--model.gradient_checkpointing=true", "--engine.micro_batch_tokens=64", "--plan.worst_case_step=true"
    )
    found = rows(tmp_path / "runs" / "tiny")
    for plain, lean in zip(rows(plain_run), found, strict=True):
        for key in ("loss", "alpha_mean", "grad_norm", "target_share", "target_score_mean", "kl_mean"):
            assert lean[key] == pytest.approx(plain[key], rel=1e-3, abs=1e-6), key
    assert any(row["target_score_mean"] is not None for row in found)


SWITCHES = [
    ["--algorithm.over_limit=clamp", "--engine.column_tolerance=0.05"],
    ["--algorithm.over_limit=scale"],
    ["--algorithm.max_token_kl=null", "--algorithm.selection=all"],
    ["--algorithm.selection=mean", "--algorithm.alpha=fixed"],
    ["--algorithm.alpha=group_advantage", "--algorithm.normalize_std=false"],
    ["--algorithm.distillation=reverse_kl", "--algorithm.dual_clip=3.0"],
    ["--algorithm.distillation=js", "--algorithm.mini_batches=2"],
    ["--algorithm.distillation=sft"],
    ["--algorithm.autonomous_grpo=false"],
    ["--algorithm.distillation=none", "--model.dtype=bfloat16", "--engine.zero_stage=2"],
    ["--algorithm.method=grpo", "--rollout.n_guided=0", "--model.gradient_checkpointing=true"],
]


@pytest.fixture(scope="module")
def switched(tmp_path_factory):
    """Two steps with each of the switches."""
    folder = tmp_path_factory.mktemp("switches")
    finish_all(folder, {f"run{i}": ["--train.max_steps=2", *words] for i, words in enumerate(SWITCHES)})
    return folder / "runs"


@pytest.mark.parametrize("overrides", SWITCHES, ids=lambda overrides: " ".join(overrides).replace("--", ""))
def test_every_switch_runs_end_to_end(switched, overrides):
    found = rows(switched / f"run{SWITCHES.index(overrides)}")
    assert len(found) == 2
    assert all(row["loss"] is not None for row in found)
    assert any((row["grad_norm"] or 0) > 0 for row in found)
    text = " ".join(overrides)
    assert ("column_tolerance" in text) == any(row["column_share"] not in (None, 1) for row in found)
    distils = not any(word in text for word in ("sft", "none", "method=grpo"))
    if "autonomous_grpo=false" in text:
        assert all(row["policy_rows"] == 0 for row in found)
        distils = True
    assert any(row.get("distill_rows") for row in found) == distils


METHODS = {
    "sgpo": ["--algorithm.method=sgpo"],
    "sgpo-none": ["--algorithm.distillation=none"],
    "sgpo-sft": ["--algorithm.distillation=sft"],
    "sgpo-alone": ["--algorithm.autonomous_grpo=false"],
    "sgpo-ahead": ["--rollout.overlap=true", "--rollout.placement=process", "--rollout.importance_cap=2.0",
                   "--train.max_steps=2"],
    **{method: [f"--algorithm.method={method}", "--rollout.n_guided=0"] for method in ("grpo", "luffy", "hpt")},
    "dapo": ["--algorithm.method=dapo", "--rollout.n_guided=0", "--algorithm.refill_rounds=1"],
    "sft": ["--algorithm.method=sft", "--rollout.n_guided=0", "--rollout.n_auto=0"],
}  # fmt: skip
REWARDS = ("even", "right")  # the second: no variance


@pytest.fixture(scope="module")
def by_method(tmp_path_factory):
    """The folder with a step or two of every method with every reward."""
    folder = tmp_path_factory.mktemp("methods")
    common = ["--train.max_steps=1", "--data.eval=null", "--rollout.max_new_tokens=20"]
    runs = {
        f"{name}-{reward}": [*common, f"--reward.kind=plugin:{reward}", *words]
        for name, words in METHODS.items()
        for reward in REWARDS
    }
    finish_all(folder, runs)
    return folder / "runs"


@pytest.mark.parametrize("method", METHODS)
def test_every_step_logs_the_same_keys_whatever_it_held(by_method, method):
    found = [row for reward in REWARDS for row in rows(by_method / f"{method}-{reward}")]
    wanted = rows(by_method / "sgpo-even")[0].keys() | ({"overlap_wait_s"} if method == "sgpo-ahead" else set())
    for row in found:
        assert row.keys() == wanted
    always_learns = method in ("sft", "sgpo", "sgpo-sft", "sgpo-alone", "sgpo-ahead")  # o+ of what is right anyway too
    assert {row["micro_batches"] == 0 for row in found} == {False, not always_learns}
    for row in found:
        if row["micro_batches"] == 0:
            assert row["grad_norm"] is row["column_share"] is row["kl_max"] is row["sampler_gap_max"] is None
            assert row["policy_rows"] == row["distill_rows"] == row["dropped_mass"] == 0


def test_reports_are_written_of_steps_without_anything_to_learn(by_method, tmp_path):
    for name in ("sgpo-right", "sft-even"):
        write_report(by_method / name)
        assert (by_method / name / "report.html").stat().st_size > 10_000
    names = ("sgpo-right", "sgpo-none-right", "grpo-right")
    assert compare_runs([by_method / name for name in names], tmp_path).exists()


def test_problems_without_a_strategy_may_be_mixed_in_and_the_run_resumes(tmp_path):
    """No guided rollout is sampled for them; what a straight run gives, a resumed one gives."""
    problems = builtin.make_problems("train", seed=3, count=16)
    bare = {p.id for p in problems[::2]}
    lines = [
        {"id": p.id, "problem": p.problem, "answer": p.answer, "strategy": None if p.id in bare else p.strategy}
        for p in problems
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    template = Path(builtin.__file__).parent / "templates" / "builtin.yaml"
    words = ["--data.train=train.jsonl", "--data.eval=null", f"--data.template={template}", "--train.max_steps=3"]
    assert "8 of 16 problems have neither a strategy nor" in finish(tmp_path, *words, expect=2)
    words += ["--data.without_strategy=grpo", "--log.rollouts_per_step=4"]
    words += ["--reward.kind=plugin:graded", "--reward.correct_above=0.5"]  # rewards of 0, 0.5 and 1
    finish(tmp_path, *words)
    run = tmp_path / "runs" / "tiny"
    found = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    kinds = {kind: {row["problem_id"] for row in found if row["kind"] == kind} for kind in ("auto", "guided")}
    assert kinds["auto"] & bare
    assert kinds["guided"]
    assert not kinds["guided"] & bare
    assert all(row["correct"] == (row["reward"] > 0.5) for row in found)
    assert {0.5, 1.0} <= {row["reward"] for row in found}
    assert all(row["correct"] for row in found if row["is_target"])
    for row in rows(run):
        guided = len({r["problem_id"] for r in found if r["step"] == row["step"] and r["kind"] == "guided"})
        assert row["rollouts"] == 4 * 4 + 3 * guided
        assert (row["accuracy_guided"] is None) == (guided == 0)
    straight = digest(run)
    shutil.rmtree(run / "checkpoints" / "step-00000003")
    finish(tmp_path, *words)
    assert digest(run) == straight


@pytest.mark.parametrize("method", ["luffy", "sft"])
def test_a_method_with_demonstrations_runs_end_to_end(tmp_path, method):
    """A batch of 4 x 4 rollouts: the budget of 40 is spent after two steps (sft has none to spend)."""
    budget = ["--rollout.n_auto=0", "--train.max_steps=2"] if method == "sft" else ["--train.max_rollouts=40"]
    finish(tmp_path, "--rollout.n_guided=0", f"--algorithm.method={method}", "--rollout.max_new_tokens=20", *budget)
    found = rows(tmp_path / "runs" / "tiny")
    assert [row["step"] for row in found] == [1, 2]
    assert all(row["loss_distill"] != 0 and row["grad_norm"] > 0 for row in found)
    summary = json.loads((tmp_path / "runs" / "tiny" / "summary.json").read_text())
    assert summary["rollouts"] == (0 if method == "sft" else 32)
    assert summary["rollout_tokens"] == sum(row["rollout_tokens"] for row in found)


def test_a_worst_case_step_changes_nothing(plain_run, tmp_path):
    finish(tmp_path, "--plan.worst_case_step=true")
    assert digest(tmp_path / "runs" / "tiny") == digest(plain_run)


def test_dynamic_sampling_fills_its_steps_within_the_budget_and_resumes(tmp_path):
    """Of two rollouts all or none are often correct: some steps need more than one batch of 4 x 2 rollouts."""
    (tmp_path / "straight").mkdir()
    (tmp_path / "resumed").mkdir()
    words = ["--algorithm.method=dapo", "--rollout.n_guided=0", "--rollout.n_auto=2", "--train.max_rollouts=60"]
    finish(tmp_path / "straight", *words, "--train.max_steps=9")
    run = tmp_path / "straight" / "runs" / "tiny"
    found = rows(run)
    assert any(row["rollouts"] > 8 for row in found)
    assert sum(row["rollouts"] for row in found) == 56  # seven batches; an eighth would not fit
    for row in found[:-1]:  # the last one may have run out of budget
        assert row["policy_rows"] > 0
        assert 4 <= row["problems"] <= 40
    process = start(tmp_path / "resumed", *words, "--train.max_steps=9")[0]
    wait_for_lines(process, tmp_path / "resumed" / "runs" / "tiny" / "metrics.jsonl", 2)
    process.kill()
    process.communicate()
    finish(tmp_path / "resumed", *words, "--train.max_steps=9")
    assert digest(tmp_path / "resumed" / "runs" / "tiny") == digest(run)


def test_a_full_disk_stops_cleanly_and_the_run_goes_on_afterwards(plain_run, tmp_path):
    finish(tmp_path, "--train.max_steps=2")
    run = tmp_path / "runs" / "tiny"

    def small_files_only():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    output = finish(tmp_path, "--train.max_steps=4", "--run.resume=auto", expect=2, preexec=small_files_only)
    assert "belongs to a run with other settings" in output  # more steps are other settings: nothing is overwritten
    (run / "config.yaml").unlink()
    output = finish(tmp_path, expect=2, preexec=small_files_only)
    assert "could not be written" in output
    assert "earlier checkpoints are intact" in output
    assert "Traceback" not in output
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step-00000001", "step-00000002"]
    finish(tmp_path)
    assert digest(run) == digest(plain_run)


@pytest.mark.parametrize("value", [True, False])
def test_a_run_of_a_version_with_keys_that_are_gone_goes_on(plain_run, tmp_path, value):
    finish(tmp_path)
    run = tmp_path / "runs" / "tiny"
    for step in (3, 4):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}", ignore_errors=True)
    saved = yaml.safe_load((run / "config.yaml").read_text())
    for key in GONE.keys() - RENAMED:
        section, name = key.split(".")
        saved[section][name] = value
    saved["algorithm"]["target"] = saved["algorithm"].pop("selection")
    saved["model"]["lora"]["targets"] = saved["model"]["lora"].pop("modules")
    (run / "config.yaml").write_text(yaml.safe_dump(saved))
    finish(tmp_path)
    assert digest(run) == digest(plain_run)
    now = yaml.safe_load((run / "config.yaml").read_text())
    assert not [key for key in GONE if key.rsplit(".", 1)[1] in now[key.split(".")[0]]]
    assert (now["algorithm"]["selection"], now["model"]["lora"]["modules"]) == ("sum", ["all-linear"])


def test_resume_never_sets_the_old_run_aside(tmp_path):
    finish(tmp_path, "--train.max_steps=1")
    finish(tmp_path, "--train.max_steps=1", "--run.resume=never")
    assert (tmp_path / "runs" / "tiny.old-1" / "summary.json").exists()
    assert (tmp_path / "runs" / "tiny" / "summary.json").exists()


def test_a_finished_run_started_again_reports_the_same(plain_run):
    folder = plain_run.parents[1]
    before = digest(plain_run)
    output = finish(folder)
    assert "tiny: held-out accuracy" in output
    assert digest(plain_run) == before
