#!/usr/bin/env bash
# Passes quick tests of the core with the oldest TensorFlow and Keras that
# pyproject.toml allows, in a virtual environment of its own. With ALL=1 these are all
# quick tests of the core, else those that say most in about three minutes.
#
#     ALL=1 VERSIONS="tensorflow==2.21.* keras==3.15.*" bash tests/run_oldest.sh
#
# Left out is what an extra brings, with pins of its own: texts in exported models
# (tensorflow-text, tensorflow-serving-api) and translation.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3.11}"
venv=.venv-oldest
rm -rf "$venv"
"$python" -m venv "$venv"
versions=("tensorflow==2.18.*" "keras==3.6.*")
if [ -n "${VERSIONS:-}" ]; then
  read -ra versions <<<"$VERSIONS"
fi
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e . \
  "${versions[@]}" "pytest>=8" "pytest-timeout>=2.3" "pytest-xdist>=3.6"
export TF_CPP_MIN_LOG_LEVEL=2
# The names and options that any file uses, what Keras and TensorFlow write and read,
# then sums: gates, losses, plans, layers in `fit`.
tests=(
  tests/test_architecture.py
  tests/test_saved_files.py
  tests/serving/test_export.py
  tests/serving/test_structures.py
  tests/functional/test_gating_and_losses.py
  tests/functional/test_dispatch_and_experts.py
  tests/functional/test_hierarchical.py
  tests/functional/test_mixture.py
  tests/layers/test_gates_and_experts.py
  tests/layers/test_moe_layer.py
  tests/layers/test_sampled_softmax.py::test_no_logits_are_computed_in_a_training_step
)
if [ -n "${ALL:-}" ]; then
  tests=(
    tests/test_architecture.py
    tests/test_saved_files.py
    tests/conformance
    tests/conversion
    tests/functional
    tests/layers
    tests/serving
    --ignore tests/serving/test_language_model.py
    --ignore tests/serving/test_translate.py
  )
fi
"$venv/bin/python" -m pytest -q -n 2 --dist loadscope -m "not slow" "${tests[@]}"
