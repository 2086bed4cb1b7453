# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` work from a clean clone: they make .venv, install torch first, build, run.
SHELL := /bin/bash
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
TORCH ?= torch==2.13.0
OTHER_PYTHON ?= $(firstword $(wildcard /usr/bin/python3.1[2-9] $(HOME)/.pyenv/versions/3.1[2-9]*/bin/python3))
INSTALLED := $(VENV)/.installed
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml

.PHONY: demo demo-full test lint full install check-torch check-transformers gpu-check newcomer compile-cuda compile-triton bench fuzz sanitize mutants clean

install: $(INSTALLED)

# torch first and alone: anything else that asks for torch would fetch a multi-gigabyte CUDA build.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(PY) -m pip install --quiet "$(TORCH)" numpy
	-$(PY) -m pip install --quiet triton==3.7.1 || echo "triton not installed: its tests are skipped"
	touch $@

$(INSTALLED): $(VENV)/.torch $(SOURCES)
	$(PY) -m pip install --quiet "setuptools>=77" wheel "cmake>=3.25" ninja pybind11
	PATH="$(abspath $(VENV)/bin):$$PATH" $(PY) -m pip install --quiet --no-build-isolation -e ".[dev]"
	touch $@

demo-full: install
	mkdir -p runs/demo-full
	$(PY) -m benchmarks.end_to_end runs/demo-full/end_to_end.json --dtype fp32 --rounds 3
	$(PY) -m mmkernels demo --full --out runs/demo-full

demo: install
	$(PY) -m mmkernels demo
	$(PY) -m benchmarks.run --quick

# The interpreter uses one core: it runs beside the suite.
test: export OMP_WAIT_POLICY = passive
test: install
	@TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) -m pytest -q tests/interpreted >$(VENV)/interpreted.txt 2>&1 & \
	$(PY) -m pytest -q tests benchmarks/test_harness.py; suite=$$?; \
	wait $$!; interpreted=$$?; cat $(VENV)/interpreted.txt; [ $$suite = 0 ] && [ $$interpreted = 0 ]

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Every .cu for every architecture we ship; no GPU and no torch needed.
compile-cuda:
	@if command -v nvcc >/dev/null; then set -e; for f in csrc/*/*.cu; do for a in 80 90a 100; do \
	  echo "nvcc sm_$$a $$f"; nvcc -std=c++17 -O3 -arch=sm_$$a -Xptxas -v -c $$f -o /dev/null 2>&1 | tee /tmp/mmk_ptxas.txt | grep -E "error" && exit 1; \
	  if grep -E "[1-9][0-9]* bytes spill" /tmp/mmk_ptxas.txt; then echo "$$f spills registers on sm_$$a"; exit 1; fi; \
	  done; done; else echo "compile-cuda: no nvcc here, skipped"; fi

compile-triton: install
	@if $(PY) -c "import triton" 2>/dev/null; then $(PY) tests/aot/compile_triton.py; else echo "compile-triton: triton is not installed, skipped"; fi

bench: install
	$(PY) -m benchmarks.run

full: test lint compile-cuda compile-triton fuzz sanitize mutants check-transformers
	$(PY) -m pytest -q -m full tests
	TRITON_INTERPRET=1 $(PY) -m pytest -q -m full tests/interpreted
	$(PY) -m pytest -q benchmarks --benchmark-disable

# Random calls, FUZZ_CASES of every kind (default 10000), from seed FUZZ_SEED on.
fuzz: install
	$(PY) tests/fuzz/fuzzing.py --out tests/reports/fuzz.txt

# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: install
	tests/sanitize.sh "$(PY)"

# 50 small faults put into the sources by rule: the suite must notice 45 (an hour).
mutants: install
	$(PY) tests/mutants.py --out tests/reports/mutants.txt

# The wheel under the oldest and the newest torch and another Python, in environments of their own (10 GB; never in CI).
check-torch: install
	rm -f tests/reports/torch.txt
	tests/check_torch.sh "$(PY)" torch==2.11.0 "$(PY)" tests/reports/torch.txt
	tests/check_torch.sh "$(PY)" torch "$(OTHER_PYTHON)" tests/reports/torch.txt

# The oldest transformers whose get_rope_index takes mm_token_type_ids.
check-transformers: install
	tests/check_transformers.sh "$(PY)" 5.3.0

# On a machine with a GPU: build, bounds, streams, graphs, the table; results in benchmarks/results/<gpu>.
gpu-check:
	$(or $(GPU_PYTHON),python3) -m benchmarks.gpu_check

# From a fresh clone to the demo, a patched model and an op of one's own; seconds of each in runs/newcomer.txt.
newcomer:
	tests/newcomer.sh

clean:
	rm -rf build dist *.egg-info $(VENV) mmkernels/_C.so mmkernels/_build_info.json runs
