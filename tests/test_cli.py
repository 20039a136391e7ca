"""The command line itself: help, version, what an unknown command is told, and that each verb is one file."""

import importlib
import pkgutil
import re

import pytest

from sgpo import cli, commands


def said(capsys, *words):
    """(exit code, standard output, standard error) of one command."""
    code = cli.main(words)
    return code, *capsys.readouterr()


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_help_names_every_command(capsys, words):
    code, out, err = said(capsys, *words)
    assert (code, err) == (0, "")
    for verb, text in cli.VERBS.items():
        assert re.search(rf"^  {verb} +{re.escape(text)}$", out, re.MULTILINE)


def test_a_group_names_its_commands(capsys):
    code, out, _ = said(capsys, "strategies")
    assert code == 0
    assert "strategies extract" in out
    assert "strategies analyze" in out
    assert "warmup" not in out


def test_version(capsys):
    code, out, _ = said(capsys, "--version")
    assert code == 0
    assert re.fullmatch(r"sgpo (\d+\.\d+\.\d+\S*|\(not installed\))\n", out)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("trian",), "there is no command 'trian'; did you mean train?"),
        (("evaluate", "x.yaml"), "there is no command 'evaluate'; did you mean eval?"),
        (("strategies", "extrakt"), "there is no command 'strategies extrakt'; did you mean strategies extract?"),
        (("strategy", "extract"), "there is no command 'strategy'; did you mean strategies?"),
        (("qqq",), "there is no command 'qqq'; choose from " + ", ".join(cli.VERBS)),
    ],
)
def test_an_unknown_command_is_one_sentence(capsys, words, sentence):
    assert said(capsys, *words) == (2, "", f"sgpo: {sentence}\n")


def test_every_verb_is_one_file_and_every_file_a_verb():
    files = {module.name for module in pkgutil.iter_modules(commands.__path__)}
    assert files == {verb.split()[-1] for verb in cli.VERBS}
    for name in files:
        command = importlib.import_module(f"sgpo.commands.{name}")
        assert callable(command.run)
        assert callable(command.add_arguments)


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_the_help_of_a_command_lists_its_knobs(capsys, verb):
    command = importlib.import_module(f"sgpo.commands.{verb.split()[-1]}")
    with pytest.raises(SystemExit) as ended:
        cli.main([*verb.split(), "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: sgpo {verb}")
    assert ("knobs:" in out) == (command.SETTINGS is not None)
