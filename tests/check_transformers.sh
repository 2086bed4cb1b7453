#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The tests of patch(model) under another transformers, in a folder of its own: check_transformers.sh PYTHON VERSION
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$1" -m pip install --quiet --no-compile --target "$folder" "transformers==$2"
PYTHONPATH="$folder" "$1" -c "import transformers; print('transformers', transformers.__version__)"
PYTHONPATH="$folder" "$1" -m pytest -q -m "full or not full" \
  tests/test_patch.py tests/test_patch_classes.py tests/test_patch_integrations.py tests/test_transformers_cache.py
