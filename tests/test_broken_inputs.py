"""Broken input: one clear sentence, exit code 2, and no rollout before it."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from sgpo.cli import main
from sgpo.config import Config
from sgpo.utils.config_file import known_keys

ROWS = [
    {"id": f"p{i}", "problem": f"farm : {i} 2 3 4 . how many eggs ?", "answer": str(i), "strategy": "pick first ."}
    for i in range(1, 9)
]
BASE = {
    "run": {"name": "broken"},
    "model": {"path": "model", "dtype": "float32"},
    "data": {"train": "train.jsonl", "max_prompt_tokens": 64, "template": "template.yaml"},
    "rollout": {"engine": "hf", "problems_per_step": 4, "n_auto": 2, "n_guided": 2, "max_new_tokens": 4},
    "reward": {"kind": "exact", "workers": 1},
    "engine": {"micro_batch_tokens": 256},
    "train": {"max_steps": 1},
}
TEMPLATE = {"system": None, "plain": "{problem}", "guided": "{strategy}\n{problem}"}


@pytest.fixture(scope="module", autouse=True)
def no_process_group_afterwards():
    """Training in this process joins a process group of one; later tests must not find it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            patch.setenv(name, "0")  # so that what training sets is undone
            patch.delenv(name)
        yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def folder(tmp_path, builtin_folder, monkeypatch):
    """A folder in which `sgpo train config.yaml` works, until a test breaks something."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(builtin_folder, tmp_path / "model")
    write_rows(ROWS)
    Path("template.yaml").write_text(yaml.safe_dump(TEMPLATE))
    Path("config.yaml").write_text(yaml.safe_dump(BASE))
    return tmp_path


def write_rows(rows, path="train.jsonl"):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def refused(capsys, *arguments: str) -> str:
    """Runs the command line, which must refuse, and returns its sentence with the rows or prompts it lists."""
    code = main(list(arguments) or ["train", "config.yaml"])
    errors = capsys.readouterr().err
    assert code == 2
    assert errors.count("sgpo: ") == 1
    assert "Traceback" not in errors
    assert not list(Path().glob("runs/*/rollouts.jsonl"))
    return errors[errors.index("sgpo: ") :]


OVERRIDES = [
    ("--algorithm.clip_low=-0.1", "algorithm.clip_low"),
    ("--algorithm.clip_high=-1", "algorithm.clip_high"),
    ("--algorithm.alpha_max=0.1", "alpha_max = 0.1 is below alpha_0 = 0.5"),
    ("--algorithm.max_token_kl=0", "algorithm.max_token_kl"),
    ("--algorithm.dual_clip=0.5", "algorithm.dual_clip"),
    ("--algorithm.over_limit=cut", "algorithm.over_limit"),
    ("--engine.sequence_parallel_size=0", "engine.sequence_parallel_size"),
    ("--engine.sequence_parallel_size=2", "must divide the number of processes, which is 1"),
    ("--algorithm.cliplow=0.2", "did you mean 'algorithm.clip_low'"),
    ("--rolout.n_auto=8", "unknown key 'rolout'; did you mean 'rollout'"),
    ("--rollout.n_auto=1", "no group to compare"),
    ("--rollout.n_guided=0", "nothing to distil"),
    ("--rollout.n_auto=two", "rollout.n_auto"),
    ("--rollout.temperature=0", "rollout.temperature"),
    ("--rollout.top_p=1.5", "rollout.top_p"),
    ("--rollout.max_new_tokens=0", "rollout.max_new_tokens"),
    ("--rollout.problems_per_step=100", "fewer than rollout.problems_per_step = 100"),
    ("--algorithm.method=grpo", "set rollout.n_guided to 0"),
    ("--algorithm.mini_batches=3", "must divide"),
    ("--engine.zero_stage=4", "engine.zero_stage"),
    ("--engine.micro_batch_tokens=8", "more than engine.micro_batch_tokens = 8"),
    ("--data.max_prompt_tokens=5", "more than max_prompt_tokens = 5"),
    ("--data.train=nowhere.jsonl", "nowhere.jsonl"),
    ("--data.eval=train.jsonl", "p1"),
    ("--data.template=none.yaml", "none.yaml"),
    ("--model.path=nowhere", "model folder nowhere"),
    ("--model.dtype=float8", "model.dtype"),
    ("--model.attn_implementation=flash_attention_9", "no model can be loaded"),
    ("--reward.kind=nowhere:fn", "nowhere"),
    ("--reward.kind=json:nothing", "nothing"),
    ("--reward.kind=mathverify", "mathverify"),
    ("--optim.lr=nan", "optim.lr"),
    ("--warmup.enabled=true", "warmup.enabled needs warmup.data"),
    ("--run.name=a/b", "run.name"),
    ("--log.wandb_project=x", "wandb"),
]


@pytest.mark.parametrize(("override", "expected"), OVERRIDES, ids=[o for o, _ in OVERRIDES])
def test_a_bad_knob(folder, capsys, override, expected):
    if "wandb" in override and importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed, so asking for it is no mistake")
    assert expected in refused(capsys, "train", "config.yaml", override)


def _row(**changes):
    return {**ROWS[0], **changes}


DATA = [
    ([*ROWS, "{"], "train.jsonl:9"),
    ([*ROWS, _row(id="x", answer="")], "train.jsonl:9"),
    ([*ROWS, _row(id="x", answer=None)], "train.jsonl:9"),
    ([*ROWS, _row(id="p3")], "p3"),
    ([*ROWS, {"id": "x", "answer": "3"}], "problem"),
    ([*ROWS, ["no object"]], "train.jsonl:9"),
    ([*ROWS, _row(id="x", strategy=None)], "neither a strategy nor guidance"),
    ([*ROWS, _row(id="x", guidance_turns=[{"role": "robot", "content": "hi"}])], "train.jsonl:9"),
    ([], "train.jsonl"),
]


@pytest.mark.parametrize(("rows", "expected"), DATA, ids=[expected for _, expected in DATA])
def test_a_bad_data_file(folder, capsys, rows, expected):
    Path("train.jsonl").write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    assert expected in refused(capsys)


def test_solutions_without_calculator_marks(folder, capsys):
    write_rows([{**row, "strategy": None, "solution": "no marks"} for row in ROWS])
    assert "calculator marks" in refused(capsys, "train", "config.yaml", "--data.strategy_source=calculator_trace")


def test_bytes_that_are_not_text(folder, capsys):
    Path("train.jsonl").write_bytes(json.dumps(ROWS[0]).encode() + b'\n{"id": "\xff\xfe"}\n')
    assert "train.jsonl:2" in refused(capsys)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("model: [", "not valid YAML"), ("- 1", "must be a mapping"), ("data: {train: x}", "model"), ("", "mapping")],
)
def test_a_bad_config_file(folder, capsys, text, expected):
    Path("config.yaml").write_text(text)
    assert expected in refused(capsys)


def test_no_config_file(folder, capsys):
    assert "missing.yaml does not exist" in refused(capsys, "train", "missing.yaml")


@pytest.mark.parametrize("extra", [["--rollout.n_auto"], ["stray"]])
def test_bad_command_lines(folder, capsys, extra):
    assert extra[-1].lstrip("-") in refused(capsys, "train", "config.yaml", *extra)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ({**TEMPLATE, "guided": "{problem}"}, "strategy"),
        ({**TEMPLATE, "plain": "no placeholder"}, "problem"),
        ({"plain": "{problem}"}, "guided"),
    ],
)
def test_a_bad_prompt_template(folder, capsys, template, expected):
    Path("template.yaml").write_text(yaml.safe_dump(template))
    assert expected in refused(capsys)


def _edit_chat_template(text: str | None) -> None:
    for path in Path("model").glob("chat_template*"):
        path.unlink()
    config = json.loads(Path("model/tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    if text is not None:
        config["chat_template"] = text
    Path("model/tokenizer_config.json").write_text(json.dumps(config))


def test_a_tokenizer_without_chat_template(folder, capsys):
    _edit_chat_template(None)
    assert "chat template" in refused(capsys)


def test_a_chat_template_without_generation_prompt(folder, capsys):
    _edit_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert "generation prompt" in refused(capsys)


def test_sequences_longer_than_the_model_allows(folder, capsys):
    overrides = ("--rollout.max_new_tokens=250", "--engine.micro_batch_tokens=4096")
    assert "more than 256, the positions" in refused(capsys, "train", "config.yaml", *overrides)


def test_damaged_weights(folder, capsys):
    Path("model/model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00not a header at all")
    assert "no model can be loaded from model" in refused(capsys)


def test_weights_in_pickles_are_not_loaded(folder, capsys):
    Path("model/model.safetensors").rename("model/pytorch_model.bin")
    assert "no model can be loaded from model" in refused(capsys)


def test_an_output_folder_that_cannot_be_made(folder, capsys):
    Path("runs").write_text("a file is in the way")
    assert "run folder" in refused(capsys)


def test_a_warm_up_without_solutions(folder, capsys):
    message = refused(capsys, "train", "config.yaml", "--warmup.enabled=true", "--warmup.data=train.jsonl")
    assert "lack a solution" in message


def test_a_demonstration_longer_than_the_limit(folder, capsys):
    write_rows([{**row, "solution": "eggs " * 50} for row in ROWS], "demos.jsonl")
    message = refused(
        capsys, "train", "config.yaml", "--warmup.enabled=true", "--warmup.data=demos.jsonl", "--warmup.max_tokens=32"
    )
    assert "demonstration p1" in message


def test_a_run_folder_with_other_settings(folder, capsys):
    run = Path("runs/broken")
    run.mkdir(parents=True)
    older = {**BASE, "rollout": {**BASE["rollout"], "n_auto": 6}, "optim": {"non_finite": "skip"}}
    (run / "config.yaml").write_text(yaml.safe_dump(older))
    (run / "metrics.jsonl").write_text("")
    message = refused(capsys)
    assert "belongs to a run with other settings" in message
    assert "rollout.n_auto (6 -> 2)" in message
    assert message.count("->") == 1  # keys that the older config lacks had their defaults; optim.non_finite may change


def test_a_refused_start_can_be_mended(folder, capsys):
    assert "p1" in refused(capsys, "train", "config.yaml", "--data.max_prompt_tokens=5")
    assert main(["train", "config.yaml"]) == 0


def test_only_damaged_checkpoints(folder, capsys):
    damaged = Path("runs/broken/checkpoints/step-00000003")
    damaged.mkdir(parents=True)
    (damaged / "manifest.json").write_text('{"files": {"gone": {"size": 1, "sha256": "0"}}}')
    assert "no checkpoint in runs/broken/checkpoints matches its manifest" in refused(capsys)


@pytest.mark.parametrize("command", ["eval", "warmup"])
def test_commands_that_lack_their_data(folder, capsys, command):
    assert f"sgpo {command} needs" in refused(capsys, command, "config.yaml")


def test_the_unbroken_folder_really_trains(folder, capsys):
    assert main(["train", "config.yaml"]) == 0
    assert Path("runs/broken/summary.json").exists()


def test_help_lists_every_knob(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for key in known_keys(Config):
        assert f"--{key} " in text
