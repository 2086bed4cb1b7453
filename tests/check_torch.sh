#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the wheel with the torch of $1 and runs `mmkernels doctor` with it under another torch ($2), in an
# environment outside the repository that is removed afterwards.
set -euo pipefail
python=$1 torch=$2
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
PATH="$(dirname "$(realpath -s "$python")"):$PATH" "$python" -m pip wheel --quiet --no-build-isolation --no-deps -w "$work/wheel" "$root"
ls "$work/wheel"
"$python" -m venv "$work/env"
"$work/env/bin/python" -m pip install --quiet "$torch" numpy
"$work/env/bin/python" -m pip install --quiet --no-deps "$work"/wheel/*.whl
cd "$work"
"$work/env/bin/python" -m mmkernels info
"$work/env/bin/python" -m mmkernels doctor
