"""Imports point one way, and internals stay in one place."""

import ast
from pathlib import Path

import pytest

import keras_moe

ROOT = Path(__file__).parent.parent
PACKAGE = Path(keras_moe.__file__).parent  # the installed one, where it is
FILES = sorted(PACKAGE.rglob("*.py"))

# What each part may import of the others.
CORE = {"types", "checks", "placement", "writing", "_version"}
ALLOWED = {
    "types": set(),
    "checks": set(),
    "placement": set(),
    "writing": set(),
    "_version": set(),
    "functional": CORE,
    "optimizers": CORE,
    "telemetry": CORE | {"functional", "layers"},
    "data": CORE,
    "layers": CORE | {"functional"},
    "models": CORE | {"functional", "layers", "data"},
    "distribution": CORE | {"functional"},
    # Of `distribution` only the arithmetic, see the test below.
    "planning": CORE | {"models", "distribution"},
    "serving": CORE | {"functional", "layers", "models", "data"},
    "commands": CORE
    | {"data", "distribution", "functional", "layers", "models", "optimizers"}
    | {"planning", "serving", "telemetry"},
}
ENTRY_POINTS = {"__init__", "__main__"}


def part_of(path):
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path):
    """Full names of everything a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {path}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    part = part_of(path)
    if part in ENTRY_POINTS:
        return
    for name in imports(path):
        if name.startswith("keras_moe."):
            other = name.split(".")[1]
            assert other == part or other in ALLOWED[part], name


def test_every_part_is_listed():
    assert {part_of(path) for path in FILES} <= ALLOWED.keys() | ENTRY_POINTS


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_internals_of_libraries_are_used_in_distribution_only(path):
    if part_of(path) == "distribution":
        return
    for name in imports(path):
        assert not name.startswith(("keras.src", "tensorflow.python")), name
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("__internal__", "src"), path


def test_planning_takes_arithmetic_only_from_distribution():
    for path in (PACKAGE / "planning").glob("*.py"):
        found = {n for n in imports(path) if n.startswith("keras_moe.distribution")}
        assert all(n.startswith("keras_moe.distribution.topology.") for n in found)
        roots = {n.split(".")[0] for n in imports(path)}
        assert not roots & {"tensorflow", "keras"}, path


def test_functional_code_knows_no_keras():
    for path in (PACKAGE / "functional").glob("*.py"):
        assert not [n for n in imports(path) if n.split(".")[0] == "keras"], path


def test_oracles_import_neither_the_package_nor_tensorflow():
    found = list((ROOT / "tests" / "oracles").glob("*.py"))
    assert found
    for path in found:
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & {"keras_moe", "tensorflow", "keras"}, path


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_readable(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_are_written_beside_and_renamed(path):
    """`writing.written_beside` gives a path that is called `partial` everywhere."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name, owner = node.func.attr, ast.unparse(node.func.value)
        given = [ast.unparse(argument) for argument in node.args]
        if name in ("write_text", "write_bytes"):
            assert owner in ("partial", "writing"), ast.unparse(node)
        if name in ("savefig", "save_weights", "copyfile"):
            assert "partial" in given or owner == "runs", ast.unparse(node)
