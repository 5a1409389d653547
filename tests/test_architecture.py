"""Imports point one way, and internals stay in one place."""

import ast
import importlib
import inspect
import subprocess
import sys
import types
from pathlib import Path

import keras
import pytest
import tensorflow as tf

import keras_moe

ROOT = Path(__file__).parent.parent
PACKAGE = Path(keras_moe.__file__).parent  # the installed one, where it is
FILES = sorted(PACKAGE.rglob("*.py"))

# What each part may import of the others.
CORE = {"types", "checks", "engine", "operations", "runtime", "updating"}
CORE |= {"writing", "_version"}
ALLOWED = {
    "types": {"functional"},  # by a deprecated property, when it is read
    "checks": set(),
    "engine": {"operations", "runtime"},
    "operations": set(),
    "runtime": set(),
    "updating": {"engine"},
    "writing": set(),
    "_version": set(),
    "functional": CORE,
    "optimizers": CORE,
    "losses": CORE | {"functional"},
    "telemetry": CORE | {"functional", "layers", "losses"},
    "data": CORE,
    "layers": CORE | {"functional"},
    "conversion": CORE | {"functional", "layers"},
    "models": CORE | {"functional", "layers", "data"},
    "distribution": CORE | {"functional"},
    # Of `distribution` only the arithmetic, see the test below.
    "planning": CORE | {"functional", "models", "distribution", "layers"},
    "serving": CORE | {"functional", "layers", "models", "data"},
    "commands": CORE
    | {"data", "distribution", "functional", "layers", "losses", "models"}
    | {"optimizers", "planning", "serving", "telemetry"},
}
# Imported when it is called; it decides which of two equal products is the faster, and may
# be missing.
ALLOWED_INTERNALS = {"runtime": {"tensorflow.python.util._pywrap_util_port"}}
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


def internals_of(path):
    """What a file imports from inside of a library, and may not."""
    inside = "keras.src", "tensorflow.python", "tensorflow.dtensor"
    allowed = ALLOWED_INTERNALS.get(part_of(path), set())
    return [n for n in imports(path) if n.startswith(inside) and n not in allowed]


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
    assert not internals_of(path)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("__internal__", "src"), path


def public_name(node):
    """`["keras", "tree", "flatten"]` of such an expression; None of any other."""
    names = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    known = isinstance(node, ast.Name) and node.id in ("keras", "tf")
    return [node.id, *names] if known else None


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_names_and_options_of_libraries_are_in_these_versions(path):
    """A name that only newer ones have is found without running the line."""
    if part_of(path) == "distribution":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        called = isinstance(node, ast.Call)
        names = public_name(node.func if called else node)
        if names is None:
            continue
        found = {"keras": keras, "tf": tf}[names[0]]
        for name in names[1:]:
            assert hasattr(found, name), f"{'.'.join(names)} in line {node.lineno}"
            found = getattr(found, name)
        try:
            taken = inspect.signature(found).parameters if called else {}
        except (TypeError, ValueError):  # written in C
            continue
        if all(each.kind is not each.VAR_KEYWORD for each in taken.values()):
            given = (
                {each.arg for each in node.keywords if each.arg} if called else set()
            )
            assert given <= taken.keys(), f"{'.'.join(names)} in line {node.lineno}"


# Of Keras, TensorFlow and Python; in each of the versions that are allowed.
PRIVATE_NAMES = {
    "_build_shapes_dict",
    "_called",
    "_flatten_layers",
    "_get_variable_index",
    "_non_trainable_variables",
    "_track_variable",
    "_tracker",
    "_trainable_variables",
    "_untrack_variable",
    "_use_weight_decay",
}
PRIVATE_NAMES |= {
    "_get_control_flow_context",
    "_asdict",
    "_fields",
    "_getframe",
    "_replace",
}


def test_few_private_names_of_libraries_are_used():
    """Others may be missing from an older version: ask for them with `getattr`."""
    trees = {path: ast.parse(path.read_text()) for path in FILES}
    own, used = set(), set()
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                own.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
            elif isinstance(node, ast.Attribute):
                if isinstance(node.ctx, ast.Store):
                    own.add(node.attr)
                elif part_of(path) != "distribution":
                    used.add(node.attr)
    private = {name for name in used - own if name[0] == "_" and name[:2] != "__"}
    assert private <= PRIVATE_NAMES


def test_planning_takes_arithmetic_only_from_distribution():
    """A preset is planned without TensorFlow; `traced` reads the graphs of models."""
    for path in (PACKAGE / "planning").rglob("*.py"):
        found = {n for n in imports(path) if n.startswith("keras_moe.distribution")}
        assert all(n.startswith("keras_moe.distribution.topology.") for n in found)
        traced = path.parent.name == "traced"
        roots = {n.split(".")[0] for n in imports(path)}
        assert traced or not roots & {"tensorflow", "keras"}, path
        layers = [n for n in imports(path) if n.startswith("keras_moe.layers")]
        assert traced or not layers, path


def test_functional_code_knows_no_keras():
    for path in (PACKAGE / "functional").glob("*.py"):
        assert not [n for n in imports(path) if n.split(".")[0] == "keras"], path


def test_oracles_import_neither_the_package_nor_tensorflow():
    found = list((ROOT / "tests" / "oracles").glob("*.py"))
    assert found
    for path in found:
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & {"keras_moe", "tensorflow", "keras"}, path


def test_importing_the_package_reaches_inside_no_library():
    """The two engines do, and are imported when such a strategy is seen."""
    code = (
        "import sys, keras_moe; "
        "print(*(m for m in sys.modules if m.startswith('keras_moe.')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded = done.stdout.split()
    assert "keras_moe.layers.moe" in loaded
    inside = []
    for path in FILES:
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        if name.removesuffix(".__init__") in loaded:
            inside += internals_of(path)
    assert not inside
    assert not [m for m in loaded if m.startswith("keras_moe.distribution.mirrored")]
    assert not [m for m in loaded if m.startswith("keras_moe.distribution.dtensor")]


def test_no_name_hides_a_module():
    """`import keras_moe.part.module as m` gives the module."""
    for path in FILES:
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        if parts[-1] in ENTRY_POINTS:
            continue
        importlib.import_module(".".join(parts))
        package = importlib.import_module(".".join(parts[:-1]))
        assert isinstance(getattr(package, parts[-1]), types.ModuleType), parts


def test_one_place_of_functional_asks_where_it_runs():
    asking = [
        path.name
        for path in (PACKAGE / "functional").glob("*.py")
        if any(name.startswith("keras_moe.engine") for name in imports(path))
    ]
    assert asking == ["ops.py"]


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
