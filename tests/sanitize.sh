#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: tests/sanitize.sh PYTHON [fuzz cases]
# Builds them apart (build/asan), copies the package beside them (mmkernels/_C.so stays what it is) and runs the
# tests that reach them and random calls, whole under the best instruction set, a share of it under lesser ones.
# target_clones are off under ASan (their resolvers would run before it), so hot loops run in their plain form.
# Threads race in a program of its own, over the headers alone (csrc/testing/races.cpp), under ThreadSanitizer.
# Without a number of cases what was run is kept in tests/reports/sanitize.txt.
set -euo pipefail
python=$(realpath -s "$1")
cases=${2:-2000}
root=$(cd "$(dirname "$0")/.." && pwd)
build=$root/build/asan
torch=$("$python" -c 'import importlib.util as u; print(next(iter(u.find_spec("torch").submodule_search_locations)))')
tools=$(dirname "$python")
PATH=$tools:$PATH

mkdir -p "$build"
cmake -S "$root" -B "$build" -G Ninja -DTORCH_DIR="$torch" -DMMK_BUILD=cpu -DMMK_SANITIZE=ON \
  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$build/lib" >"$build.log" 2>&1 || { cat "$build.log"; exit 1; }
cmake --build "$build" -j "${MAX_JOBS:-2}" >>"$build.log" 2>&1 || { cat "$build.log"; exit 1; }

copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
tar -C "$root" --exclude=_C.so --exclude=__pycache__ -cf - mmkernels tests benchmarks pyproject.toml | tar -C "$copy" -xf -
cp "$build/lib/_C.so" "$copy/mmkernels/_C.so"

cxx=$(sed -n 's/^CMAKE_CXX_COMPILER:[^=]*=//p' "$build/CMakeCache.txt")
export PYTHONPATH=$copy PYTHONMALLOC=malloc OMP_NUM_THREADS=2
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:exitcode=99:allocator_may_return_null=1
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1:exitcode=99
sanitized() { # instruction set ("": the best of this CPU), command …
  local isa=$1
  shift
  (cd "$copy" && MMKERNELS_ISA=$isa \
    LD_PRELOAD="$("$cxx" -print-file-name=libasan.so):$("$cxx" -print-file-name=libubsan.so)" "$@")
}

sanitized "" "$python" -c "
import mmkernels
from mmkernels import backends
assert mmkernels.__file__.startswith('$copy'), mmkernels.__file__
assert not backends.native_error(), backends.native_error()
assert 'libasan' in open('/proc/self/maps').read()"

checks() {
  echo "== op tests"
  sanitized "" "$python" -m pytest -q -x -p no:randomly tests/test_ops.py tests/test_errors.py \
    tests/fuzz/test_fuzz_rope_write_kv.py -k "(fuzz_rope or bound or layouts or empty or invalid or itself or threads) and not real_models"
  echo "== random calls"
  for kind in image packed tubelet audio; do
    sanitized "" "$python" tests/fuzz/fuzzing.py --op patch_embed --kind $kind --cases $((cases / 4))
  done
  for op in cross_attention patch_merge merge_embeddings pack_embeddings mrope_positions mrope paged_attention \
    compact_kv; do
    sanitized "" "$python" tests/fuzz/fuzzing.py --op $op --cases $((cases / 8))
  done
  for isa in avx2 generic; do
    echo "== $isa"
    sanitized $isa "$python" -m pytest -q -x tests/test_ops.py tests/test_errors.py \
      -k "patch_embed and (bound or empty) and (bfloat16 or float32 or empty) and not real_models"
    for kind in image packed tubelet audio; do
      sanitized $isa "$python" tests/fuzz/fuzzing.py --op patch_embed --kind $kind --cases $((cases / 20))
    done
  done
  echo "== ThreadSanitizer"
  "$cxx" -std=c++17 -O1 -g -fsanitize=thread "$root"/csrc/testing/races.cpp "$root"/csrc/common/gemm_cpu.cpp \
    -o "$build/races"
  TSAN_OPTIONS=halt_on_error=1:exitcode=99 "$build/races"
  echo "sanitize: no report"
}
commit=$(git -C "$root" rev-parse HEAD)
checks | tee "$build/out.txt"

if [ -z "${2:-}" ]; then
  mkdir -p "$root/tests/reports"
  {
    echo "AddressSanitizer, UndefinedBehaviorSanitizer, ThreadSanitizer, $("$cxx" --version | head -1), commit $commit"
    grep -E "^==|^fuzz .*: ([0-9]+)/\1 calls|passed|no report" "$build/out.txt" | sed 's/, [0-9]* s$//' | uniq
  } >"$root/tests/reports/sanitize.txt"
fi
