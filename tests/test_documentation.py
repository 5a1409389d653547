"""The documentation is true: its code runs, its commands exist, its site builds."""

import inspect
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_moe
from keras_moe.__main__ import make_parser

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
MARKDOWN = [
    ROOT / "README.md",
    *sorted(
        page
        for page in DOCS.rglob("*.md")
        if not {"site", "generated"} & set(page.relative_to(DOCS).parts)
    ),
]
RECORDS = ("decisions", "benchmarks", "experiments")
# Pages that a reader follows: all their Python runs. Decisions show fragments.
PAGES = [page for page in MARKDOWN if page.parent.name not in RECORDS]


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python")], ids=name_of
)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}  # a page's blocks build on each other
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), names)


def test_readme_and_every_guide_have_python_to_run():
    guides = (DOCS / "guides").glob("*.md")
    for page in [ROOT / "README.md", DOCS / "quick_start.md", *guides]:
        if page.name != "dtensor.md":  # a mesh must come before all else of a process
            assert blocks(page, "python"), page


def commands(page):
    """The commands of the shell blocks of a page, as lists of words."""
    for block in blocks(page, "(?:bash|console|sh)"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = next((i for i, w in enumerate(words) if w in ("&&", "|")), None)
                yield words[:end]
                words = [] if end is None else words[end + 1 :]


def verify_command(words):
    """Fails unless a command's program, files and options exist."""
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if not words:  # the line sets variables only
        return
    program, *arguments = words
    program = Path(program).name
    if program.startswith("python") and arguments[0] == "-m":
        module, *arguments = arguments[1:]
        program = {"pip": "pip"}.get(module, module)
    if program in ("keras_moe", "keras-moe"):
        if "--help" not in arguments:
            make_parser().parse_args(arguments)  # exits on an unknown option
        else:
            with pytest.raises(SystemExit, match="0"):
                make_parser().parse_args(arguments)
    elif program == "pip":
        verify_extras(" ".join(arguments))
    elif program.startswith("python"):
        script = ROOT / arguments[0]
        assert script.is_file(), script
        for option in set(re.findall(r"(?<!\S)--[\w-]+", " ".join(arguments))):
            if option == "--help":  # every argparse script has it
                continue
            # Declared by the script, or by the runner it shares with its neighbours.
            texts = [script.read_text(), *map(Path.read_text, _runners(script))]
            assert any(f'"{option}"' in text for text in texts), (script, option)
    elif program == "bash":
        assert (ROOT / arguments[0]).is_file(), arguments
    elif program == "docker":
        assert arguments[:2] == ["compose", "-f"], arguments
        assert (ROOT / arguments[2]).is_file(), arguments
    elif program == "sphinx":
        assert (ROOT / "docs" / "conf.py").is_file()
    else:
        # A page may name other programs, but each is looked at when it is added.
        assert program in ("venv", "pytest", "tensorboard", "build"), words


def _runners(script):
    """Neighbours that a script imports."""
    names = re.findall(r"^(?:from|import) (\w+)", script.read_text(), re.M)
    paths = [script.parent / f"{name}.py" for name in names]
    return [path for path in paths if path.is_file()]


def verify_extras(text):
    """Every extra of this package that a `pip install` names is declared."""
    assert text.startswith("install "), text
    declared = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M)
    for names in re.findall(r"(?:keras-moe|\.)\[([\w,]+)\]", text):
        assert set(names.split(",")) <= set(declared), names


@pytest.mark.parametrize(
    "page", [page for page in MARKDOWN if list(commands(page))], ids=name_of
)
def test_commands_and_their_options_exist(page):
    for words in commands(page):
        verify_command(words)


@pytest.mark.parametrize(
    "command",
    [
        "python -m keras_moe train-lm --no-such-option 3",
        "python -m keras_moe no-such-command",
        "python examples/no_such_script.py",
        "python examples/benchmarks/layer_benchmark.py --no-such-option",
        "pip install keras-moe[nothing]",
        "bash tests/no_such_file.sh",
        "curl https://example.org",
    ],
)
def test_a_command_that_does_not_exist_is_found(command):
    with pytest.raises((AssertionError, SystemExit)):
        verify_command(shlex.split(command))


def test_readme_names_the_commands_that_ci_runs():
    readme = (ROOT / "README.md").read_text()
    assert "bash tests/run.sh" in readme
    assert "tests/run.sh" in (ROOT / ".ci" / "run").read_text()


def test_the_oldest_versions_that_are_allowed_are_those_that_ci_runs():
    project = (ROOT / "pyproject.toml").read_text()
    script = (ROOT / "tests" / "run_oldest.sh").read_text()
    (allowed,) = re.findall(r"^dependencies = .*", project, re.M)
    for name in ("tensorflow", "keras"):
        (least,) = re.findall(rf'"{name}>=([\d.]+),', allowed)
        assert f'"{name}=={least}.*"' in script
    for test in re.findall(r"tests/\w+/?[\w./]*", script):
        assert (ROOT / test).exists(), test
    assert "tests/run_oldest.sh" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("page", MARKDOWN, ids=name_of)
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_table_of_pitfalls_names_tests_that_exist():
    page = (ROOT / "docs" / "pitfalls.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", page))
    assert len(named) > 20
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"^def (test_\w+)\(", tests, re.M))
    assert named <= defined


def public_symbols():
    """Full names of everything in `__all__` of the package and its parts."""
    for name in keras_moe.__all__:
        part = getattr(keras_moe, name)
        if not inspect.ismodule(part):
            continue
        yield f"keras_moe.{name}"
        own = [n for n, v in vars(part).items() if is_own_class(part, v)]
        for symbol in getattr(part, "__all__", own):
            yield f"keras_moe.{name}.{symbol}"


def is_own_class(part, value):
    return (
        inspect.isclass(value)
        and value.__module__ == part.__name__
        and not value.__name__.startswith("_")
    )


def test_every_equation_has_its_symbols():
    page = (DOCS / "equations.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.+?) \| (.+) \|$", page, re.M)
    assert [int(number) for number, *_ in rows] == list(range(1, 23))
    for number, _, code in rows:
        assert "{py:obj}" in code, number
    public = set(public_symbols())
    for name in re.findall(r"\{py:obj\}`([\w.]+)`", page):
        if name.startswith("keras_moe."):
            assert name in public, name
        else:
            assert callable(pkgutil.resolve_name(name)), name


def test_what_stands_for_equation_21_computes_it():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(1, 5, 3)), rng.normal(size=(1, 4, 6))
    u, w, v = rng.normal(size=(3, 2)), rng.normal(size=(6, 2)), rng.normal(size=2)
    attention = keras.layers.AdditiveAttention(dtype="float64")
    attention.build([(1, 4, 2), (1, 5, 2)])
    attention.scale.assign(v)
    scores = attention._calculate_scores(query=y @ w, key=x @ u)
    for j, i in np.ndindex(4, 5):  # A(x_i, y_j)
        expected = np.sum(v * np.tanh(x[0, i] @ u + y[0, j] @ w))
        np.testing.assert_allclose(scores[0, j, i], expected, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_site_builds_without_a_warning_and_has_a_page_for_every_symbol(tmp_path):
    # Proxies that lead nowhere: the build must not need a network.
    nowhere = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q"]
    folders = ["-d", str(tmp_path / "doctrees"), str(DOCS), str(site)]
    build = subprocess.run(
        [*command, *folders],
        env={**os.environ, **nowhere},
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stderr
    symbols = list(public_symbols())
    assert len(symbols) > 90
    for symbol in symbols:
        page = site / "api" / "generated" / f"{symbol}.html"
        assert page.is_file(), symbol
        kind = "module-" * (symbol.count(".") == 1)
        assert f'id="{kind}{symbol}"' in page.read_text(), symbol
    for page in MARKDOWN[1:]:
        built = site / page.relative_to(DOCS).with_suffix(".html")
        assert built.is_file(), page
