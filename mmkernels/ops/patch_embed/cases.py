# SPDX-License-Identifier: Apache-2.0
"""Patch embedding: shapes of real models and odd ones, inputs, baselines, invalid calls.

Letters: B images, C channels, T frames (0: still images), H×W pixels, P patch side, Pt its frames (0: the
weight of a Conv2d), stride, D width, R prefix tokens, S extra position rows (-1: no positions), u8 pixels or
float, norm(alised) or not, last: prefix after the patches, m merge size, order of K where the weight is a
Linear's ("": a convolution's), edge pad or crop. ``grids``: a packed call, its images' (t, h, w), t = 0 a
still; ``rest`` pixels more than the grid; rows: patches already cut; flat: one buffer; ``table``: sizes
of the position table, mode, corners (aligned), antialias.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from mmkernels import backends
from mmkernels.ops.patch_embed import baselines, reference
from mmkernels.ops.patch_embed.api import patch_embed
from mmkernels.ops.patch_embed.baselines import ceiling, eager, library, prepare_ceiling
from mmkernels.ops.patch_embed.families import FAMILY_CASES
from mmkernels.ops.patch_embed.invalid import INVALID
from mmkernels.ops.patch_embed.layout import patch_count
from mmkernels.ops.patch_embed.packed import patch_embed_packed
from mmkernels.testing.case import Case, Inputs, map_tensors

__all__ = ["CASES", "FAMILIES", "INVALID", "ceiling", "eager", "library", "magnitudes", "make_inputs", "plain",
           "prepare_ceiling", "rounded_before", "run", "traffic"]  # fmt: skip

MEAN = [0.48145466, 0.4578275, 0.40821073]  # CLIP's
STD = [0.26862954, 0.26130258, 0.27577711]
FAMILIES = ("random", "constant", "extremes")
DEFAULTS = {
    "B": 2, "C": 3, "T": 0, "P": 4, "Pt": 0, "stride": None, "D": 8, "R": 0, "S": -1, "u8": True, "norm": True,
    "bias": True, "last": False, "m": 1, "order": "", "edge": "", "grids": (), "rest": 0, "rows": False,
    "flat": False, "table": (), "mode": "bilinear", "corners": False, "antialias": False,
}  # fmt: skip


def _case(name: str, tags: str = "test", **sizes: Any) -> Case:
    return Case(name, {**DEFAULTS, **sizes}, frozenset(tags.split()))


CASES = [
    _case("small", "test gradcheck", H=8, W=12, R=1, S=1, u8=False),
    _case("one_patch", "test gradcheck", B=1, H=4, W=4, S=0, u8=False, norm=False),
    _case("tubelet_merge", "test gradcheck", B=1, T=4, H=8, W=16, Pt=2, D=5, R=2, S=1, m=2, last=True, u8=False),
    _case("overlap_crop", "test gradcheck", C=1, H=9, W=14, P=4, stride=(3, 3), D=5, R=2, S=2, u8=False, edge="crop"),
    _case("ragged_pad", "test gradcheck", C=2, P=3, Pt=2, D=5, R=1, m=2, u8=False, edge="pad", rest=-1,
          grids=((2, 2, 4), (1, 4, 2), (0, 2, 2)), table=(3, 5), norm=True),
    _case("u8_prefix5", H=28, W=42, P=14, D=33, R=5, S=2),
    _case("grey_p16", C=1, H=32, W=48, P=16, D=17, bias=False),
    _case("patch1_width1", H=5, W=3, P=1, D=1, R=1, S=0),
    _case("many_panels", B=3, H=140, W=126, P=2, D=24, R=1, S=1),
    _case("no_position_cls", H=24, W=24, D=40, R=1),
    _case("wide", B=1, H=28, W=56, P=14, D=384, u8=False),
    _case("still_under_time", H=8, W=8, Pt=2, D=40, S=0),
    _case("still_floats", H=8, W=8, Pt=2, D=40, u8=False),
    _case("still_padded", H=9, W=7, Pt=3, D=40, edge="pad", bias=False),
    _case("one_frame", B=2, T=1, H=8, W=12, Pt=2, D=33, R=1, S=1),
    _case("packed_stills", Pt=2, P=4, D=20, grids=((0, 2, 3), (0, 4, 1)), table=(4, 4)),
    _case("video_u8", T=6, H=8, W=12, Pt=3, D=33, R=1, S=0),
    _case("time_pad", T=3, H=9, W=7, Pt=2, D=9, edge="pad", u8=False),
    _case("time_crop", T=5, H=9, W=7, Pt=2, D=9, edge="crop"),
    _case("audio", C=1, H=32, W=46, P=16, stride=(10, 10), D=24, R=2, S=2, u8=False, edge="crop"),
    _case("gaps", H=10, W=10, P=2, stride=(4, 4), D=9, u8=False),
    _case("linear_ppc", H=8, W=12, D=20, order="ppc", S=0),
    _case("rows_uniform", rows=True, order="ppc", H=2, W=6, P=4, D=20, R=1, S=1, u8=False, norm=False),
    _case("rows_u8", rows=True, order="cpp", H=2, W=3, P=4, D=20),
    _case("qwen_rows", rows=True, P=4, Pt=2, D=36, m=2, u8=False, norm=False, grids=((1, 4, 6), (2, 2, 2)), table=(6, 6), corners=True),
    _case("rows_ppc_factorised", rows=True, order="ppc", P=4, D=36, grids=((1, 3, 5), (1, 6, 2)), table=(7, 9), mode="factorised"),
    _case("packed_bicubic", P=7, D=33, R=3, grids=((0, 3, 5), (0, 6, 2), (0, 1, 1)), table=(4, 4), mode="bicubic"),
    _case("packed_antialias", P=4, D=33, grids=((0, 2, 9), (0, 7, 3)), table=(8, 8), antialias=True),
    _case("packed_bicubic_antialias", P=2, D=8, last=True, R=1, grids=((0, 2, 9), (0, 7, 3)), table=(8, 8), mode="bicubic", antialias=True),
    _case("packed_bicubic_corners", P=2, D=8, grids=((0, 2, 9), (0, 7, 1)), table=(4, 3), mode="bicubic", corners=True, u8=False),
    _case("packed_nearest", P=4, D=20, grids=((0, 5, 3), (0, 9, 8)), table=(7, 7), mode="nearest"),
    _case("packed_fixed", P=4, D=20, R=2, grids=((0, 2, 6), (0, 3, 4)), table=(13,), mode="fixed"),
    _case("packed_fixed_uneven", P=4, D=20, R=3, grids=((0, 2, 6), (0, 1, 13), (0, 2, 6)), table=(14,), mode="fixed"),
    _case("packed_fixed_last", P=4, D=20, R=3, last=True, grids=((0, 1, 13), (0, 2, 6)), table=(14,), mode="fixed", u8=False),
    _case("packed_planes", P=2, D=72, R=1, m=2, grids=((0, 2, 4), (0, 16, 10), (0, 2, 4)), table=(24, 30), antialias=True),
    _case("packed_clips", P=4, Pt=2, D=20, m=2, grids=((2, 2, 6), (1, 4, 4)), table=(5, 5), edge="crop", rest=1),
    _case("packed_flat", flat=True, P=4, Pt=2, D=20, grids=((0, 2, 6), (0, 3, 4)), table=(5, 5)),
    _case("many_images", P=2, D=40, R=1, grids=tuple((0, 1 + i % 5, 1 + i % 7) for i in range(90)), table=(4, 6)),
    _case("empty_batch", "empty", B=0, H=8, W=8, R=1, S=1),
    _case("empty_image", "empty", H=0, W=8, R=2, S=2),
    _case("empty_width", "empty", H=8, W=8, D=0, R=1, S=0),
    _case("empty_video", "empty", T=0, Pt=2, B=0, H=8, W=8, R=1),
    _case("no_frames", "empty", T=-1, Pt=2, H=8, W=8, R=1),
    _case("empty_rows", "empty", rows=True, order="cpp", B=3, H=0, W=4, R=2, norm=False),
    _case("no_images", "empty", P=4, D=8, R=1, grids=(), table=(4, 4)),
    _case("no_grids", "empty", rows=True, P=4, D=8, R=1, grids=(), table=(4, 4), norm=False),
    *FAMILY_CASES(_case),
]  # fmt: skip


def is_packed(case: Case) -> bool:
    """Whether the case is one of ``patch_embed_packed``."""
    return bool(case.grids) or bool(case.table)


def make_inputs(
    case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0, family: str = "random"
) -> Inputs:
    """Keyword arguments. ``constant`` images sit next to the mean, where normalising cancels."""
    g = torch.Generator().manual_seed(seed)

    def pixels(*shape: int) -> torch.Tensor:
        values = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
        if family == "constant":
            values = torch.full(shape, 123, dtype=torch.uint8)
        elif family == "extremes":
            values = values // 128 * 255
        if case.u8:
            return values.to(device)
        return ((values.float() + torch.rand(shape, generator=g)) / 256).to(dtype).to(device)

    def normal(*sizes: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*sizes, generator=g) * scale).to(dtype).to(device)

    inputs: Inputs = (
        _packed(case, pixels) if is_packed(case) else {"pixel_values": _dense(case, pixels)}
    )
    K = case.C * max(case.Pt, 1) * case.P**2
    shape = (K,) if case.order else (case.C, *[case.Pt] * bool(case.Pt), case.P, case.P)
    inputs["weight"] = normal(case.D, *shape, scale=K**-0.5)
    if case.bias:
        inputs["bias"] = normal(case.D)
    if case.R:
        inputs["prefix_tokens"] = normal(case.R, case.D)
    if case.table:
        inputs |= _tables(case, normal)
    elif case.S >= 0:
        inputs["position_embed"] = normal(case.S + _patches(case), case.D, scale=0.5)
    if case.norm:
        inputs |= {"image_mean": MEAN[: case.C], "image_std": STD[: case.C]}
        inputs["rescale_factor"] = 1 / 255 if case.u8 else 1.0
    chosen = {"stride": case.stride, case.edge or "pad": bool(case.edge), "prefix": "last" if case.last else "first",
              "patch_order": case.order or "cpp", "merge_size": case.m}  # fmt: skip
    standard = {
        "stride": None,
        "pad": False,
        "prefix": "first",
        "patch_order": "cpp",
        "merge_size": 1,
    }
    return inputs | {k: v for k, v in chosen.items() if standard.get(k, False) != v}


def _dense(case: Case, pixels: Any) -> torch.Tensor:
    if case.rows:
        values: torch.Tensor = pixels(case.B, case.H * case.W, case.C * max(case.Pt, 1) * case.P**2)
        return values
    frames = [] if case.T == 0 else [max(case.T, 0)]
    clips: torch.Tensor = pixels(case.B, case.C, *frames, case.H, case.W)
    return clips


def _patches(case: Case) -> int:
    if case.rows:
        return int(case.H * case.W)
    patch, edge = (max(case.Pt, 1), case.P, case.P), case.edge or "exact"
    strides = (patch[0], *(case.stride or patch[1:]))
    sizes = (case.T if case.T > 1 else patch[0], case.H, case.W)  # one frame repeats
    counts = [patch_count(*a, edge) for a in zip(sizes, patch, strides, strict=True)]
    return counts[0] * counts[1] * counts[2]


def _packed(case: Case, pixels: Any) -> Inputs:
    patch = max(case.Pt, 1)
    if case.rows:
        rows = sum(t * h * w for t, h, w in case.grids)
        grids = torch.tensor(case.grids, dtype=torch.int64).view(-1, 3)
        return {"images": pixels(rows, case.C * patch * case.P**2), "grid_thw": grids}
    sizes = [
        (*[t * patch + case.rest] * (t > 0), h * case.P + case.rest, w * case.P + case.rest)
        for t, h, w in case.grids
    ]
    images = [pixels(case.C, *size) for size in sizes]
    if case.flat:
        return {"images": torch.cat([i.flatten() for i in images]), "image_sizes": sizes}
    return {"images": images}


def _tables(case: Case, normal: Any) -> Inputs:
    mode = {"position_mode": case.mode} if case.mode != "bilinear" else {}
    flags = {"align_corners": case.corners, "antialias": case.antialias}
    if case.mode == "factorised":
        tables = [normal(n, case.D, scale=0.5) for n in case.table]
        return {"position_table": tables, **mode}
    table = normal(*case.table, case.D, scale=0.5)
    return {"position_table": table, **mode, **{k: v for k, v in flags.items() if v}}


def run(inputs: Inputs) -> torch.Tensor:
    """The public op."""
    return _call(inputs)


def _call(inputs: Inputs) -> torch.Tensor:
    return patch_embed_packed(**inputs).tokens if "images" in inputs else patch_embed(**inputs)


def plain(inputs: Inputs) -> torch.Tensor:
    """The reference."""
    inputs = dict(inputs)
    with _resampling_by_magnitude(inputs.pop("_power", None)), backends.backend("reference"):
        return _call(inputs)


@contextlib.contextmanager
def _resampling_by_magnitude(power: int | None) -> Iterator[None]:
    """|weight|^power in place of the weights that resample a table."""
    if power is None:
        yield
        return
    original = reference.axis_matrix

    def magnitude(*args: Any) -> torch.Tensor:
        matrix = original(*args)
        return torch.where(matrix == 0, 0.0, matrix.abs() ** power)

    with mock.patch.object(reference, "axis_matrix", magnitude):
        yield


def magnitudes(wide: Inputs, power: int) -> Inputs:
    """|normalised pixel|^p and |weight|^p …; the scale of the pixels moves into image_std."""
    found = map_tensors(wide, lambda t: t.abs() ** power if t.is_floating_point() else t)
    key = "images" if "images" in wide else "pixel_values"
    values = wide[key] if isinstance(wide[key], list) else [wide[key]]
    scale = torch.ones(1, dtype=torch.float64)
    if "image_mean" in wide:
        std = torch.tensor(wide["image_std"], dtype=torch.float64)
        scale = std.reciprocal().mul(wide["rescale_factor"])
        found["image_std"] = (scale.abs() ** -power).tolist()
        found["image_mean"], found["rescale_factor"] = [0.0] * len(scale), 1.0
    terms = [
        (baselines.affine(v.double(), wide) / baselines.per_channel(scale, v, wide)).abs() ** power
        for v in values
    ]
    found[key] = terms if isinstance(wide[key], list) else terms[0]
    if baselines.folds(wide):  # the terms are those of the summed weight
        summed = wide["weight"].sum(2, keepdim=True).abs() ** power
        found["weight"] = torch.cat([summed, torch.zeros_like(wide["weight"][:, :, 1:])], 2)
    return {**found, "_power": power}


def rounded_before(wide: Inputs) -> torch.Tensor | None:
    """The tokens before their position is added: the reference rounds them, the kernels do not."""
    names = ("position_embed", "position_table")
    device = wide["weight"].device.type
    if (
        not any(n in wide for n in names)
        or backends.chosen_kernel("patch_embed", device)[0] != "reference"
    ):
        return None
    return plain({k: v for k, v in wide.items() if k not in names})


def traffic(inputs: Inputs) -> tuple[int, int]:
    """Bytes: pixels, weight and output once. FLOPs: the product, of a still frame once."""
    weight = inputs["weight"]
    values = inputs.get("images", inputs.get("pixel_values"))
    values = values if isinstance(values, list) else [values]
    with torch.no_grad():
        shape = run(inputs).shape
    tokens = shape.numel() // max(shape[-1], 1)
    K = weight[0].numel() // (weight.shape[2] if baselines.folds(inputs) else 1)
    moved = (
        sum(v.nbytes for v in values) + weight.nbytes + tokens * shape[-1] * weight.element_size()
    )
    return moved, 2 * tokens * shape[-1] * K
