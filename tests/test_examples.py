# SPDX-License-Identifier: Apache-2.0
"""Every example runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "examples"
SHARED = ("finetune.py", "compare.py")
SCRIPTS = sorted(p.relative_to(ROOT) for p in ROOT.rglob("*.py") if p.name not in SHARED)


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_example(script: Path) -> None:
    if script.name.startswith("finetune"):
        pytest.importorskip("transformers")
    arguments = ["--steps", "3"] if script.name.startswith("finetune") else []
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *arguments], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "agree" in done.stdout or "largest difference of a loss" in done.stdout
