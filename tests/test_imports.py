# SPDX-License-Identifier: Apache-2.0
"""The arrows: models, train, serve → nn, cache → ops → backends. Lower rooms never import higher ones."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "mmkernels"
ROOMS = {
    "hf": {"hf", "nn", "cache", "ops", "backends", "checks"},
    "ops": {"ops", "backends", "checks", "testing", "transforms"},
    "testing": {"testing", "backends"},
    "nn": {"nn", "ops", "backends", "checks"},
    "cache": {"cache", "ops"},
    "models": {"models", "nn", "cache", "ops", "backends", "checks"},
    "train": {"train", "models", "nn", "cache", "ops", "backends", "checks"},
    "serve": {"serve", "models", "cache", "ops"},
}


def imported(path: Path) -> set[str]:
    """Rooms of mmkernels a file imports, also inside functions."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module]
            if node.module == "mmkernels":
                names = [f"mmkernels.{alias.name}" for alias in node.names]
        rooms |= {n.split(".")[1] for n in names if n.startswith("mmkernels.")}
    return rooms


@pytest.mark.parametrize("room", [r for r in ROOMS if (ROOT / r).exists()])
def test_arrows(room: str) -> None:
    known = {p.stem for p in ROOT.iterdir()}
    for path in (ROOT / room).rglob("*.py"):
        higher = (imported(path) & known) - ROOMS[room]
        assert not higher, f"{path} imports {higher}"


def test_kernel_files_do_not_import_each_other() -> None:
    for path in (ROOT / "ops").rglob("triton.py"):
        others = {"api", "cases", "op"}
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert node.module.split(".")[-1] not in others, f"{path} imports {node.module}"


def test_no_pickles() -> None:
    for path in ROOT.rglob("*.py"):
        source = path.read_text()
        assert "torch.load(" not in source and "import pickle" not in source, path


def test_every_file_names_its_licence() -> None:
    root = ROOT.parent
    for folder, pattern in (
        ("mmkernels", "*.py"),
        ("csrc", "*.*"),
        ("tests", "*.py"),
        ("benchmarks", "*.py"),
    ):
        for path in (root / folder).rglob(pattern):
            if "__pycache__" not in path.parts and path.is_file():
                assert "SPDX-License-Identifier: Apache-2.0" in path.read_text()[:200], path
