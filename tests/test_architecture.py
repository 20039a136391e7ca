"""The floors: an import only ever points to a lower number. Read from the source, so nothing has to be installed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Longest matching prefix counts. Two modules on one floor do not know each other, unless one package holds both.
FLOORS = {
    "sgpo_kernels": 0,
    "sgpo.types": 1,
    "sgpo.config": 2,
    "sgpo.utils": 2,
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
    """Absolute names of all that a module imports, inside functions too, but not for type checking only."""
    names: set[str] = set()
    tree = ast.parse(SOURCES[module].read_text())
    typing_only = {
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
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


@pytest.mark.parametrize("module", sorted(set(SOURCES) - {"sgpo"}))
def test_imports_point_down(module):
    unit = _unit(module)
    for name in _imports(module):
        target = _unit(name)
        if target is None or target == unit:
            continue
        assert FLOORS[target] < FLOORS[unit], f"{module} (floor {FLOORS[unit]}) imports {name} (floor {FLOORS[target]})"


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
        ("import sgpo.cli", ("torch", "transformers")),
        ("import sgpo.rewards.pool", ("torch", "transformers", "deepspeed")),
        ("import sgpo.commands.extract, sgpo.strategies.endpoint", ("torch", "transformers", "deepspeed")),
    ],
)
def test_imports_stay_light(statement, forbidden):
    code = f"{statement}\nimport sys\nprint([name for name in {forbidden!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"


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
