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
    flags = ["-O2", "-std=c++17", "-fPIC", "-shared", "-fsanitize=undefined", "-fno-sanitize=vptr",
             "-fno-sanitize-recover=all", "-static-libubsan", "-fvisibility=hidden"]  # fmt: skip
    sources = [str(ROOT / "csrc/testing/module.cpp"), str(ROOT / "csrc/common/gemm_cpu.cpp")]
    subprocess.run(["g++", *flags, *includes, *sources, "-o", str(out)], check=True)
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


@pytest.mark.parametrize("limit", [1, 7, 64, 10_000])
@pytest.mark.parametrize("merge", [1, 2, 3])
def test_units_and_panels_cover_every_patch_once(headers: Any, merge: int, limit: int) -> None:
    patch = headers.Patch(3, [1, 2, 3], [1, 2, 3], merge, 1, False)
    grids = [(1, 2, 4), (2, 3, 1), (1, 0, 5), (3, 1, 9)]
    grids = [(t, h * merge, w * merge) for t, h, w in grids]
    images = [headers.Image([t, 2 * h, 3 * w], [t, h, w], 0, 0, False) for t, h, w in grids]
    images.append(headers.Image([1, 1, 11], [1, 1, 11], 0, 0, True))
    units, panels = headers.patch_units(patch, images, limit)
    covered = [(i, j) for i, first, count in units for j in range(first, first + count)]
    lengths = [*(t * h * w for t, h, w in grids), 11]
    assert covered == [(i, j) for i, n in enumerate(lengths) for j in range(n)]
    assert all(count <= max(limit, merge * merge) + merge * merge for _, _, count in units)
    assert [b for b, _, _ in panels] == [0, *(e for _, e, _ in panels)][:-1]
    assert panels[-1][1] == len(units)
    assert [n for _, _, n in panels] == [sum(u[2] for u in units[b:e]) for b, e, _ in panels]


@pytest.mark.parametrize("merge", [1, 2, 3])
def test_places_are_those_of_the_reference(headers: Any, merge: int) -> None:
    from mmkernels.ops.patch_embed.reference import merge_order

    t, h, w = 2, 2 * merge, 3 * merge
    image = headers.Image([t, h, w], [t, h, w], 7, 0, False)
    places = torch.stack(torch.meshgrid(*map(torch.arange, (t, h, w)), indexing="ij"), -1)[None]
    expected = merge_order(places, merge)[0].tolist()
    assert [image.place(j, merge) for j in range(t * h * w)] == expected


def test_prefix_tokens_lie_before_or_after(headers: Any) -> None:
    image = headers.Image([1, 2, 3], [1, 2, 3], 10, 0, False)
    first, last = (headers.Patch(3, [1, 1, 1], [1, 1, 1], 1, 4, x) for x in (False, True))
    assert (image.prefix_from(first), image.patches_from(first)) == (10, 14)
    assert (image.patches_from(last), image.prefix_from(last)) == (10, 16)


def test_patch_counts_are_those_of_the_layout(headers: Any) -> None:
    from mmkernels.ops.patch_embed.layout import patch_count

    for size, patch, stride in itertools.product(range(12), range(1, 5), range(1, 6)):
        for i, edge in enumerate(("exact", "pad", "crop")):
            expected = patch_count(size, patch, stride, edge)
            assert headers.patch_count(size, patch, stride, i) == expected, (size, patch, stride)


def test_offsets_beyond_32_bits(headers: Any) -> None:
    patch = headers.Patch(3, [2, 14, 14], [2, 14, 14], 1, 1, False)
    image = headers.Image([4000, 44800, 44800], [2000, 3200, 3200], 2**33, 0, False)
    row = (2 * 4000 + 3999) * 44800 * 44800 + 44799 * 44800
    assert image.pixel_row(patch, 2, 1999, 1, 3199, 13) == row
    assert image.place(2000 * 3200 * 3200 - 1, 1) == [1999, 3199, 3199]
    assert image.prefix_from(patch) == 2**33


def test_taps_are_those_of_interpolate(headers: Any) -> None:
    from mmkernels.ops.patch_embed.layout import Layout
    from mmkernels.ops.patch_embed.reference import axis_matrix

    like = torch.zeros(1, dtype=torch.float64)
    kinds = [("nearest", False, False), ("bilinear", False, False), ("bilinear", True, False),
             ("bicubic", False, False), ("bicubic", True, False), ("bilinear", False, True),
             ("bicubic", False, True)]  # fmt: skip
    names = ["none", "fixed", "nearest", "bilinear", "bicubic", "factorised"]
    for n_out, n_in in itertools.product((1, 2, 3, 5, 7, 16, 27, 48), (1, 2, 3, 6, 16, 48)):
        for mode, corners, antialias in kinds:
            layout = Layout([], [], "exact", 1, False, mode, corners, antialias)
            expected = axis_matrix(n_out, like, n_in, layout)
            count, index, weight = headers.axis_taps(
                n_out, n_in, names.index(mode), corners, antialias
            )
            got = torch.zeros(n_out, n_in, dtype=torch.float64)
            rows = torch.arange(n_out).repeat_interleave(count)
            values = torch.tensor(weight, dtype=torch.float64)
            got.index_put_((rows, torch.tensor(index)), values, accumulate=True)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)


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


def test_what_caches_hold_is_torchs(headers: Any) -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 20_000, dtype=np.uint64).astype(np.uint32)
    halves = np.arange(-300, 300, dtype=np.float32) / 2
    small = (
        np.arange(-400, 400, dtype=np.float32) * 2.0**-11
    )  # beside and between float8's denormals
    edges = np.array([447.9, 448.0, 464.0, 1e9, np.inf, -np.inf, 0.0, -0.0, 1e-9], np.float32)
    values = np.concatenate([bits.view(np.float32), halves, small, edges])
    wide = torch.from_numpy(values)
    whole = wide.round().clamp(-127, 127).nan_to_num(0.0).to(torch.int8)
    assert [headers.rope_int8(float(v)) for v in values] == whole.tolist()
    eighth = wide.clamp(-448, 448).to(torch.float8_e4m3fn)
    got = torch.tensor([headers.rope_f8(float(v)) for v in values], dtype=torch.uint8)
    nan = wide.isnan()
    assert torch.equal(got[~nan], eighth.view(torch.uint8)[~nan])
    assert got[nan].view(torch.float8_e4m3fn).float().isnan().all()


def test_cos_and_sin_are_good_beyond_fp32(headers: Any) -> None:
    rng = np.random.default_rng(0)
    for reach in (1.0, 100.0, 1e4, 1e6, 3.9e8):
        for angle in rng.uniform(-reach, reach, 2000).astype(np.float32).astype(np.float64):
            cos, sin = headers.rope_cos_sin(angle)
            assert abs(cos - np.cos(angle)) <= 2.0**-33 * abs(np.cos(angle)) + 1e-15
            assert abs(sin - np.sin(angle)) <= 2.0**-33 * abs(np.sin(angle)) + 1e-15


@pytest.mark.parametrize("adjacent", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("d", "pairs"), [(128, 64), (96, 24), (32, 16), (16, 0)])
def test_the_cuda_body_of_a_head_is_the_reference(
    headers: Any, d: int, pairs: int, normed: bool, adjacent: bool
) -> None:
    from mmkernels.ops.mrope.reference import rotated
    from mmkernels.ops.rope_write_kv.reference import _normed, stored

    g = torch.Generator().manual_seed(d)
    angle = torch.rand(2 * pairs, generator=g) * 6
    order = (
        torch.arange(2 * pairs).view(-1, 2).T if adjacent else torch.arange(2 * pairs).view(2, -1)
    )
    tables = [t[side].tolist() for side in order for t in (angle.cos(), angle.sin())]
    kinds = {"f32_4": torch.float32, "f32_1": torch.float32, "bf16_8": torch.bfloat16, "bf16_1": torch.bfloat16,
             "f32_int8_4": torch.int8, "f32_f8_1": torch.float8_e4m3fn}  # fmt: skip
    none = np.zeros(0, np.float32)
    for kind, cache_dtype in kinds.items():
        dtype = torch.bfloat16 if "bf16" in kind else torch.float32
        x, weight = (torch.randn(d, generator=g).to(dtype) for _ in range(2))
        numbers = lambda t: t.view(torch.int16).numpy() if t.dtype == torch.bfloat16 else t.numpy()
        for is_value, lanes in itertools.product((False, True), (1, 2, 8, 32)):
            out, cache = (
                torch.empty(0 if is_value else d, dtype=dtype),
                torch.empty(d, dtype=cache_dtype),
            )
            held = cache.view(torch.uint8) if cache_dtype.itemsize == 1 else cache
            w = numbers(weight) if normed and not is_value else none
            getattr(headers, f"rope_head_{kind}")(
                numbers(x), numbers(out), numbers(held), w, tables, adjacent, 0.03, 1e-6, lanes
            )
            written = x.float()
            if not is_value:
                y = _normed(x, weight, 1e-6, torch.float32) if normed else x.float()
                pairing = "adjacent" if adjacent else "half"
                y = rotated(y[None], angle.cos(), angle.sin(), pairing)[0]
                unit = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
                assert (out.float() - y).abs().max() <= unit * y.abs().max(), kind
                written = out.float()
            scale = torch.tensor([0.03]) if cache_dtype.itemsize == 1 else None
            expected = stored(written[None, None], cache_dtype, scale)[0, 0]
            assert torch.equal(cache.view(torch.uint8), expected.view(torch.uint8)), (kind, lanes)


def test_slots_beyond_32_bits(headers: Any) -> None:
    assert (
        headers.rope_slot(16, [2**33, 2**20, 128], 16 * 5 + 3, 7) == 5 * 2**33 + 3 * 2**20 + 7 * 128
    )
    assert headers.rope_slot(1, [8, 0, 1], 2**40, 0) == 2**43
