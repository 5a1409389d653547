#!/usr/bin/env bash
# Makes a virtual environment, installs the package with what its tests need, and
# passes the tests: first the quick ones, then the slow ones. With COVERAGE=1 it also
# measures which lines of the package they run, and wants 90 % of them. With
# EXHAUSTIVE=1 every case of every slow test is run, which takes about twice as long.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3.11}"
venv=.venv-tests
rm -rf "$venv"
"$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e ".[dev]"
export TF_CPP_MIN_LOG_LEVEL=2
"$venv/bin/python" -m ruff check .
"$venv/bin/python" -m ruff format --check .
"$venv/bin/python" -m mypy
slow="slow and not exhaustive"
if [ -n "${EXHAUSTIVE:-}" ]; then
  slow="slow"
fi
first=() second=()
if [ -n "${COVERAGE:-}" ]; then
  first=(--cov --cov-report=)
  second=(--cov --cov-append --cov-report=term --cov-fail-under=90)
fi
"$venv/bin/python" -m pytest -q -n 2 --dist loadscope -m "not slow" "${first[@]}"
"$venv/bin/python" -m pytest -q -n 2 --dist loadscope -m "$slow" --timeout 900 "${second[@]}"
