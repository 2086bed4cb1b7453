# SPDX-License-Identifier: Apache-2.0
"""The torch-free headers through pybind11: what CPU and CUDA kernels share, without torch and without a GPU."""

import importlib.util
import itertools
import random
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pybind11 = pytest.importorskip("pybind11")
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    out = tmp_path_factory.mktemp("headers") / "mmkernels_headers.so"
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    flags = ["-O1", "-std=c++17", "-fPIC", "-shared", "-fsanitize=undefined", "-fno-sanitize=vptr",
             "-fno-sanitize-recover=all", "-static-libubsan", "-fvisibility=hidden"]  # fmt: skip
    source = ROOT / "csrc/testing/module.cpp"
    subprocess.run(["g++", *flags, *includes, str(source), "-o", str(out)], check=True)
    spec = importlib.util.spec_from_file_location("mmkernels_headers", out)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_16_bit_conversions_are_torchs(headers: Any) -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 20_000, dtype=np.uint64).astype(np.uint32)
    edges = [
        0.0,
        -0.0,
        1e-8,
        6e-8,
        5.96e-8,
        65504.0,
        65519.9,
        65520.0,
        1e9,
        np.inf,
        -np.inf,
        3.4e38,
    ]
    values = np.concatenate([bits.view(np.float32), np.array(edges, np.float32)])
    for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        expected = torch.from_numpy(values).to(dtype)
        got = np.array([getattr(headers, f"to_{name}")(float(v)) for v in values], np.uint16)
        nan = expected.isnan().numpy()
        assert np.array_equal(got[~nan], expected.view(torch.int16).numpy().view(np.uint16)[~nan])
        every = np.arange(2**16, dtype=np.uint16)
        back = np.array([getattr(headers, f"from_{name}")(int(b)) for b in every], np.float32)
        wide = torch.from_numpy(every.view(np.int16)).view(dtype).float().numpy()
        assert np.array_equal(back, wide, equal_nan=True)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_strips_cover_every_token_once(headers: Any, prefix: int) -> None:
    for B, grid_h, grid_w in itertools.product((1, 3), (0, 1, 4), (1, 5)):
        shape = headers.PatchShape(B, 3, grid_h * 2, grid_w * 3, 2, 3, prefix)
        tokens = []
        for strip in range(B * shape.strips()):
            count = prefix if shape.is_prefix(strip) else grid_w
            tokens += range(shape.first_token(strip), shape.first_token(strip) + count)
        assert tokens == list(range(B * (prefix + grid_h * grid_w)))
        assert shape.first_token(B * shape.strips()) == len(tokens)


def test_offsets_beyond_32_bits(headers: Any) -> None:
    shape = headers.PatchShape(70_000, 3, 448, 448, 14, 14, 1)
    assert shape.pixel_row(69_999, 2, 31, 13) == (69_999 * 3 + 2) * 448 * 448 + 447 * 448
    assert shape.first_token(69_999 * 33) == 69_999 * 1025


def test_the_cuda_row_body_moves_every_byte(headers: Any) -> None:
    rng = random.Random(0)
    for row_bytes, offset in itertools.product((2, 6, 16, 30, 32, 1000, 1024, 1026), (0, 2, 8, 16)):
        text = rng.randbytes(5 * row_bytes)
        features = [rng.randbytes(n * row_bytes) for n in (3, 0, 2)]
        rows = [text[r * row_bytes :][:row_bytes] for r in range(5)]
        flat = b"".join(features)
        source = [0, -1, 4, -3, -4, 2, -5, -2]
        expected = b"".join(
            rows[s] if s >= 0 else flat[(-1 - s) * row_bytes :][:row_bytes] for s in source
        )
        got = headers.merge_rows(text, [f for f in features], source, row_bytes, offset)
        assert got == expected, (row_bytes, offset)
