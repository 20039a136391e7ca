"""The list of `make mutants` fits the source as it is; the mutants themselves are not run here."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def mutants():
    spec = spec_from_file_location("mutants_run", Path(__file__).parent / "mutants" / "run.py")
    assert spec is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_mutant_is_a_change_of_a_line_that_is_there(mutants):
    found = mutants.load_mutants()
    assert len(set(found)) == len(found) >= 60
    assert mutants.complaints(found) == []


def test_a_mutant_whose_line_has_changed_is_refused(mutants, tmp_path):
    (tmp_path / "file.py").write_text("a = 1\nb = 1\n")
    cases = {"a = 2": "occurs 0 times", "= 1": "occurs 2 times", "a = 1": "no Python"}
    for old, words in cases.items():
        (complaint,) = mutants.complaints([mutants.Mutant("file.py", old, "a = (", ("x",))], tmp_path)
        assert words in complaint
    assert "changes nothing" in mutants.complaints([mutants.Mutant("file.py", "a = 1", "a = 1", ("x",))], tmp_path)[0]
