"""Which prompt template a run takes, and that a run is not resumed with another one."""

from pathlib import Path

import pytest
import yaml

from sgpo.builders.run_folder import prepare_run_folder
from sgpo.config import Config
from sgpo.data.prompt_template import TEMPLATE_FILE, PromptTemplate, packaged, source_note, template_of
from sgpo.types import SgpoError
from sgpo.utils.config_file import checked

OWN = PromptTemplate(
    system=None, plain="Ä {problem}\n", guided="{strategy}: {problem}", template_kwargs={"day": "1 May"}
)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def config(model="m", train="t", **data):
    raw = {"model": {"path": model}, "data": {"train": train, **data}, "rollout": {"engine": "hf"}}
    return checked(Config, raw, "test")


def model_with_prompts() -> str:
    Path("best").mkdir()
    Path("best", TEMPLATE_FILE).write_text(OWN.as_yaml(), encoding="utf-8")
    return "best"


def test_a_file_that_was_written_is_read_back():
    Path("t.yaml").write_text(OWN.as_yaml(), encoding="utf-8")
    assert PromptTemplate.load("t.yaml") == OWN
    Path("t.yaml").write_text(OWN.as_yaml() + "\nextra: 1", encoding="utf-8")
    with pytest.raises(SgpoError, match="exactly the keys"):
        PromptTemplate.load("t.yaml")


def test_which_template_is_taken():
    assert template_of(config()) == PromptTemplate.load()
    assert template_of(config(train="builtin")) == PromptTemplate.load(packaged("builtin"))
    model = model_with_prompts()
    assert template_of(config(model)) == OWN
    more = template_of(config(model, template_kwargs={"day": "2 May", "enable_thinking": False}))
    assert more.template_kwargs == {"day": "2 May", "enable_thinking": False}
    Path("mine.yaml").write_text(PromptTemplate.load().as_yaml())
    assert template_of(config(model, template="mine.yaml")) == PromptTemplate.load()


def test_it_is_said_where_a_model_brings_its_template():
    assert source_note(config(), template_of(config())) == ""
    asked = config(model_with_prompts())
    assert source_note(asked, template_of(asked)) == f"prompts: as the model was trained, by best/{TEMPLATE_FILE}"
    other = config("best", template_kwargs={"day": "2 May"})
    assert "not as the model was trained" in source_note(other, template_of(other))


@pytest.mark.parametrize("key", ["tokenize", "add_generation_prompt", "strftime_now"])
def test_what_the_prompts_set_themselves_is_no_argument(key):
    with pytest.raises(SgpoError, match=rf"data\.template_kwargs: {key} is set by sgpo itself"):
        config(template_kwargs={key: True})


def test_a_run_goes_on_with_the_template_it_began_with():
    Path("mine.yaml").write_text(OWN.as_yaml(), encoding="utf-8")
    settings = config(template="mine.yaml", template_kwargs={"enable_thinking": False})
    folder = prepare_run_folder(settings)
    (folder / "metrics.jsonl").touch()
    pinned = PromptTemplate.load(folder / TEMPLATE_FILE)
    assert pinned.template_kwargs == {"day": "1 May", "enable_thinking": False}
    assert prepare_run_folder(settings) == folder
    Path("mine.yaml").write_text(OWN.as_yaml().replace("Ä", "Oh"), encoding="utf-8")
    with pytest.raises(SgpoError, match=r"began with another prompt template than mine\.yaml is now \(plain\)"):
        prepare_run_folder(settings)
    with pytest.raises(SgpoError, match=r"data\.template_kwargs"):
        prepare_run_folder(config(template="mine.yaml"))


def test_a_run_folder_from_before_these_keys_is_resumed():
    settings = config()
    folder = prepare_run_folder(settings)
    (folder / "metrics.jsonl").touch()
    (folder / TEMPLATE_FILE).unlink()
    written = yaml.safe_load((folder / "config.yaml").read_text())
    for key in ("template_kwargs", "bad_golds"):
        del written["data"][key]
    (folder / "config.yaml").write_text(yaml.safe_dump(written))
    assert prepare_run_folder(settings) == folder
    assert (folder / TEMPLATE_FILE).exists()
