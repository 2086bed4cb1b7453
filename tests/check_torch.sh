#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The other torch ($2), in an environment outside the repository that is removed afterwards: the wheel built
# with the torch of $1 must pass `mmkernels doctor` there, and so must a wheel compiled against its headers.
set -euo pipefail
python=$(realpath -s "$1") torch=$2
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PATH="$(dirname "$python"):$PATH"
build() { "$python" -m pip wheel --quiet --no-build-isolation --no-deps -w "$1" "$root" && ls "$1"; }
doctor() {
  "$work/env/bin/python" -m pip install --quiet --no-deps --force-reinstall "$1"/*.whl
  (cd "$work" && MMKERNELS_STRICT=1 "$work/env/bin/python" -m mmkernels doctor)
}
build "$work/wheel"
"$python" -m venv "$work/env"
"$work/env/bin/python" -m pip install --quiet "$torch" numpy
doctor "$work/wheel"
export MMKERNELS_TORCH_DIR=$("$work/env/bin/python" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')
build "$work/wheel_of_other"
doctor "$work/wheel_of_other"
(cd "$work" && "$work/env/bin/python" -m mmkernels info)
