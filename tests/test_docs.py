# SPDX-License-Identifier: Apache-2.0
"""Pages: links lead somewhere, Python parses, commands of make exist, generated pages are up to date in their head."""

import ast
import re
from pathlib import Path

import guide
import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
pages = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", guide.prose(page)):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pages
def test_files_that_are_named_exist(page: Path) -> None:
    """In backticks, with a folder of ours before them."""
    named = re.findall(
        r"`((?:mmkernels|tests|benchmarks|csrc|examples|docs)/[\w./]+\.\w+)`", page.read_text()
    )
    for name in set(named) - guide.files().keys():
        assert (ROOT / name).exists(), f"{page.name}: {name}"


@pages
def test_python_parses(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        ast.parse(block)


@pages
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name in re.findall(r"(?:^|`)make ([a-z][\w-]*)", page.read_text(), re.MULTILINE):
        assert name in targets, f"{page.name}: make {name}"


def test_known_failures_are_listed_and_strict() -> None:
    """A mark that is no longer needed is red, and the page tells of every one."""
    page = (ROOT / "docs" / "reliability.md").read_text()
    told = page.partition("## Known failures")[2].partition("## ")[0]
    listed = [
        line.split(" | ")[0].strip("| ") for line in told.splitlines() if line.startswith("| ")
    ][2:]
    marks: list[str] = []
    for path in sorted([*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").glob("test_*.py")]):
        for mark in re.findall(r"mark\.xfail\((.*?)\n\)", path.read_text(), re.DOTALL):
            assert "strict=True" in mark, path
            marks += re.findall(r'reason="([^"]*)"', mark)
    for path in (ROOT / "tests" / "fuzz").glob("fuzz_*.py"):
        known = re.search(r"^KNOWN: .*?= \{(.*?)\}$", path.read_text(), re.DOTALL | re.MULTILINE)
        marks += re.findall(r'^    "([^"]+)":', known[1] if known else "", re.MULTILINE)
    assert sorted(marks) == sorted(listed)
