# SPDX-License-Identifier: Apache-2.0
"""Two gloo processes give the losses of one, also where one of them has no image; shards come back whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmkernels.train.checkpoint import CheckpointError
from mmkernels.train.distributed import check_sharded

SCRIPT = Path(__file__).parent / "two_processes.py"


def _run(processes: int, out: Path) -> list[float]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    done = subprocess.run(
        [*torchrun, str(processes), str(SCRIPT), str(out)], capture_output=True, text=True, timeout=240,
        check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    losses: list[float] = json.loads((out / "losses.json").read_text())
    return losses


def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    one, two = _run(1, tmp_path / "one"), _run(2, tmp_path / "two")
    assert one[0] > one[-1] and len(one) == 5
    assert two == pytest.approx(one, rel=1e-12)
    assert len(list((tmp_path / "two").rglob("*.safetensors"))) == 2
    assert not list((tmp_path / "two").rglob("*.distcp"))
    check_sharded(tmp_path / "two")
    path = next((tmp_path / "two").rglob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="altered"):
        check_sharded(tmp_path / "two")
    path.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        check_sharded(tmp_path / "two")
    (tmp_path / "two" / "sharded.json").write_text('{"files": {}}')
    with pytest.raises(CheckpointError, match="not a checkpoint manifest"):
        check_sharded(tmp_path / "two")


def test_ops_on_dtensors() -> None:
    """A sharded batch, replicated arguments, lists of tensors."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    script = Path(__file__).parent / "dtensor_processes.py"
    done = subprocess.run(
        [*torchrun, "2", str(script)], capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
