# SPDX-License-Identifier: Apache-2.0
"""docs/adding-an-op.md as data: files, lines, commands. ``python tests/guide.py FOLDER`` applies it to a copy.

A bold line names the file of the block under it; a table names a file, a line of it, and the line to add after it
(indented as that one); ``sh`` blocks are commands, by the number of their section.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "adding-an-op.md"
PARTS = ("mmkernels", "csrc", "tests", "benchmarks", "examples", "docs")
BUILT = ("_C.so", "_build_info.json", "__pycache__", "*.egg-info", "results")


def fences(page: Path) -> list[tuple[str, str]]:
    """Language ("" if none) and text of every block of a page."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S)


def prose(page: Path) -> str:
    """The page without its blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


def files() -> dict[str, str]:
    """What the page writes, by name."""
    blocks = re.findall(r"^\*\*`(\S+)`\*\*\n```\w+\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    assert len(dict(blocks)) == len(blocks), "a file twice"
    return dict(blocks)


def added_lines() -> list[tuple[str, str, str]]:
    """File, the line of it that is looked for, the line to add."""
    return re.findall(r"^\| `(\S+)` \| `(.+?)` \| `(.+?)` \|$", PAGE.read_text(), re.M)


def commands(section: int) -> list[str]:
    """The ``sh`` blocks of section 1, 2, …, each to be run as one script; 0 is what comes before."""
    parts = re.split(r"^## \d+\. ", PAGE.read_text(), flags=re.M)
    return re.findall(r"^```sh\n(.*?)^```$", parts[section], re.M | re.S)


def apply(folder: Path) -> None:
    """All of it, to a copy of the repository."""
    for name, text in files().items():
        path = folder / name
        assert not path.exists(), f"{name} is there already"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name, anchor, line in added_lines():
        _add(folder / name, anchor, line)


def _add(path: Path, anchor: str, line: str) -> None:
    lines = path.read_text().splitlines(keepends=True)
    at = next((i for i, found in enumerate(lines) if found.strip() == anchor), None)
    assert at is not None, f"{path.name} has no line {anchor}"
    indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
    lines.insert(at + 1, f"{indent}{line}\n")
    path.write_text("".join(lines))


def copy(folder: Path) -> None:
    """The repository's sources, without what was built."""
    for part in PARTS:
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns(*BUILT))
    for path in ROOT.glob("*"):
        if path.is_file():
            shutil.copy(path, folder)


def run(script: str, folder: Path, sources: Path | None = None) -> subprocess.CompletedProcess[str]:
    """As one shell script; this interpreter's tools are on the path, the package is that of ``sources``."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(sources or folder)},
    )  # fmt: skip


if __name__ == "__main__":
    apply(Path(sys.argv[1]))
