# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind: rows and where they were measured, as JSON and back."""

import json
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import mmkernels
from mmkernels.version import __version__


@dataclass
class Row:
    """One op, case, dtype, direction and device. A failing row has ``failure`` and no times."""

    op: str
    case: str
    dtype: str
    direction: str
    device: str
    frozen: str = ""
    checked_on: str = ""  # the sizes the bound was checked on, if not the full ones
    failure: str = ""
    bound: str = ""  # whose bound the errors were held to
    kernel: str = ""
    algorithm: str = ""
    times_s: dict[str, dict[str, float]] = field(default_factory=dict)  # variant: median, p20, p80
    speedup: dict[str, float] = field(default_factory=dict)  # over each other variant
    ceiling: str = ""  # what bounds the row: copy, gemm, or the case's own
    fraction: float | None = None
    bytes_per_s: float | None = None
    flops_per_s: float | None = None
    extra_bytes: dict[str, int] = field(default_factory=dict)
    worst: str = ""  # the tensor nearest to its bound, and how near
    worst_ratio: float | None = None
    error: float | None = None  # its largest error
    eager_error: float | None = None
    machine: dict[str, float] = field(default_factory=dict)  # copy and gemm, in these rounds
    missing: dict[str, str] = field(default_factory=dict)  # baselines that did not run, and why

    @property
    def named(self) -> str:
        """The case, and what of it is frozen."""
        return f"{self.case} ({self.frozen} frozen)" if self.frozen else self.case

    @property
    def lost(self) -> bool:
        """Slower than eager by more than one in twenty."""
        return not self.failure and self.speedup.get("eager", 1.0) < 0.95


@dataclass
class Run:
    """A table and its circumstances."""

    machine: dict[str, Any]
    versions: dict[str, str | None]
    git: dict[str, Any]
    date: str
    args: dict[str, Any]
    ceilings: dict[str, dict[str, float]]
    rows: list[Row]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False)
        path.write_text(text + "\n")


def load(path: Path) -> Run:
    data = json.loads(path.read_text())
    rows = data.pop("rows")
    if any("op" not in row for row in rows):
        raise ValueError(f"{path}: not a table of ops (of python -m benchmarks.run)")
    rows = [Row(**row) for row in rows]
    return Run(rows=rows, **data)


def new_run(args: dict[str, Any], rows: list[Row]) -> Run:
    """These rows, here and now."""
    return Run(
        machine=machine(),
        versions=versions(),
        git=git_state(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        args=args,
        ceilings=_median_ceilings(rows),
        rows=rows,
    )


def _median_ceilings(rows: list[Row]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for key in sorted({f"{row.device} {row.dtype}" for row in rows if row.machine}):
        these = [r.machine for r in rows if r.machine and f"{r.device} {r.dtype}" == key]
        found[key] = {
            name: torch.tensor([m[name] for m in these], dtype=torch.float64).median().item()
            for name in these[0]
        }
    return found


def machine() -> dict[str, Any]:
    """CPU, its instruction sets, threads, and the GPU if there is one."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        info = ""
    fields = dict(re.findall(r"^(model name|flags|cpu family|model)\s*: (.*)$", info, re.M))
    flags = fields.get("flags", "").split()
    return {
        "cpu": fields.get("model name", platform.processor() or platform.machine()),
        "cpu_family_model": f"{fields.get('cpu family', '')}/{fields.get('model', '')}",
        "isa": {name: name in flags for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16")},
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "os": platform.platform(),
    }


def versions() -> dict[str, str | None]:
    def of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {
        "mmkernels": __version__,
        "torch": torch.__version__,
        "triton": of("triton"),
        "python": platform.python_version(),
    }


def git_state() -> dict[str, Any]:
    """The commit of the package that was measured, and whether files of it differ from the commit."""
    root = Path(mmkernels.__file__).parent.parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--", "mmkernels", "csrc", "benchmarks/*.py")
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": bool(changed)}
