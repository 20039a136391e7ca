"""The floors: an import only ever points to a lower number. Read from the source, so nothing has to be installed.

8 cli   7 commands   6 train analysis   5 builders   4 engine strategies evaluation
3 model rollout rewards data planning reporting   2 algorithm config utils   1 types   0 sgpo_kernels
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Folders (and the files beside them). Two of one floor do not know each other; inside a folder there is no circle.
FLOORS = {
    "sgpo_kernels": 0,
    "sgpo.types": 0,
    "sgpo.utils": 1,
    "sgpo.config": 2,
    "sgpo.algorithm": 2,
    "sgpo.model": 3,
    "sgpo.rollout": 3,
    "sgpo.rewards": 3,
    "sgpo.data": 3,
    "sgpo.planning": 3,
    "sgpo.reporting": 3,
    "sgpo.engine": 4,
    "sgpo.strategies": 4,
    "sgpo.evaluation": 4,
    "sgpo.builders": 5,
    "sgpo.train": 6,
    "sgpo.analysis": 6,
    "sgpo.commands": 7,
    "sgpo.cli": 8,
}
ADAPTERS = ("sgpo.data", "sgpo.rewards", "sgpo.rollout", "sgpo.model", "sgpo.reporting", "sgpo.planning")
PLAN = ["plan", "configs/qwen2.5-7b-1x80gb.yaml", "--plan.architecture", "qwen2.5-7b", "--rollout.engine", "hf"]
LOOSE = {"__init__.py", "cli.py", "config.py", "types.py", "py.typed"}
HOMES = {
    "deepspeed": {"sgpo.engine.zero", "sgpo.model.sequence_parallel"},
    "vllm": {"sgpo.rollout.vllm_engine", "sgpo.rollout.vllm_adapters"},
}


def _sources() -> dict[str, Path]:
    found = {}
    for base in (ROOT, ROOT / "kernels"):
        for path in base.glob("sgpo*/**/*.py"):
            parts = path.relative_to(base).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


SOURCES = _sources()


def _imports(module: str) -> set[str]:
    """Absolute names of all that a module imports: inside functions too, and for type checking only."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{module}: relative import"
            names |= {
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in SOURCES else node.module for a in node.names
            }
    return names


def _unit(module: str) -> str | None:
    """The entry of FLOORS that a module belongs to."""
    return max((name for name in FLOORS if f"{module}.".startswith(f"{name}.")), key=len, default=None)


def test_every_module_has_a_floor():
    assert len(SOURCES) > 30
    assert [module for module in SOURCES if module != "sgpo" and _unit(module) is None] == []
    assert set(FLOORS.values()) == set(range(9))


def test_few_files_lie_loose():
    assert {path.name for path in (ROOT / "sgpo").iterdir() if path.is_file()} <= LOOSE
    folders = {path.name for path in (ROOT / "sgpo").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert {f"sgpo.{name}" for name in folders} <= set(FLOORS)


@pytest.mark.parametrize("module", sorted(set(SOURCES) - {"sgpo"}))
def test_imports_point_down(module):
    unit = _unit(module)
    for name in _imports(module):
        target = _unit(name)
        if target is None or target == unit:
            continue
        assert FLOORS[target] < FLOORS[unit], f"{module} (floor {FLOORS[unit]}) imports {name} (floor {FLOORS[target]})"


def test_nothing_goes_round_in_a_circle():
    """Between files, inside folders too. What imports nothing that is left, or is imported by nothing, is in none."""
    left = {module: _imports(module) & SOURCES.keys() - {module} for module in SOURCES}
    while ends := left.keys() - {
        m for m, names in left.items() if names and any(m in other for other in left.values())
    }:
        left = {module: names - ends for module, names in left.items() if module not in ends}
    assert left == {}


def test_adapters_do_not_know_each_other():
    for module in SOURCES:
        unit = _unit(module)
        if unit in ADAPTERS:
            others = {_unit(name) for name in _imports(module)} & set(ADAPTERS) - {unit}
            assert not others, f"{module} imports {others}"


@pytest.mark.parametrize("package", sorted(HOMES))
def test_heavy_engines_stay_in_their_file(package):
    users = {module for module in SOURCES if any(n.split(".")[0] == package for n in _imports(module))}
    assert users <= HOMES[package]


def test_kernels_import_only_torch_triton_and_the_standard_library():
    allowed = {"torch", "triton", "sgpo_kernels", *sys.stdlib_module_names}
    for module in (m for m in SOURCES if m.startswith("sgpo_kernels")):
        assert {name.split(".")[0] for name in _imports(module)} <= allowed, module


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import sgpo_kernels", ("transformers", "deepspeed", "vllm", "sgpo")),
        ("import sgpo.config", ("torch", "transformers", "deepspeed", "vllm")),
        ("import sgpo.types", ("torch",)),
        ("import sgpo.cli", ("torch", "transformers", "pydantic")),
        ("from sgpo.cli import main; main([])", ("torch", "pydantic")),
        ("import sgpo.commands.plan", ("torch", "transformers", "deepspeed", "vllm")),
        (f"from sgpo.cli import main; main({PLAN!r})", ("transformers", "deepspeed", "vllm")),
        ("import sgpo.rewards.pool", ("torch", "transformers", "deepspeed")),
        ("import sgpo.commands.extract, sgpo.strategies.endpoint", ("torch", "transformers", "deepspeed")),
    ],
)
def test_imports_stay_light(statement, forbidden):
    code = f"{statement}\nimport sys\nprint([name for name in {forbidden!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip().splitlines()[-1] == "[]"


def test_files_and_functions_can_be_read():
    """No file over 500 lines, no function over 60."""
    files = {module: len(path.read_text().splitlines()) for module, path in SOURCES.items()}
    assert [module for module, lines in files.items() if lines > 500] == []
    functions = [
        (f"{module}.{node.name}", (node.end_lineno or 0) - node.lineno + 1)
        for module, path in SOURCES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    assert [name for name, lines in functions if lines > 60] == []


def _public(node: ast.AST, name: str) -> list[tuple[str, bool]]:
    """(name, has a docstring) of each public class, method and function below a module or class."""
    found = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            found.append((f"{name}.{child.name}", ast.get_docstring(child) is not None))
            if isinstance(child, ast.ClassDef):
                found += _public(child, f"{name}.{child.name}")
    return found


# How many of the kernels' may still be without; 0 when their files have their new names.
@pytest.mark.parametrize("package", ["sgpo", "sgpo_kernels"])
def test_what_is_public_has_a_docstring(package):
    everything = [
        entry
        for module, path in SOURCES.items()
        if module.split(".")[0] == package
        for entry in _public(ast.parse(path.read_text()), module)
    ]
    assert len(everything) > 50
    bare = [name for name, documented in everything if not documented]
    assert bare == []


WORDS = re.compile(
    r"\bsettle|\bheat\b|\bGauge\b|\bgauge\b|\bverdicts?\b|\bVerdicts?\b|_named_losses|_surely|\blot\b|_lot\b|"
    r"\brivals?\b|\bContests?\b|\bcontests?\b|SyncedRollouts|sgpo_objective"
)


def test_words_that_meant_something_else_are_gone():
    """One word, one meaning."""
    files = [path for folder in ("sgpo", "tests") for path in (ROOT / folder).rglob("*.py")]
    kernels = {"sgpo_kernels", "test_frames.py"}  # their words are theirs
    found = {
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in files
        if path != Path(__file__).resolve() and not kernels & set(path.parts)
        for match in WORDS.finditer(path.read_text())
    }
    assert found == set()


def test_the_name_kernels_stays_free():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()
    code = "import importlib.util; s = importlib.util.find_spec('kernels'); print(s is None or s.origin is None)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "True"


def test_no_module_is_named_like_the_standard_library_or_a_dependency():
    taken = set(sys.stdlib_module_names) | {
        "torch",
        "triton",
        "transformers",
        "deepspeed",
        "vllm",
        "math_verify",
        "rich",
    }
    # Inside a package a name shadows nothing; a stray script in a folder that is on the path does.
    scripts = [p for folder in ("examples", "benchmarks", "tests") for p in (ROOT / folder).rglob("*.py")]
    assert [p for p in scripts if p.stem in taken] == []


def test_nothing_loads_code_or_pickles_from_a_download():
    for path in SOURCES.values():
        text = path.read_text()
        assert "trust_remote_code=True" not in text, path
        assert "yaml.load(" not in text, path
        assert "weights_only=False" not in text, path


def test_setup_py_only_maps_folders():
    assert len((ROOT / "setup.py").read_text().splitlines()) <= 20
