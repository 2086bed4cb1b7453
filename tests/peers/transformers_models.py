# SPDX-License-Identifier: Apache-2.0
"""transformers' own model tests, with ``patch(model, cache=True)`` on every model that they build.

    python tests/peers/transformers_models.py CHECKOUT [model ...] [--report FILE]

CHECKOUT is a checkout of transformers: its ``src`` is imported and its ``tests/models/<model>`` are run.
Tests that fail patched run again unpatched. The report names those that fail only patched.
Needs what transformers' tests need: pytest, pytest-xdist, parameterized, datasets. Nothing is downloaded.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MODELS = ("qwen2_vl", "qwen3_vl", "llava", "blip_2", "kosmos2", "mllama", "idefics2")
HERE = Path(__file__).parent
PLUGIN = "patch_every_model"
SECONDS = 3600  # for one model's tests
NAMED = "rows of features"  # in the error that docs/finetuner.md names as a limit: more features than placeholders

Outcomes = dict[str, dict[str, str]]  # by test: outcome and the last line of its error


def run(checkout: Path, tests: Sequence[str], patched: bool) -> Outcomes:
    """Runs pytest in a process of its own and reads what the plugin wrote."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "outcomes.jsonl"
        paths = [str(checkout / "src"), str(HERE), str(HERE.parents[1])]
        environment = {
            **os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1",
            "MMKERNELS_PEER_OUT": str(out), "MMKERNELS_PEER_PATCH": str(int(patched)),
        }  # fmt: skip
        command = [sys.executable, "-m", "pytest", "-q", "-p", PLUGIN, "-p", "no:cacheprovider"]
        log = subprocess.run(
            [*command, *tests], cwd=checkout, env=environment, timeout=SECONDS, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if not out.exists():
            raise RuntimeError(f"pytest ran no test:\n{log.stdout[-3000:]}")
        lines = [json.loads(line) for line in out.read_text().splitlines()]
    return {line.pop("test"): line for line in lines}


def compare(checkout: Path, model: str) -> tuple[Outcomes, Outcomes]:
    """Outcomes of all tests patched, and of those that failed, unpatched."""
    patched = run(checkout, [f"tests/models/{model}/test_modeling_{model}.py"], True)
    failed = [test for test, found in patched.items() if found["outcome"] == "failed"]
    return patched, run(checkout, failed, False) if failed else {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--report", type=Path)
    given = parser.parse_args()
    checkout = given.checkout.resolve()
    beyond, tests, lines = 0, 0, header(checkout)
    for model in given.models:
        started = time.perf_counter()
        patched, plain = compare(checkout, model)
        ran = sum(found["outcome"] != "skipped" for found in patched.values())
        ours = [test for test, found in plain.items() if found["outcome"] == "passed"]
        named = sum(NAMED in patched[test]["why"] for test in ours)
        both = len(plain) - len(ours)
        took = time.perf_counter() - started
        lines.append(
            f"{model}: {ran} ran, {len(ours)} fail only patched, {named} of them by a limit that "
            f"docs/finetuner.md names, {both} fail either way, {took:.0f} s"
        )
        lines += [f"  {test.split('::')[-1]}: {patched[test]['why']}" for test in ours]
        print("\n".join(lines[-1 - len(ours) :]), flush=True)
        beyond, tests = beyond + len(ours) - named, tests + ran
    lines.append(f"all: {tests} ran, {beyond} fail only patched beyond the limits")
    print(lines[-1])
    if given.report:
        given.report.write_text("\n".join(lines) + "\n")
    return int(beyond > 0)


def header(checkout: Path) -> list[str]:
    """What was run, and with which versions."""
    import torch

    source = (checkout / "src/transformers/__init__.py").read_text()
    version = next(v for v in source.splitlines() if v.startswith("__version__"))
    commit = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=HERE, capture_output=True, text=True
    ).stdout.strip()
    return [
        "# transformers' own model tests, with patch(model, cache=True) on every model they build",
        f"# mmkernels {commit}, transformers {version.split(chr(34))[1]}, torch {torch.__version__}",
        "# python tests/peers/transformers_models.py CHECKOUT --report FILE",
    ]


def last_line(report: Any) -> str:
    """The error itself, of pytest's long text."""
    text = [line[2:] for line in str(report.longrepr).splitlines() if line.startswith("E ")]
    return (text or [str(report.longrepr).splitlines()[-1]])[0].strip()[:200]


if __name__ == "__main__":
    sys.exit(main())
