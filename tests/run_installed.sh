#!/usr/bin/env bash
# Builds the wheel and the sdist, installs the wheel into a virtual environment of its
# own, and passes the tests from a folder without the source: what users get is tested.
#
#     bash tests/run_installed.sh                  # the quick tests
#     bash tests/run_installed.sh -m slow          # other arguments of pytest
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3.11}"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
installed="$folder/venv/bin/python"
"$installed" -m pip install --quiet --disable-pip-version-check build
# The wheel is made from the sdist, so a file that the sdist lacks is missed here.
"$installed" -m build --outdir "$folder/dist" .
wheel="$(ls "$folder"/dist/*.whl)"
"$installed" -m pip install --quiet --disable-pip-version-check "${wheel}[dev]"
mkdir "$folder/elsewhere"
cp -r tests examples docs README.md CHANGELOG.md LICENSE pyproject.toml .ci "$folder/elsewhere"
cd "$folder/elsewhere"
export TF_CPP_MIN_LOG_LEVEL=2
unset PYTHONPATH
"$installed" -c "import keras_moe, sys; sys.exit('elsewhere' in keras_moe.__file__)"
if [ $# -eq 0 ]; then set -- -m "not slow"; fi
"$installed" -m pytest -q -n 2 "$@"
