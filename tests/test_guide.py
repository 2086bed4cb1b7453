# SPDX-License-Identifier: Apache-2.0
"""docs/adding-an-op.md works: its op is put into a copy of the repository, and its commands run as they stand."""

import re
from pathlib import Path

import guide
import pytest


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with the page's op, not built."""
    folder = tmp_path_factory.mktemp("guide") / "clone"
    folder.mkdir()
    guide.copy(folder)
    guide.apply(folder)
    return folder


def passed(section: int, folder: Path) -> str:
    """What the section's scripts printed; each has to succeed."""
    said = ""
    for script in guide.commands(section):
        done = guide.run(script, folder)
        assert done.returncode == 0, f"{script}\n{done.stdout[-5000:]}\n{done.stderr[-3000:]}"
        said += done.stdout
    return said


def test_the_op_works_before_it_has_a_kernel(clone: Path) -> None:
    found = re.search(r"(\d+) passed", passed(2, clone))
    assert found and int(found[1]) > 50


def test_the_page_has_a_command_for_every_step() -> None:
    assert [len(guide.commands(i)) for i in range(8)] == [1, 0, 1, 1, 2, 1, 1, 1]
    assert len(guide.files()) == 9 and len(guide.added_lines()) == 11


@pytest.mark.full
@pytest.mark.timeout(2400)
def test_the_kernels(clone: Path) -> None:
    """Built, used, broken, mended, fuzzed, interpreted, examined."""
    said = passed(3, clone)
    assert re.search(r"pool_frames +cpu +forward: c\+\+; backward: c\+\+", said)
    broken, mended = guide.commands(4)
    red = guide.run(broken, clone)
    failed = re.findall(r"FAILED .*\[pool_frames-(\w+)-\w+\]", red.stdout)
    assert red.returncode == 0 and len(failed) == 12, red.stdout[-5000:] + red.stderr[-3000:]
    assert set(failed) == {"tail", "one_group", "wide"}
    done = guide.run(mended, clone)
    assert done.returncode == 0, done.stderr
    passed(3, clone)
    passed(5, clone)
    passed(6, clone)
    passed(7, clone)
