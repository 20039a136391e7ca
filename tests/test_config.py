"""Every knob's range, every way of writing an override, and the one sentence that each mistake gets."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sgpo.builders.run_folder import from_earlier_version
from sgpo.config import Config
from sgpo.types import SgpoError
from sgpo.utils.config_file import describe, known_keys, load_settings
from sgpo.utils.config_rules import GONE, RENAMED

ROOT = Path(__file__).resolve().parents[1]
MINIMAL = "model: {path: m}\ndata: {train: t}\n"


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "config.yaml"

    def loader(*overrides, text=MINIMAL):
        path.write_text(text, encoding="utf-8")
        return load_settings(Config, path, overrides)

    return loader


def value_of(config, key):
    for part in key.split("."):
        config = getattr(config, part)
    return config


def sentence_of(load, *overrides, **text):
    with pytest.raises(SgpoError) as error:
        load(*overrides, **text)
    sentence = str(error.value)
    assert sentence
    assert "\n" not in sentence
    assert "pydantic" not in sentence
    return sentence


BAD = [
    ("run.name", "a/b"), ("run.name", "'a b'"), ("run.name", "''"), ("run.name", "null"),
    ("run.seed", -1), ("run.seed", 1.5), ("run.seed", "x"), ("run.resume", "always"), ("run.timeout_s", 0),
    ("model.path", "null"), ("model.path", 3), ("model.dtype", "float16"), ("model.gradient_checkpointing", "maybe"),
    ("data.train", "null"), ("data.train_limit", 0), ("data.eval_limit", 0), ("data.strategy_source", "model"),
    ("data.max_prompt_tokens", 0), ("data.without_strategy", "drop"), ("reward.correct_above", ".nan"),
    ("rollout.engine", "sglang"), ("rollout.problems_per_step", 0), ("rollout.n_auto", 0), ("rollout.n_guided", -1),
    ("rollout.temperature", 0), ("rollout.temperature", -1), ("rollout.temperature", ".inf"), ("rollout.top_p", 0),
    ("rollout.top_p", 1.01), ("rollout.max_new_tokens", 0), ("rollout.max_batch_tokens", 0),
    ("reward.workers", 0), ("reward.timeout_s", 0), ("reward.memory_mib", 63), ("reward.max_chars", 0),
    ("algorithm.method", "ppo"), ("algorithm.clip_low", -0.1), ("algorithm.clip_low", 1), ("algorithm.clip_high", -0.1),
    ("algorithm.dual_clip", 1), ("algorithm.mini_batches", 0), ("algorithm.distillation", "kl"),
    ("algorithm.selection", "max"), ("algorithm.over_limit", "clip"), ("algorithm.max_token_kl", 0),
    ("algorithm.max_token_kl", ".nan"), ("algorithm.alpha", "none"), ("algorithm.alpha_0", -0.1),
    ("algorithm.alpha_gamma", 0), ("algorithm.alpha_max", -0.1), ("algorithm.alpha_fixed", -1),
    ("algorithm.normalize_std", 2),
    ("optim.lr", 0), ("optim.lr", "-1e-6"), ("optim.lr", "fast"), ("optim.betas", "[0.9]"), ("optim.betas", 0.9),
    ("optim.betas", "[0.9, 1.1]"), ("optim.betas", "[0.9, 0.9, 0.9]"), ("optim.eps", 0), ("optim.weight_decay", -1),
    ("optim.max_grad_norm", 0), ("optim.schedule", "step"), ("optim.warmup_ratio", 1.5),
    ("engine.zero_stage", 4), ("engine.zero_stage", -1), ("engine.micro_batch_tokens", 0),
    ("train.epochs", 0), ("train.max_steps", 0),
    ("warmup.limit", 0), ("warmup.guided_share", 1.1), ("warmup.guided_share", -0.1), ("warmup.epochs", 0),
    ("warmup.batch_size", 0), ("warmup.validation_share", 0), ("warmup.validation_share", 1),
    ("warmup.validate_every", 0), ("warmup.max_tokens", 0), ("warmup.optim.lr", 0),
    ("eval.every_steps", 0), ("eval.samples", 0), ("eval.temperature", -0.1), ("eval.top_p", 0), ("eval.top_p", 2),
    ("eval.max_new_tokens", 0), ("eval.guided", "perhaps"),
    ("checkpoint.every_steps", 0), ("checkpoint.keep_last", 0), ("checkpoint.keep_best", 3),
    ("log.tensorboard", "perhaps"), ("log.rollouts_per_step", -1),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), BAD, ids=lambda part: str(part))
def test_a_value_out_of_range_names_its_key(load, key, value):
    sentence = sentence_of(load, f"--{key}={value}")
    assert re.search(rf"\b{re.escape(key)}\b", sentence)
    assert "config.yaml" in sentence


GOOD = [
    ("run.seed", "0", 0), ("rollout.top_p", "1", 1.0), ("rollout.temperature", "1e-2", 0.01),
    ("optim.lr", "1e-6", 1e-6),
    ("optim.lr", "1E-6", 1e-6), ("optim.lr", "2.5e-05", 2.5e-5), ("optim.lr", "1", 1.0), ("optim.lr", ".5", 0.5),
    ("optim.betas", "[0.8, 0.99]", (0.8, 0.99)), ("optim.betas", "[.8,.9]", (0.8, 0.9)),
    ("train.max_steps", "null", None),
    ("train.max_steps", "~", None), ("train.max_steps", "", None), ("train.max_steps", "7", 7),
    ("algorithm.dual_clip", "3", 3.0), ("algorithm.normalize_std", "false", False), ("log.tensorboard", "on", True),
    ("eval.temperature", "0", 0.0), ("rollout.n_guided", "5", 5), ("algorithm.clip_low", "0", 0.0),
    ("data.train", "hf:org/name:train", "hf:org/name:train"), ("run.name", "a-b_c.1", "a-b_c.1"),
    ("reward.kind", "package.module:function", "package.module:function"), ("engine.zero_stage", "3", 3),
    ("warmup.optim.lr", "2e-3", 2e-3), ("reward.max_chars", "200_000", 200_000),
]  # fmt: skip


@pytest.mark.parametrize("form", ["--{}={}", "--{} {}"])
@pytest.mark.parametrize(("key", "text", "value"), GOOD, ids=lambda part: str(part) or "empty")
def test_overrides_in_both_forms(load, form, key, text, value):
    words = [form.format(key, text)] if "=" in form else [f"--{key}", text]
    assert value_of(load(*words), key) == value


def test_an_override_beats_the_file_and_the_last_one_wins(load):
    text = MINIMAL + "rollout: {n_auto: 3, n_guided: 2}\n"
    config = load("--rollout.n_auto=5", "--rollout.n_auto", "6", text=text)
    assert (config.rollout.n_auto, config.rollout.n_guided) == (6, 2)


def test_scientific_floats_in_the_file(load):
    config = load(text=MINIMAL + "optim: {lr: 1e-6, eps: 1.0e-9}\n")
    assert (config.optim.lr, config.optim.eps) == (1e-6, 1e-9)


def test_the_defaults_are_the_papers(load):
    config = load()
    algorithm, rollout = config.algorithm, config.rollout
    assert (algorithm.clip_low, algorithm.clip_high, algorithm.dual_clip, algorithm.max_token_kl) == (
        0.2,
        0.28,
        None,
        1,
    )
    assert (algorithm.alpha_0, algorithm.alpha_gamma, algorithm.alpha_max, algorithm.alpha) == (
        0.5,
        0.1,
        0.8,
        "adaptive",
    )
    assert (algorithm.distillation, algorithm.selection, algorithm.over_limit) == ("forward_kl", "sum", "mask")
    assert (rollout.n_auto, rollout.n_guided, rollout.temperature, rollout.top_p) == (8, 4, 1.0, 0.95)
    assert (rollout.problems_per_step, rollout.max_new_tokens) == (128, 16384)
    assert (config.optim.lr, config.optim.betas, config.optim.weight_decay) == (1e-6, (0.9, 0.95), 0.0)
    assert (config.warmup.optim.lr, config.warmup.optim.warmup_ratio, config.warmup.batch_size) == (1e-5, 0.1, 64)
    assert (config.eval.temperature, config.eval.top_p, config.eval.max_new_tokens) == (0.6, 0.95, 32768)


@pytest.mark.parametrize("how", ["file", "override"])
def test_one_knob_of_the_warmup_optimizer_leaves_the_others_at_their_defaults(load, how):
    config = (
        load("--warmup.optim.lr=1e-3") if how == "override" else load(text=MINIMAL + "warmup: {optim: {lr: 1e-3}}\n")
    )
    assert config.warmup.optim.lr == 1e-3
    assert config.warmup.optim.warmup_ratio == 0.1
    assert load("--warmup.optim.warmup_ratio=0").warmup.optim.lr == 1e-5


def test_the_config_cannot_be_changed_afterwards(load):
    config = load()
    with pytest.raises(ValueError):
        config.optim.lr = 1.0


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("rollout.n_auot", "rollout.n_auto"),
        ("rollout.temprature", "rollout.temperature"),
        ("algorithm.clip_hi", "algorithm.clip_high"),
        ("algorithm.max_kl", "algorithm.max_token_kl"),
        ("warmup.optim.learning_rate", "warmup.optim"),
        ("optimizer.lr", "optim"),
        ("modle.path", "model"),
        ("chekpoint.every_steps", "checkpoint"),
    ],
)
def test_an_unknown_key_names_the_nearest(load, key, nearest):
    sentence = sentence_of(load, f"--{key}=1")
    assert key.split(".")[0] in sentence
    assert f"did you mean '{nearest}" in sentence


@pytest.mark.parametrize("key", ["rollout", "rollout.n_auto.x", "zzzzzz.yyyyyy", "", ".", "rollout.", ".n_auto"])
def test_an_override_that_names_no_knob(load, key):
    sentence_of(load, f"--{key}=1")


def test_an_unknown_key_in_the_file(load):
    assert "unknown key 'algorithm.gamma'" in sentence_of(load, text=MINIMAL + "algorithm: {gamma: 0.2}\n")


def test_several_mistakes_are_told_together(load):
    sentence = sentence_of(load, "--optim.lr=0", "--rollout.top_p=2", "--eval.smaples=1")
    assert all(part in sentence for part in ("optim.lr", "rollout.top_p", "eval.samples"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--algorithm.method=grpo"], ["n_guided"]),
        (["--rollout.n_guided=0"], ["n_guided", "grpo"]),
        (["--algorithm.mini_batches=3"], ["mini_batches", "problems_per_step"]),
        (["--rollout.n_auto=1"], ["n_auto"]),
        (["--warmup.enabled=true"], ["warmup.data"]),
        (["--reward.correct_above=1"], ["correct_above", "math_verify"]),
        (["--reward.correct_above=-0.5", "--reward.kind=exact"], ["correct_above", "exact"]),
        (
            ["--data.without_strategy=grpo", "--algorithm.autonomous_grpo=false"],
            ["without_strategy", "autonomous_grpo"],
        ),
        (["--algorithm.distillation=none", "--algorithm.autonomous_grpo=false"], ["autonomous_grpo", "distillation"]),
        (
            ["--algorithm.method=grpo", "--rollout.n_guided=0", "--algorithm.autonomous_grpo=false"],
            ["autonomous_grpo", "grpo"],
        ),
    ],
)
def test_impossible_pairs(load, overrides, words):
    sentence = sentence_of(load, *overrides)
    assert all(word in sentence for word in words)


@pytest.mark.parametrize(
    "overrides",
    [
        ["--algorithm.method=grpo", "--rollout.n_guided=0"],
        ["--algorithm.distillation=none"],
        ["--algorithm.distillation=none", "--rollout.n_guided=0"],
        ["--rollout.n_auto=1", "--algorithm.autonomous_grpo=false"],
        ["--algorithm.mini_batches=4"],
        ["--algorithm.alpha_0=0", "--algorithm.alpha_max=0"],
        ["--reward.correct_above=-0.5", "--reward.kind=my.module:fn"],
        ["--warmup.enabled=true", "--warmup.data=builtin"],
    ],
    ids=" ".join,
)
def test_possible_pairs(load, overrides):
    load(*overrides)


@pytest.mark.parametrize(
    "text", ["", "[]", "word", "- a\n- b\n", "model: [\n", "\tmodel: x", "a: b: c", "a: 1\n---\nb: 2"]
)
def test_what_is_no_mapping_in_yaml(load, text):
    assert "config.yaml" in sentence_of(load, text=text)


def test_yaml_errors_name_the_line(load):
    assert "line 3" in sentence_of(load, text=MINIMAL + "optim: {lr: 1\n")


@pytest.mark.parametrize("text", ["x: !!python/object/apply:os.system [ls]\n", "x: !!python/name:os.system\n"])
def test_yaml_that_wants_to_run_code_is_refused(load, text):
    assert "not valid YAML" in sentence_of(load, text=MINIMAL + text)


@pytest.mark.parametrize("name", ["2024-01-05", "2024-13-45", "off", "yes"])
def test_words_that_yaml_1_1_takes_for_dates_and_booleans_are_texts(load, name):
    """PyYAML's own reading makes them a date, a bare ValueError, False and True."""
    assert load(f"--run.name={name}").run.name == name
    assert load(text=MINIMAL + f"run: {{name: {name}}}\n").run.name == name


@pytest.mark.parametrize("value", ["mask", "clamp", "scale", "off"])
def test_every_limit_can_be_written_without_quotes(load, value):
    assert load(f"--algorithm.over_limit={value}").algorithm.over_limit == value
    assert load(text=MINIMAL + f"algorithm: {{over_limit: {value}}}\n").algorithm.over_limit == value


@pytest.mark.parametrize(("word", "value"), [("true", True), ("False", False), ("on", True), ("no", False)])
def test_words_for_a_switch(load, word, value):
    assert load(f"--log.tensorboard={word}").log.tensorboard is value
    assert load(text=MINIMAL + f"log: {{tensorboard: {word}}}\n").log.tensorboard is value


def test_a_section_given_twice_is_refused(load):
    """YAML keeps the last one and drops the first without a word."""
    text = MINIMAL + "rollout: {n_auto: 4}\nrollout: {n_guided: 2}\n"
    assert "rollout" in sentence_of(load, text=text)


def test_a_missing_or_unreadable_file(tmp_path):
    with pytest.raises(SgpoError, match=r"nowhere\.yaml does not exist"):
        load_settings(Config, tmp_path / "nowhere.yaml")
    with pytest.raises(SgpoError, match="cannot be read"):
        load_settings(Config, tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"run: {name: \xff\xfe}")
    with pytest.raises(SgpoError, match=r"latin\.yaml cannot be read"):
        load_settings(Config, tmp_path / "latin.yaml")


def test_required_keys(load):
    sentence = sentence_of(load, text="run: {seed: 1}\n")
    assert "model is required" in sentence
    assert "data is required" in sentence
    assert "data.train is required" in sentence_of(load, text="model: {path: m}\ndata: {eval: x}\n")


@pytest.mark.parametrize("section", ["rollout", "model", "optim"])
@pytest.mark.parametrize("value", ["", "3", "[1]", "text"])
def test_a_section_that_is_no_mapping(load, section, value):
    lines = [line for line in MINIMAL.splitlines() if not line.startswith(section)]
    text = "\n".join([*lines, f"{section}: {value}"])
    assert section in sentence_of(load, text=text)
    assert section in sentence_of(load, f"--{section}.x=1", text=text)


@pytest.mark.parametrize("arguments", [["run.seed", "1"], ["-run.seed=1"], ["--run.seed", "1", "2"], ["x"]])
def test_words_that_are_no_options(load, arguments):
    assert "--section.key value" in sentence_of(load, *arguments)


def test_an_option_without_a_value(load):
    assert "run.seed lacks a value" in sentence_of(load, "--run.seed")


def test_an_option_does_not_swallow_the_next_one(load):
    assert "run.resume lacks a value" in sentence_of(load, "--run.resume", "--run.name", "x")


def test_a_negative_value_is_a_value(load):
    assert "run.seed" in sentence_of(load, "--run.seed", "-1")


def test_an_unreadable_value_names_its_option(load):
    assert "--optim.betas" in sentence_of(load, "--optim.betas=[0.9")


@pytest.mark.parametrize("name", [".", ".."])
def test_a_run_folder_stays_below_the_output_folder(load, name):
    """ "--run.resume never" renames the run folder: it must not be the folder of all runs, or the one above."""
    assert "run.name" in sentence_of(load, f"--run.name={name}")


def test_betas_of_one_are_refused_here_and_not_by_the_optimizer(load):
    assert "optim.betas" in sentence_of(load, "--optim.betas=[0.9, 1.0]")


@pytest.mark.parametrize("value", ["true", "false"])
@pytest.mark.parametrize("key", sorted(GONE.keys() - RENAMED))
def test_a_key_that_is_gone_is_refused_with_what_there_is_instead(load, key, value):
    sentence = sentence_of(load, f"--{key}={value}")
    assert re.search(rf"{key} is gone: .+; remove the line$", sentence)
    assert key not in known_keys(Config)


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_renamed_key_is_refused_with_its_new_name(load, old, new):
    assert sentence_of(load, f"--{old}=all").endswith(f"{old} has another name now: write {new}")
    assert old not in known_keys(Config)
    assert new in known_keys(Config)


def test_a_loss_without_a_limit_has_one_to_count_by_or_none(load):
    assert load("--algorithm.over_limit=off").algorithm.max_token_kl == 1.0
    assert load("--algorithm.max_token_kl=null").algorithm.max_token_kl is None


def test_a_cap_below_alpha_0_is_a_warning(load, caplog):
    assert load("--algorithm.alpha_max=0.3").algorithm.alpha_max == 0.3
    assert "alpha_max = 0.3 is below alpha_0 = 0.5" in caplog.text
    caplog.clear()
    load("--algorithm.alpha_max=0.3", "--algorithm.alpha=fixed")  # which has no alpha_0
    assert not caplog.text


def test_off_is_none(load):
    words = ["--algorithm.distillation=none", "--rollout.n_guided=0"]
    assert load(*words).algorithm.distillation is None
    assert load("--algorithm.distillation=null", *words[1:]).algorithm.distillation is None


def test_the_settings_of_an_old_run_are_read_in_todays_words(load):
    saved = load("--algorithm.selection=all", "--model.lora.modules=[q_proj]").model_dump(mode="json")
    old = copy.deepcopy(saved)
    old["algorithm"]["target"] = old["algorithm"].pop("selection")
    old["model"]["lora"]["targets"] = old["model"]["lora"].pop("modules")
    old["engine"]["shared_target_pass"] = True
    assert from_earlier_version(old) == saved
    assert from_earlier_version(saved) == saved


def test_the_run_folder(load):
    assert load("--run.name=x", "--run.output_dir=a/b").run.dir == Path("a/b/x")


def test_known_keys_are_leaves():
    keys = known_keys(Config)
    assert len(keys) > 70
    assert {"run.seed", "warmup.optim.lr", "algorithm.alpha_gamma"} <= keys.keys()
    assert "warmup.optim" not in keys
    assert {key.split(".")[0] for key in keys} == set(Config.model_fields)


def test_describe_lists_every_key_with_its_default(load):
    lines = {line.split()[0]: line for line in describe(Config).splitlines()}
    assert list(lines) == [f"--{key}" for key in known_keys(Config)]
    config = load("--rollout.engine", "hf")
    for key, info in known_keys(Config).items():
        if key == "rollout.engine":
            continue  # "auto" is what is described, the engine it stands for what is held
        wanted = "required" if info.is_required() else f"default {value_of(config, key)!r}"
        assert wanted in lines[f"--{key}"]


def test_describe_is_readable():
    assert "FieldInfo" not in describe(Config)


def test_every_shipped_config_loads():
    paths = sorted((ROOT / "configs").glob("*.yaml"))
    assert paths
    for path in paths:
        if "variants" not in yaml.safe_load(path.read_text()):  # a study, see test_study.py
            load_settings(Config, path)


def test_the_config_loads_without_torch():
    code = "import sys, sgpo.config; print(sorted({'torch', 'transformers', 'deepspeed', 'numpy'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout.strip() == "[]"


def test_the_engine_is_vllm_where_it_is_installed(load, monkeypatch):
    for found, engine in ((object(), "vllm"), (None, "hf")):
        monkeypatch.setattr("sgpo.config.importlib.util.find_spec", lambda name, found=found: found)
        assert load().rollout.engine == engine
        assert load("--rollout.engine", "hf").rollout.engine == "hf"
    with pytest.raises(SgpoError, match="vllm is not installed"):
        load("--rollout.engine", "vllm")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--rollout.overlap", "true", "--rollout.placement", "process"], "overlap needs"),
        (["--rollout.overlap", "true", "--rollout.importance_cap", "2"], "overlap needs"),
        (["--rollout.placement", "process", "--rollout.vllm.tensor_parallel_size", "2"], "tensor_parallel_size to 1"),
        (["--rollout.devices", "['1']"], "devices is for placement: process"),
        (["--rollout.stall_s", "0"], "rollout.stall_s"),
        (["--rollout.importance_cap", "0"], "rollout.importance_cap"),
        (["--rollout.vllm.sleep_level", "3"], "rollout.vllm.sleep_level"),
        (["--rollout.vllm.max_num_seq", "3"], "did you mean 'rollout.vllm.max_num_seqs'"),
        (["--model", "FOLDER"], "model is a section, not a value; write --model.path VALUE"),
        (["--optim.learning_rate", "1e-6"], "did you mean 'optim.lr'"),
        (["--warmup.optim.learning_rate", "1e-6"], "did you mean 'warmup.optim.lr'"),
        (["--learning_rate", "1e-6"], "did you mean 'optim.lr'"),
    ],
)
def test_settings_that_cannot_work_are_refused(load, overrides, message):
    with pytest.raises(SgpoError, match=message):
        load(*overrides)


def test_vllm_takes_no_high_temperature(load, monkeypatch):
    monkeypatch.setattr("sgpo.config.importlib.util.find_spec", lambda name: object())
    with pytest.raises(SgpoError, match="temperatures up to 2"):
        load("--rollout.engine", "vllm", "--rollout.temperature", "2.5")
    assert load("--rollout.engine", "hf", "--rollout.temperature", "2.5").rollout.temperature == 2.5
