# SPDX-License-Identifier: Apache-2.0
"""Everything about a GPU in one command: ``python -m benchmarks.gpu_check`` (``make gpu-check``).

The most important facts come first: the build, every op against the reference, streams and graphs, the table, the
sanitizer. A part that fails does not stop the others. Each leaves its text in ``benchmarks/results/<gpu>/``; a part
done at this commit, without changes to it, is not done again, so a run that was cut short goes on.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.record import git_state

RESULTS = Path(__file__).parent / "results"
PYTEST = (sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider")


@dataclass(frozen=True)
class Part:
    """A command, its time limit in seconds, and what it needs to be there."""

    name: str
    command: tuple[str, ...]
    limit_s: int
    needs: str = ""


def parts(folder: Path) -> list[Part]:
    """In the order in which they matter."""
    sanitizer = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9")
    table = (
        sys.executable,
        "-m",
        "benchmarks.run",
        "--device",
        "cuda",
        "--json",
        str(folder / "results.json"),
    )
    return [
        Part("doctor", (sys.executable, "-m", "mmkernels", "doctor"), 60),
        Part("streams-graphs", (*PYTEST, "tests/test_gpu.py", "-k", "stream or graph"), 90),
        Part("bound", (*PYTEST, "tests/test_gpu.py", "-k", "bound"), 150),
        Part("table", (*table, "--no-compile"), 180),
        Part("gpu-tests", (*PYTEST, "tests", "--ignore", "tests/test_gpu.py"), 60),
        Part("sanitizer", (*sanitizer, *PYTEST, "tests/test_gpu.py", "-k", "merge_embeddings and bound"), 60,
             needs="compute-sanitizer"),
    ]  # fmt: skip


def build() -> int:
    """The extension for this GPU, with CUDA."""
    major, minor = torch.cuda.get_device_capability()
    archs = {90: "90a"}.get(10 * major + minor, str(10 * major + minor))
    env = {
        **os.environ,
        "MMKERNELS_BUILD": "cuda",
        "MMKERNELS_CUDA_ARCHS": archs,
        "MAX_JOBS": str(os.cpu_count()),
    }
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-build-isolation",
        "--no-deps",
        "-e",
        ".",
    ]
    return subprocess.run(pip, env=env, check=False).returncode


def run(part: Part, folder: Path) -> str:
    """How it ended; its output goes to a file."""
    if part.needs and shutil.which(part.needs) is None:
        return f"not run: no {part.needs} here"
    began = time.perf_counter()
    try:
        done = subprocess.run(
            part.command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=part.limit_s,
            check=False,
        )
        text, ended = (
            done.stdout,
            "passed" if done.returncode == 0 else f"FAILED (exit code {done.returncode})",
        )
    except subprocess.TimeoutExpired as error:
        text = (
            (error.stdout or b"").decode()
            if isinstance(error.stdout, bytes)
            else error.stdout or ""
        )
        ended = f"cut after {part.limit_s} s"
    (folder / f"{part.name}.txt").write_text(text)
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    return f"{ended} in {time.perf_counter() - began:.0f} s: {last[:160]}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--no-build", action="store_true", help="the extension is there")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu-check: no GPU here", file=sys.stderr)
        return 2
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    folder, commit = RESULTS / name, git_state()["commit"]
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / "gpu-check.json"
    before = json.loads(state.read_text()) if state.exists() else {}
    same = before.get("commit") == commit and not git_state()["dirty"]
    ended: dict[str, str] = before.get("parts", {}) if same else {}
    if not args.no_build and ended.get("build") != "passed":
        ended["build"] = "passed" if build() == 0 else "FAILED"
    for part in parts(folder):
        if not ended.get(part.name, "").startswith("passed"):
            ended[part.name] = run(part, folder)
        print(f"{part.name}: {ended[part.name]}", flush=True)
        state.write_text(
            json.dumps({"commit": commit, "torch": torch.__version__, "parts": ended}, indent=1)
            + "\n"
        )
    lines = [f"| {n} | {how} |" for n, how in ended.items()]
    head = f"# {torch.cuda.get_device_name()}, commit {commit}, torch {torch.__version__}\n\n| part | |\n|---|---|\n"
    (folder / "summary.md").write_text(head + "\n".join(lines) + "\n")
    return int(any("FAILED" in how for how in ended.values()))


if __name__ == "__main__":
    sys.exit(main())
