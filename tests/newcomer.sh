#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A user's and a contributor's first hour, from a fresh clone (of what is committed): tests/newcomer.sh [report]
# Installs, trains the demo, patches a model, adds the guide's op. Writes the seconds of each step to the report.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
report=$(realpath -m "${1:-$root/runs/newcomer.txt}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$(dirname "$report")"
unset PYTHONPATH VIRTUAL_ENV MAKEFLAGS MAKELEVEL

step() { # command …
  local began=$SECONDS
  "$@" >"$work/log" 2>&1 || { tail -50 "$work/log"; echo "newcomer: '$*' failed after $((SECONDS - began)) s"; exit 1; }
  printf '%5d s  %s\n' $((SECONDS - began)) "$*" | tee -a "$report"
}

{
  echo "commit $(git -C "$root" rev-parse --short HEAD), $(date -u +%FT%TZ), $(nproc) cores"
  grep -m1 "model name" /proc/cpuinfo
} | tee "$report"
step git clone --quiet "$root" "$work/mmkernels"
cd "$work/mmkernels"
step make install
step make demo
PATH=$PWD/.venv/bin:$PATH
step mmkernels generate --image runs/demo/sample_0.png --prompt "which digits are shown?"
step python examples/finetune_llava.py
step python -m pytest -q -m "full or not full" tests/test_guide.py
printf '%5d s  in all\n' "$SECONDS" | tee -a "$report"
