#!/usr/bin/env bash
# Passes the quick tests of the core with the oldest TensorFlow and Keras that
# pyproject.toml allows, in a virtual environment of its own.
#
# Left out is what an extra brings, with pins of its own: texts in exported models
# (tensorflow-text, tensorflow-serving-api) and translation.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3.11}"
venv=.venv-oldest
rm -rf "$venv"
"$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e . \
  "tensorflow==2.18.*" "keras==3.6.*" \
  "pytest>=8" "pytest-timeout>=2.3" "pytest-xdist>=3.6" "scipy>=1.13"
export TF_CPP_MIN_LOG_LEVEL=2
"$venv/bin/python" -m pytest -q -n 2 --dist loadgroup -m "not slow" \
  --ignore tests/serving/test_language_model.py --ignore tests/serving/test_translate.py \
  tests/functional tests/layers tests/serving
