# SPDX-License-Identifier: Apache-2.0
"""What the pages tell users to type: their Python runs here, their commands run here or where ``COMMANDS`` says."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import guide
import pytest
import torch
from test_docs import PAGES, ROOT
from tiny_models import tiny_config
from torch import nn

import mmkernels
from mmkernels.models import MMLLM

Names = dict[str, Any]
WORDS = "make|python|pytest|mmkernels|pip|pre-commit"

# Where a command runs: HERE, as it stands; a file that runs it (or it in small) and the words there; or why not.
HERE, LONG = "here", "measures for long; only its --help is run, here"
COMMANDS: dict[str, str | tuple[str, str]] = {
    "make install": ("tests/newcomer.sh", "make install"),
    "make demo": ("tests/newcomer.sh", "make demo"),
    "make demo-full": ("tests/test_cli.py", "def test_demo_full_in_miniature"),
    "make test": (".ci/run", "make test"),
    "make lint": (".ci/run", "make lint"),
    "make compile-triton": (".ci/run", "make compile-triton"),
    "make compile-cuda": (".ci/run", "make compile-cuda"),
    "make check-transformers": ("Makefile", "full: .*check-transformers"),
    ".ci/run": "it is what CI runs",
    "make full": "it is the suite and all that takes long",
    "make newcomer": "it is a user's first hour, and runs what is named here",
    "make fuzz": ("Makefile", "full: .*fuzz"),
    "make sanitize": ("Makefile", "full: .*sanitize"),
    "make fuzz sanitize": ("Makefile", "full: .*fuzz sanitize"),
    "make check-torch": "5 GB of another torch; by hand before a release",
    "python -m build --no-isolation": "by hand before a release; tests/test_backends.py makes both distributions",
    'pip install "setuptools>=77" "cmake>=3.25" ninja': ("pyproject.toml", '"setuptools>=77", "cmake>=3.25", "ninja"'),
    "python -m benchmarks.compare": ("tests/test_pages.py", "benchmarks.compare A.json B.json"),
    "make gpu-check": "needs a GPU",
    "mmkernels info": HERE,
    "mmkernels doctor": HERE,
    "mmkernels bench": ("tests/test_cli.py", "def test_bench"),
    "make mutants": ("Makefile", "full: .*mutants"),
    "python -m benchmarks.report": ("tests/test_report.py", "report"),
    "mmkernels generate": ("tests/test_cli.py", "def test_generate_takes_any_png"),
    "mmkernels generate --image FILE --prompt TEXT": ("tests/test_cli.py", "def test_generate_takes_any_png"),
    "mmkernels generate --requests FILE.jsonl": ("tests/test_serve.py", "def test_a_file_of_requests_answers_line_"),
    "python -m benchmarks.compare A.json B.json": HERE,
    "python -m benchmarks.run": ("Makefile", "demo: .*\n.*\n.*benchmarks.run --quick"),
    "python -m benchmarks.run --op merge_embeddings --json benchmarks/results/DEVICE/merge_embeddings.json": (
        "benchmarks/test_harness.py", 'Job."merge_embeddings"'),
    "python -m benchmarks.queries OUT.json": LONG,
    "python -m benchmarks.models OUT.json": LONG,
    "python -m benchmarks.resampler OUT.json": LONG,
    "python -m benchmarks.end_to_end OUT.json": LONG,
    "python -m mmkernels.models.presets": ("tests/test_presets.py", "def test_the_table_in_the_docs_is_this_one"),
    "python tests/support_table.py": "minutes, and it writes a page; tests/test_patch_classes.py patches them all",
    "pytest benchmarks": ("Makefile", "full: (.*\n\t)*.*pytest -q benchmarks"),
    "MMKERNELS_ISA=avx2 python ...": ("tests/sanitize.sh", "MMKERNELS_ISA="),
    "python tests/peers/transformers_models.py CHECKOUT": "needs transformers' own tests, which no package holds",
    "pip install --no-build-isolation .": ("Makefile", "pip install --quiet --no-build-isolation -e"),
    "pre-commit install": "fetches its hooks from the network; `make lint` runs ruff and mypy",
    "source .venv/bin/activate": "tests/guide.py puts the interpreter's folder on the path",
}  # fmt: skip


def typed(page: Path) -> set[str]:
    """Commands of a page: lines of ``sh`` blocks (those of the guide run in test_guide.py), and in backticks."""
    lines = [
        line for kind, text in guide.fences(page) if kind == "sh" for line in text.splitlines()
    ]
    found = [line.partition(" #")[0].strip() for line in lines]
    if page == guide.PAGE:
        found = found[:1]
    found += re.findall(rf"`((?:{WORDS}) [^`\n]+|\.ci/run)`", guide.prose(page))
    return set(filter(None, found))


def test_every_command_is_known_and_no_other() -> None:
    said = {command: page.name for page in PAGES for command in typed(page)}
    assert not {c: p for c, p in said.items() if c not in COMMANDS}
    assert not sorted(COMMANDS.keys() - said.keys())


def test_commands_run_where_the_table_says() -> None:
    for command, where in COMMANDS.items():
        if isinstance(where, tuple):
            assert re.search(where[1], (ROOT / where[0]).read_text()), command


def test_commands_of_here_run(tmp_path: Path) -> None:
    results = ROOT / "benchmarks" / "results" / "cpu-intel-xeon-amx" / "patch_merge.json"
    for name in ("A.json", "B.json"):
        shutil.copy(results, tmp_path / name)
    for command in [c for c, where in COMMANDS.items() if where == HERE]:
        done = guide.run(command, tmp_path, ROOT)
        assert done.returncode == 0 and done.stdout, f"{command}: {done.stderr[-2000:]}"


@pytest.mark.parametrize("command", [c for c, where in COMMANDS.items() if where == LONG])
def test_what_measures_for_long_starts(command: str) -> None:
    done = guide.run(command.replace("OUT.json", "--help"), ROOT, ROOT)
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr[-2000:]


def blocks(page: str) -> list[str]:
    return [text for kind, text in guide.fences(ROOT / page) if kind == "python"]


def _llava() -> Any:
    import finetune_llava

    return finetune_llava.tiny()


def patching(folder: Path) -> Names:
    return {"mmkernels": mmkernels, "model": _llava()}


def module(folder: Path) -> Names:
    return {"embeddings": SimpleNamespace(patch_embedding=nn.Conv2d(3, 8, 4, 4))}


def ops(folder: Path) -> Names:
    """A picture of 4×6 patches, widths of 24."""
    B, H, W, D, A = 2, 4, 6, 24, 12
    linear = lambda: nn.Linear(D, 2 * A)
    key, value = linear(), linear()
    ids = torch.cat([torch.full((B, 6), 99), torch.randint(90, (B, 3))], 1)
    return {
        "B": B, "H": H, "W": W, "mean": [0.5] * 3, "std": [0.2] * 3, "image_token_id": 99,
        "pixels_uint8": torch.randint(256, (B, 3, 4 * H, 4 * W), dtype=torch.uint8),
        "conv": nn.Conv2d(3, D, 4, 4), "cls_token": torch.randn(1, D), "position_embedding": nn.Embedding(1 + H * W, D),
        "image_a": torch.randint(256, (3, 32, 64), dtype=torch.uint8),
        "image_b": torch.randint(256, (3, 96, 32), dtype=torch.uint8),
        "conv3d": nn.Conv3d(3, D, (2, 16, 16), (2, 16, 16)), "pos_embed": nn.Embedding(48 * 48, D),
        "query": torch.randn(5, 2 * A), "w_k": key.weight, "w_v": value.weight, "b_k": key.bias, "b_v": value.bias,
        "ln": nn.LayerNorm(4 * D), "input_ids": ids, "embed_tokens": nn.Embedding(100, D),
        "image_features": torch.randn(B * 6, D), "images_per_sample_tokens": [6] * B,
    }  # fmt: skip


def checkpoint(folder: Path) -> Names:
    _llava().save_pretrained(folder)
    return {"folder": folder}


def serving(folder: Path) -> Names:
    model = MMLLM(tiny_config(32, queries=3, qformer_layers=1, decoder_layers=1))
    return {"model": model, "pixels_uint8": torch.randint(256, (3, 112, 112), dtype=torch.uint8)}


def of_patching(names: Names, said: str) -> None:
    assert "merge_embeddings" in said and "patch_embed" in said


def of_module(names: Names, said: str) -> None:
    assert isinstance(names["embeddings"].patch_embedding, mmkernels.nn.PatchEmbed)


def of_ops(names: Names, said: str) -> None:
    shapes = {n: list(names[n].shape) for n in ("tokens", "features", "merged", "inputs_embeds")}
    assert shapes == {
        "tokens": [2, 25, 24], "features": [2, 5, 24], "merged": [2, 6, 96], "inputs_embeds": [2, 9, 24],
    }  # fmt: skip
    assert names["packed"].cu_seqlens.tolist() == [0, 8, 20]


def of_checkpoint(names: Names, said: str) -> None:
    """The report is the one of the page."""
    (shown,) = [text for kind, text in guide.fences(ROOT / "docs/finetuner.md") if not kind]
    words = [" ".join(line.split()) for line in said.splitlines()]
    assert all(" ".join(line.split()) in words for line in shown.splitlines()), said


def of_packing(names: Names, said: str) -> None:
    rows = [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}]
    batch = names["collate"](rows)
    assert names["model"](**batch).loss.isfinite() and batch["input_ids"].shape == (1, 5)


def of_serving(names: Names, said: str) -> None:
    assert names["request"].error is None and names["engine"].counters.new_tokens > 0


PYTHON: dict[tuple[str, int], tuple[Callable[[Path], Names], Callable[[Names, str], None]]] = {
    ("README.md", 0): (patching, of_patching),
    ("README.md", 1): (module, of_module),
    ("README.md", 2): (ops, of_ops),
    ("docs/finetuner.md", 0): (checkpoint, of_checkpoint),
    ("docs/finetuner.md", 1): (patching, of_packing),
    ("docs/serving.md", 0): (serving, of_serving),
}


def test_every_block_of_python_runs_somewhere() -> None:
    pages = [str(p.relative_to(ROOT)) for p in PAGES if p != guide.PAGE]
    assert {(page, i) for page in pages for i in range(len(blocks(page)))} == PYTHON.keys()


@pytest.mark.parametrize("place", PYTHON, ids=lambda p: f"{p[0]}-{p[1]}")
def test_python_of_the_pages(
    place: tuple[str, int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With what a reader has (a model, pixels, layers) under the names of the page."""
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(ROOT / "examples")
    torch.manual_seed(0)
    given, check = PYTHON[place]
    names = given(tmp_path)
    exec(blocks(place[0])[place[1]], names)
    check(names, capsys.readouterr().out)
