#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# tests/check_torch.sh PYTHON TORCH [OTHER_PYTHON] [REPORT]
# TORCH ("torch==2.11.0") under OTHER_PYTHON, in an environment outside the repository that is removed afterwards: the
# wheel built with the torch of PYTHON, and one compiled against the other's headers, must pass `mmkernels doctor` and
# the tests of every op there. A line for each is added to REPORT.
set -euo pipefail
python=$(realpath -s "$1") torch=$2 other=${3:-$1} report=$(realpath -m "${4:-/dev/null}")
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PATH="$(dirname "$python"):$PATH"
unset PYTHONPATH
inside=$work/env/bin/python
build() { "$python" -m pip wheel --quiet --no-build-isolation --no-deps -w "$1" "$root" && ls "$1"; }
check() { # folder of the wheel, its name in the report
  "$inside" -m pip install --quiet --no-deps --force-reinstall "$1"/*.whl
  cd "$work"
  MMKERNELS_STRICT=1 "$inside" -m mmkernels doctor
  "$inside" -m pytest -q -p no:cacheprovider tests/test_ops.py | tee ops.txt
  "$inside" -c 'import platform, torch; print(f"torch {torch.__version__}, python {platform.python_version()}", end=", ")' >>"$report"
  echo "wheel built with $2: doctor passed, tests/test_ops.py: $(tail -1 ops.txt)" >>"$report"
}
build "$work/wheel"
"$other" -m venv "$work/env"
# Without the machine's own pip configuration: it may cap torch.
PIP_CONFIG_FILE=/dev/null "$inside" -m pip install --quiet "$torch" numpy pytest pytest-timeout
cp -r "$root/tests" "$root/pyproject.toml" "$work"
check "$work/wheel" "torch $("$python" -c 'import torch; print(torch.__version__)')"
export MMKERNELS_TORCH_DIR=$("$inside" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')
build "$work/wheel_of_other"
check "$work/wheel_of_other" "itself"
"$inside" -m mmkernels info
