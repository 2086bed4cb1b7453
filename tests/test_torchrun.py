# SPDX-License-Identifier: Apache-2.0
"""``mmkernels train --config`` in two processes: the losses of one, also after a kill."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_training import Sums, _yaml

from mmkernels.train import checkpoint, run

SCRIPT = Path(__file__).parent / "train_processes.py"


def _run(processes: int, config: Path, out: Path, *more: str) -> int:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    done = subprocess.run(
        [*torchrun, str(processes), str(SCRIPT), str(config), str(out), *more], capture_output=True, text=True,
        timeout=240, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0 or more, done.stderr[-3000:]
    return done.returncode


def _losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


def test_two_processes_stop_and_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _yaml(tmp_path, accumulate=2)
    monkeypatch.setattr("mmkernels.train.trainer.fast_bf16", lambda: False)
    alone = run.train(run.read_config(config), tmp_path / "alone", Sums)
    _run(2, config, tmp_path / "whole")
    assert _losses(tmp_path / "whole") == pytest.approx(alone.losses, rel=1e-5)
    assert _run(2, config, tmp_path / "cut", "10") != 0
    assert [p.name for p in (tmp_path / "cut").glob("step-*")] == ["step-00000004"]
    assert not list((tmp_path / "cut").rglob("*.distcp")) and len(_losses(tmp_path / "cut")) == 5
    with pytest.raises(checkpoint.CheckpointError, match="go on with torchrun"):
        run.train(run.read_config(config), tmp_path / "cut", Sums)
    (tmp_path / "cut" / "step-by-step").mkdir()  # somebody else's
    _run(2, config, tmp_path / "cut")
    found = sorted(p.name for f in ("whole", "cut") for p in (tmp_path / f).glob("step-*"))
    assert found == ["step-by-step"]
    assert _losses(tmp_path / "cut") == _losses(tmp_path / "whole")
    models = [checkpoint.load(tmp_path / f) for f in ("whole", "cut", "alone")]
    assert models[0].stages == ("pt",)
    for name, tensor in models[0].model.state_dict().items():
        assert torch.equal(tensor, models[1].model.state_dict()[name]), name
        near = models[2].model.state_dict()[name]
        torch.testing.assert_close(tensor, near, rtol=1e-2, atol=1e-4)
