"""docs/walk.md: every function that it names exists where it says, and each road has ten lines."""

import importlib
import re
from functools import reduce
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "walk.md").read_text(encoding="utf-8")
STOPS = re.findall(r"^\d+\. `([\w.]+)` \(`([\w/]+)\.py`\): .+$", TEXT, re.MULTILINE)


def test_three_roads_of_ten_lines():
    roads = TEXT.split("\n## ")[1:]
    assert [len(re.findall(r"^\d+\. ", road, re.MULTILINE)) for road in roads] == [10, 10, 10]
    assert len(STOPS) == 30


@pytest.mark.parametrize(("name", "file"), dict.fromkeys(STOPS))
def test_what_it_names_is_there(name, file):
    assert (ROOT / f"{file}.py").is_file()
    module = importlib.import_module(file.removeprefix("kernels/").removesuffix("/__init__").replace("/", "."))
    assert callable(reduce(getattr, name.split("."), module))
