# SPDX-License-Identifier: Apache-2.0
"""Patch embedding in Triton, kind by kind: batches, clips, lists, flat buffers and rows; all positions.

Calls are made here, not taken from ``cases.py``: what a kernel treats apart is named apart.
"""

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from test_cases import assert_within_bound

import mmkernels
from mmkernels import backends
from mmkernels.ops.patch_embed import reference
from mmkernels.ops.patch_embed.layout import Layout
from mmkernels.testing import gradients
from mmkernels.testing.case import Inputs

launchers = importlib.import_module("mmkernels.ops.patch_embed.triton")
D = 9
NORM = {
    "rescale_factor": 1 / 255,
    "image_mean": [0.48, 0.46, 0.41],
    "image_std": [0.27, 0.26, 0.28],
}
SAME = {"rescale_factor": 1 / 255, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
CUBIC = {"position_mode": "bicubic"}
FACTORISED = {"position_mode": "factorised"}


class Make:
    """Tensors by kind, of one generator and dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(3)

    def u8(self, *shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, generator=self.generator, dtype=torch.uint8)

    def f(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def weights(self, *patch: int, bias: bool = True, width: int = D) -> Inputs:
        scale = torch.tensor(patch).prod().item() ** -0.5
        found: Inputs = {"weight": (self.f(width, *patch) * scale).to(self.dtype)}
        return {**found, "bias": self.f(width)} if bias else found


def embed(inputs: Inputs) -> torch.Tensor:
    inputs = dict(inputs)
    if "pixel_values" in inputs:
        return mmkernels.patch_embed(**inputs)
    return mmkernels.patch_embed_packed(**inputs).tokens


class Cases:
    """What the yardstick asks of ``cases.py``, for any call."""

    run = staticmethod(embed)

    @staticmethod
    def plain(inputs: Inputs) -> torch.Tensor:
        inputs = dict(inputs)
        power = inputs.pop("_power", None)
        weights = {} if power is None else {"axis_matrix": absolute(reference.axis_matrix, power)}
        with mock.patch.multiple(reference, **weights) if weights else nullcontext():
            with backends.backend("reference"):
                return embed(inputs)

    @staticmethod
    def magnitudes(wide: Inputs, power: int) -> Inputs:
        """|normalised pixel|^p and |weight|^p …; the scale of the pixels moves into image_std."""
        found = {k: raised(v, power) for k, v in wide.items()} | {"_power": power}
        name = "pixel_values" if "pixel_values" in wide else "images"
        rescale = wide.get("rescale_factor", 1.0)
        std = wide.get("image_std", [1.0])
        mean = wide.get("image_mean", [0.0] * len(std))
        scale = torch.tensor([rescale / s for s in std], dtype=torch.float64)
        shift = torch.tensor([m / s for m, s in zip(mean, std, strict=True)], dtype=torch.float64)

        def normalised(x: torch.Tensor) -> torch.Tensor:
            x, a, b = x.double(), scale, shift
            if len(std) > 1 and x.dim() == 1:  # flat: of the same affine in all channels
                a, b = a[:1], b[:1]
            elif x.dim() == 2:  # rows
                order = wide.get("patch_order", "cpp")
                runs = x.shape[-1] // len(std)
                a, b = (
                    v.repeat_interleave(runs) if order == "cpp" else v.repeat(runs) for v in (a, b)
                )
            elif len(std) > 1:
                channel = 1 if name == "pixel_values" else 0
                view = [-1 if d == channel else 1 for d in range(x.dim())]
                a, b = a.view(view), b.view(view)
            return ((x * a - b) / a).abs() ** power

        pixels = wide[name]
        found[name] = (
            [normalised(x) for x in pixels] if isinstance(pixels, list) else normalised(pixels)
        )
        if "rescale_factor" in wide or "image_std" in wide:
            found["rescale_factor"] = 1.0
            found["image_mean"] = [0.0] * len(std)
            found["image_std"] = [1 / abs(s) ** power for s in scale.tolist()]
        return found

    @staticmethod
    def rounded_before(wide: Inputs) -> None:
        """Nothing: the kernel adds the position before it rounds."""


def raised(value: Any, power: int) -> Any:
    if isinstance(value, list):
        return [raised(v, power) for v in value]
    floats = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.abs() ** power if floats else value


def absolute(axis_matrix: Callable[..., torch.Tensor], power: int) -> Callable[..., torch.Tensor]:
    def made(*args: Any) -> torch.Tensor:
        matrix = axis_matrix(*args)
        return torch.where(matrix == 0, 0.0, matrix.abs() ** power)

    return made


def dense(make: Make) -> dict[str, Inputs]:
    return {
        "clips_last": {
            "pixel_values": make.u8(2, 4, 3, 8, 12).transpose(1, 2), **make.weights(3, 2, 4, 4), **NORM,
            "prefix_tokens": make.f(2, D), "prefix": "last", "position_embed": make.f(13, D),
        },
        "clips_padded_merged": {
            "pixel_values": make.f(2, 3, 3, 7, 13), **make.weights(3, 2, 2, 4), "pad": True,
            "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "merge_size": 2,
            "position_embed": make.f(32, D),
        },
        "audio": {
            "pixel_values": make.f(2, 1, 9, 14), **make.weights(1, 5, 4), "stride": (2, 3), "crop": True,
            "prefix_tokens": make.f(2, D), "position_embed": make.f(13, D),
        },
        "overlapping_clips_padded": {
            "pixel_values": make.f(1, 2, 6, 7, 6), **make.weights(2, 3, 3, 2), "stride": (2, 2, 1),
            "pad": True, "image_mean": [0.1, 0.2], "image_std": [0.5, 0.6],
        },
        "gaps": {"pixel_values": make.f(2, 1, 9, 8), **make.weights(1, 2, 2), "stride": 3, "crop": True},
        "many_channels": {
            "pixel_values": make.u8(1, 6, 4, 4), **make.weights(6, 2, 2), "rescale_factor": 0.1,
            "image_mean": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], "image_std": [1.0, 0.9, 0.8, 0.7, 0.6, 0.5],
        },
        "linear_ppc": {
            "pixel_values": make.u8(2, 3, 4, 6), **make.weights(12), "patch_order": "ppc", **NORM
        },
        "long_prefix": {
            "pixel_values": make.f(2, 1, 4, 4), **make.weights(1, 2, 2), "prefix_tokens": make.f(70, D)
        },
    }  # fmt: skip


def rows(make: Make) -> dict[str, Inputs]:
    grids = torch.tensor([[1, 2, 4], [3, 2, 2], [1, 4, 2]])
    given = {"images": make.f(28, 12), "grid_thw": grids, **make.weights(12)}
    merged = {**given, "merge_size": 2}
    prefixed = {**merged, "prefix_tokens": make.f(2, D)}
    table = make.f(3, 5, D)
    near = {"images": torch.full((28, 12), 123, dtype=torch.uint8), "grid_thw": grids}
    return {
        "next_to_the_means": {**near, **make.weights(12), **NORM},
        "next_to_the_mean": {**near, **make.weights(12), **SAME, "image_mean": [0.4824] * 3},
        "a_batch": {
            "pixel_values": make.u8(2, 6, 12)[:, ::2], **make.weights(12), "rescale_factor": 0.01,
            "prefix_tokens": make.f(2, D), "prefix": "last", "position_embed": make.f(4, D),
        },
        "plain": {**merged, "image_mean": [0.2] * 3, "image_std": [0.5] * 3},
        "prefixed": {**prefixed, "image_mean": [0.2, 0.3, 0.1], "image_std": [0.5, 0.6, 0.7]},
        "ppc": {
            **given, "patch_order": "ppc", "image_mean": [0.2, 0.3, 0.1], "image_std": [0.5, 0.6, 0.7],
        },
        "int32_grid": {**given, "grid_thw": grids.int(), "position_table": make.f(2, 2, D)},
        "fixed": {
            **prefixed, "images": make.f(24, 12), "grid_thw": torch.tensor([[2, 2, 2], [1, 4, 2], [1, 2, 4]]),
            "position_table": make.f(9, D), "position_mode": "fixed",
        },
        "nearest": {**prefixed, "position_table": table, "position_mode": "nearest"},
        "bilinear_last": {**prefixed, "prefix": "last", "position_table": table},
        "cubic_antialiased": {**given, "position_table": table, **CUBIC, "antialias": True},
        "factorised": {**merged, "position_table": [make.f(5, D), make.f(4, D)], **FACTORISED},
    }  # fmt: skip


def packed(make: Make) -> dict[str, Inputs]:
    near = [torch.full((3, 4, 4), 123, dtype=torch.uint8)]
    stills = [make.u8(3, 8, 16), make.u8(12, 8, 3).permute(2, 0, 1), make.u8(3, 20, 40)[..., ::2]]
    given = {"images": stills, **make.weights(3, 4, 4), **NORM}
    table, small = make.f(3, 4, D), make.f(2, 2, D)
    floats = [make.f(3, 9, 10), make.f(3, 13, 7)]
    resampled = {
        f"{mode}{'_corners' * corners}{'_antialiased' * antialias}": {
            **given, "position_table": table, "position_mode": mode, "align_corners": corners,
            "antialias": antialias,
        }
        for mode in ("bilinear", "bicubic")
        for corners, antialias in ((False, False), (True, False), (False, True))
    }  # fmt: skip
    return {
        **resampled,
        "next_to_the_mean": {"images": near, **make.weights(3, 4, 4), **NORM},
        "nearest": {**given, "position_table": table, "position_mode": "nearest"},
        "factorised_prefixed": {
            **given, "position_table": [make.f(6, D), make.f(5, D)], **FACTORISED,
            "prefix_tokens": make.f(2, D),
        },
        "merged_last": {
            "images": [make.f(3, 8, 16), make.f(3, 24, 16)], **make.weights(3, 4, 4), **NORM,
            "merge_size": 2, "prefix": "last", "prefix_tokens": make.f(3, D), "position_table": table,
        },
        "fixed": {
            "images": [make.f(3, 8, 16), make.f(3, 16, 8)], **make.weights(3, 4, 4), "merge_size": 2,
            "prefix_tokens": make.f(2, D), "position_table": make.f(9, D), "position_mode": "fixed",
        },
        "fixed_last": {
            "images": [make.f(3, 8, 16), make.f(3, 16, 8)], **make.weights(3, 4, 4), "merge_size": 2,
            "prefix_tokens": make.f(2, D), "position_table": make.f(9, D), "position_mode": "fixed",
            "prefix": "last",
        },
        "stills_and_clips": {
            "images": [make.f(3, 8, 16), make.f(3, 3, 8, 8), make.f(3, 4, 4, 12)], "pad": True,
            **make.weights(3, 2, 4, 4), **NORM, "position_table": small,
        },
        "folded_stills": {
            "images": [make.f(3, 8, 16), make.f(3, 4, 8)], **make.weights(3, 2, 4, 4), **NORM
        },
        "padded": {
            "images": floats, **make.weights(3, 4, 4), **NORM, "pad": True, "position_table": small
        },
        "cropped": {
            "images": floats, **make.weights(3, 4, 4), "crop": True, "position_table": small
        },
        "overlapping": {
            "images": floats, **make.weights(3, 4, 4), **NORM, "stride": 3, "crop": True,
            "position_table": small,
        },
        "flat": {
            "images": make.f(3 * 8 * 16 + 3 * 4 * 8), "image_sizes": [[8, 16], [4, 8]],
            **make.weights(3, 4, 4), "image_mean": [0.5] * 3, "image_std": [0.25] * 3,
            "position_table": small,
        },
        "flat_clips": {
            "images": make.u8(3 * 2 * 8 * 4 + 3 * 4 * 4 * 4), "image_sizes": [[2, 8, 4], [4, 4, 4]],
            **make.weights(3, 2, 4, 4, bias=False), **SAME,
        },
    }  # fmt: skip


def tiles(make: Make) -> dict[str, Inputs]:
    """More than one tile of tokens an image and of D, and images whose tile ends early."""
    several = [make.f(1, 18, 18), make.f(1, 2, 4), make.f(1, 24, 12)]
    return {
        "packed_tiles": {
            "images": several, **make.weights(1, 2, 2, width=70), "prefix_tokens": make.f(1, 70),
            "position_table": make.f(2, 3, 70),
        },
        "row_tiles": {
            "images": make.f(154, 3), "grid_thw": torch.tensor([[1, 9, 9], [1, 1, 1], [2, 6, 6]]),
            **make.weights(3, width=70), "prefix_tokens": make.f(1, 70),
            "position_table": make.f(2, 3, 70),
        },
        "audio_tiles": {"pixel_values": make.f(1, 1, 11, 35), **make.weights(1, 3, 3), "stride": 2},
    }  # fmt: skip


KINDS = {"dense": dense, "rows": rows, "packed": packed, "tiles": tiles}
CALLS = [(kind, name) for kind, made in KINDS.items() for name in made(Make(torch.float32))]
DTYPES = (torch.float32, torch.bfloat16)
each_call = pytest.mark.parametrize(("kind", "name"), CALLS, ids=["-".join(c) for c in CALLS])


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@each_call
def test_values_and_gradients_hold_the_bound(kind: str, name: str, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and "_corners" in name:
        return  # positions are summed in fp32 whatever the dtype
    assert_within_bound(Cases, KINDS[kind](Make(dtype))[name])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["fixed", "padded", "bilinear", "overlapping"])
def test_two_runs_give_the_same_bits(name: str) -> None:
    inputs = packed(Make(torch.float32))[name]
    first, second = gradients(embed, inputs), gradients(embed, inputs)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.parametrize(("corners", "antialias"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_positions_are_those_of_interpolate(mode: str, corners: bool, antialias: bool) -> None:
    grids = [(1, 1), (2, 9), (7, 3), (5, 6)]
    table = torch.randn(5, 6, D)
    images = [torch.zeros(1, h, w) for h, w in grids]
    found = mmkernels.patch_embed_packed(
        images, torch.zeros(D, 1, 1, 1), position_table=table, position_mode=mode,
        align_corners=corners, antialias=antialias,
    )  # fmt: skip
    for (h, w), tokens in zip(grids, found.tokens.split([h * w for h, w in grids]), strict=True):
        expected = F.interpolate(
            table.double().permute(2, 0, 1)[None], (h, w), mode=mode, align_corners=corners,
            antialias=antialias,
        )  # fmt: skip
        expected = expected[0].permute(1, 2, 0).reshape(h * w, D)
        torch.testing.assert_close(tokens.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_list_gives_the_bits_of_a_batch() -> None:
    make = Make(torch.bfloat16)
    batch, given = make.u8(3, 3, 8, 12), {**make.weights(3, 4, 4), **NORM}
    tokens = mmkernels.patch_embed(batch, **given)
    listed = mmkernels.patch_embed_packed(list(batch), **given)
    flat = mmkernels.patch_embed_packed(batch.flatten(), image_sizes=[[8, 12]] * 3, **given)
    assert torch.equal(listed.tokens, tokens.flatten(0, 1))
    assert torch.equal(flat.tokens, tokens.flatten(0, 1))


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_nothing_beside_the_pixels_is_read(kind: str) -> None:
    room = torch.full((2, 3, 40, 40), torch.nan)
    room[:, :, 10:21, 10:23] = torch.rand(2, 3, 11, 13)
    inside = room[:, :, 10:21, 10:23]
    weight = torch.randn(D, 3, 4, 4)
    if kind == "dense":
        tokens = mmkernels.patch_embed(inside, weight, pad=True)
        expected = mmkernels.patch_embed(inside.contiguous(), weight, pad=True)
    else:
        tokens = mmkernels.patch_embed_packed(list(inside), weight, pad=True).tokens
        expected = mmkernels.patch_embed_packed(
            [i.contiguous() for i in inside], weight, pad=True
        ).tokens
    assert tokens.isfinite().all() and torch.equal(tokens, expected)


@pytest.mark.parametrize(
    "grid",
    [[[1, 90, 90], [1, 1, 1]], [[1, 1, 2], [1, 1, 1]], [[-3, 5, 5], *[[2**40] * 3] * 9], [[0, 0, 0]] * 2],
    ids=["too_many", "too_few", "senseless", "none"],
)  # fmt: skip
@pytest.mark.parametrize("mode", ["fixed", "nearest", "bilinear", "factorised"])
def test_a_wrong_grid_reads_nothing_out_of_range(grid: list[list[int]], mode: str) -> None:
    def inside(*shape: int) -> torch.Tensor:
        """In the middle of NaN."""
        room = torch.full((shape[0] + 200, *shape[1:]), torch.nan)
        room[100:-100] = torch.rand(shape)
        return room[100:-100]

    x, weight, prefix = inside(8, 3), inside(D, 3), inside(2, D)
    table = {"fixed": [inside(9, D)], "factorised": [inside(3, D), inside(4, D)]}
    tables = table.get(mode, [inside(12, D).view(3, 4, D)])
    layout = ([1, 1, 1], [], "exact", 1, False, mode, False, False)
    conv, grid_thw = weight.view(D, 3, 1, 1, 1), torch.tensor(grid)
    out = launchers.patch_embed([x], conv, None, tables, prefix, grid_thw, None, None, *layout)
    assert out.shape == (8 + 2 * len(grid), D) and out.isfinite().all()
    shape = [n for t in tables for n in t.shape[:-1]]
    grads = launchers.patch_embed_backward(
        inside(len(out), D), [x], conv, grid_thw, None, None, 2, shape, [True] * 5, *layout
    )
    for grad in (*grads[0], grads[1], grads[2], *grads[3], grads[4]):
        assert grad.isfinite().all()


def test_gradients_nobody_needs_are_empty() -> None:
    image, weight = torch.rand(3, 8, 8), torch.randn(D, 3, 1, 4, 4)
    layout = Layout([1, 4, 4], [], "exact", 1, False, "bilinear", False, False)
    d_images, *rest, d_tables, d_prefix = launchers.patch_embed_backward(
        torch.randn(5, D), [image], weight, None, None, None, 1, [2, 2], [False] * 5,
        *vars(layout).values(),
    )  # fmt: skip
    assert d_tables == [] and [g.numel() for g in (*d_images, *rest, d_prefix)] == [0] * 4


EMPTY: dict[str, Inputs] = {
    "no_images": {"images": [], "weight": torch.randn(D, 3, 4, 4), "bias": torch.randn(D)},
    "no_rows": {
        "images": torch.zeros(0, 3, dtype=torch.uint8), "grid_thw": torch.empty(0, 3, dtype=torch.int64),
        "weight": torch.randn(D, 3), "prefix_tokens": torch.randn(1, D),
        "position_table": torch.randn(2, 2, D),
    },
    "no_flat_images": {
        "images": torch.zeros(0, dtype=torch.uint8), "image_sizes": [], "weight": torch.randn(D, 3, 4, 4),
        "position_table": torch.randn(2, 2, D),
    },
    "no_width": {"images": [torch.rand(3, 4, 4)], "weight": torch.randn(0, 3, 4, 4)},
    "no_frames": {
        "pixel_values": torch.zeros(2, 3, 0, 8, 8, dtype=torch.uint8), "weight": torch.randn(D, 3, 2, 4, 4),
        "prefix_tokens": torch.randn(1, D), "bias": torch.randn(D),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", EMPTY)
def test_nothing_to_do(name: str) -> None:
    got, expected = gradients(embed, EMPTY[name]), gradients(Cases.plain, EMPTY[name])
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value)


def test_no_patch_has_no_gradient() -> None:
    given = {"pixel_values": torch.rand(2, 0, 6), "weight": torch.randn(D, 6)}
    got = gradients(embed, given)
    assert got["out"].shape == (2, 0, D) and got["pixel_values"].shape == (2, 0, 6)
    assert torch.equal(got["weight"], torch.zeros(D, 6))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": [torch.rand(3, 8, 9)]}, "8×9 pixels"),
        ({"position_table": [torch.rand(1, D), torch.rand(9, D)]}, "1 rows and 9 columns"),
        ({"position_table": torch.rand(3, D), "position_mode": "fixed"}, "3 rows"),
        ({"merge_size": 4}, "multiple of merge_size 4"),
    ],
)
def test_what_does_not_fit_raises(changed: Inputs, message: str) -> None:
    given = {"images": [torch.rand(3, 8, 8)], "weight": torch.rand(D, 3, 4, 4), **FACTORISED}
    with pytest.raises(ValueError, match=message):
        embed({**given, **changed})
