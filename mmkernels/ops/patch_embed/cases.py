# SPDX-License-Identifier: Apache-2.0
"""Patch embedding: shapes of real models and odd ones, inputs, baselines, invalid calls.

Letters: B images, C channels, H×W pixels, P patch side, D width, R prefix tokens, S extra position rows
(-1: no positions), u8 pixels or float, norm(alised) or not.
"""

from typing import Any

import torch
import torch.nn.functional as F

from mmkernels import backends
from mmkernels.ops.patch_embed.api import patch_embed
from mmkernels.testing.case import Case, Inputs, Invalid

MEAN = [0.48145466, 0.4578275, 0.40821073]  # CLIP's
STD = [0.26862954, 0.26130258, 0.27577711]
FAMILIES = ("random", "constant", "extremes")


def _case(name: str, tags: str = "test", **sizes: Any) -> Case:
    default = {
        "B": 2,
        "C": 3,
        "P": 4,
        "D": 8,
        "R": 0,
        "S": 0,
        "u8": True,
        "norm": True,
        "bias": True,
    }
    return Case(name, {**default, **sizes}, frozenset(tags.split()))


CASES = [
    _case("small", "test gradcheck", H=8, W=12, R=1, S=1, u8=False),
    _case("one_patch", "test gradcheck", B=1, H=4, W=4, u8=False, norm=False),
    _case("u8_prefix5", H=28, W=42, P=14, D=33, R=5, S=2),
    _case("grey_p16", C=1, H=32, W=48, P=16, D=17, S=-1, bias=False),
    _case("patch1_width1", H=5, W=3, P=1, D=1, R=1),
    _case("many_panels", B=3, H=140, W=126, P=2, D=24, R=1, S=1),
    _case("no_position_cls", H=24, W=24, D=40, R=1, S=-1),
    _case("wide", B=1, H=28, W=56, P=14, D=384, S=-1, u8=False),
    _case("empty_batch", "empty", B=0, H=8, W=8, R=1),
    _case("empty_image", "empty", H=0, W=8, R=2),
    _case("empty_width", "empty", H=8, W=8, D=0, R=1),
    _case("clip_l14_336", "bench", B=4, H=336, W=336, P=14, D=1024, R=1, S=1, bias=False),
    _case("siglip_so400m_384", "bench", B=4, H=378, W=378, P=14, D=1152),
    _case("eva_g14_224", "bench", B=8, H=224, W=224, P=14, D=1408, R=1, S=1),
    _case("vit_b16_224", "bench", B=16, H=224, W=224, P=16, D=768, R=1, S=1),
]


def make_inputs(
    case: Case,
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    family: str = "random",
) -> Inputs:
    """Keyword arguments of ``patch_embed``. ``constant`` images sit next to the mean, where normalising cancels."""
    g = torch.Generator().manual_seed(seed)
    shape = (case.B, case.C, case.H, case.W)
    pixels = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
    if family == "constant":
        pixels = torch.full(shape, 123, dtype=torch.uint8)
    elif family == "extremes":
        pixels = pixels // 128 * 255
    K = case.C * case.P * case.P

    def normal(*sizes: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*sizes, generator=g) * scale).to(dtype).to(device)

    N = (case.H // case.P) * (case.W // case.P)
    values = pixels if case.u8 else (pixels.float() + torch.rand(shape, generator=g)) / 256
    inputs: Inputs = {
        "pixel_values": values.to(device) if case.u8 else values.to(dtype).to(device),
        "weight": normal(case.D, case.C, case.P, case.P, scale=K**-0.5),
    }
    if case.bias:
        inputs["bias"] = normal(case.D)
    if case.R:
        inputs["prefix_tokens"] = normal(case.R, case.D)
    if case.S >= 0:
        inputs["position_embed"] = normal(case.S + N, case.D, scale=0.5)
    if case.norm:
        inputs |= {"image_mean": MEAN[: case.C], "image_std": STD[: case.C]}
        inputs["rescale_factor"] = 1 / 255 if case.u8 else 1.0
    return inputs


def run(inputs: Inputs) -> torch.Tensor:
    """The public op."""
    return patch_embed(**inputs)


def plain(inputs: Inputs) -> torch.Tensor:
    """The reference."""
    with backends.backend("reference"):
        return patch_embed(**inputs)


def eager(inputs: Inputs) -> torch.Tensor:
    """As transformers' fast processor and embeddings run it."""
    return _with_rows(inputs, _conv(_normalised(inputs), inputs["weight"], inputs.get("bias")))


def library(inputs: Inputs) -> torch.Tensor:
    """``F.linear`` on unfolded patches: the honest baseline where convolutions are slow."""
    x, weight = _normalised(inputs), inputs["weight"]
    P = weight.shape[2]
    rows = x.unfold(2, P, P).unfold(3, P, P).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    return _with_rows(inputs, F.linear(rows, weight.flatten(1), inputs.get("bias")))


def ceiling(inputs: Inputs) -> torch.Tensor:
    """The bare GEMM, its rows made beforehand (see ``prepare_ceiling``)."""
    return F.linear(inputs["_rows"], inputs["weight"].flatten(1))


def prepare_ceiling(inputs: Inputs) -> None:
    """Rows for ``ceiling``."""
    weight, (B, C, H, W) = inputs["weight"], inputs["pixel_values"].shape
    P = weight.shape[2]
    K = C * P * P
    inputs["_rows"] = torch.randn(B * (H // P) * (W // P), K).to(weight)


def _normalised(inputs: Inputs) -> torch.Tensor:
    x, dtype = inputs["pixel_values"], inputs["weight"].dtype
    if "image_mean" in inputs:
        x = x.to(torch.promote_types(dtype, torch.float32))
        rescale = inputs["rescale_factor"]
        mean = (torch.tensor(inputs["image_mean"]) / rescale).view(-1, 1, 1).to(x)
        std = (torch.tensor(inputs["image_std"]) / rescale).view(-1, 1, 1).to(x)
        x = (x - mean) / std
    return x.to(dtype)


def _conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.conv2d(x, weight, bias, stride=weight.shape[2]).flatten(2).transpose(1, 2)


def _with_rows(inputs: Inputs, tokens: torch.Tensor) -> torch.Tensor:
    prefix, position = inputs.get("prefix_tokens"), inputs.get("position_embed")
    if prefix is not None:
        tokens = torch.cat([prefix.expand(tokens.shape[0], -1, -1), tokens], dim=1)
    if position is None:
        return tokens
    gap = tokens.shape[1] - position.shape[0]
    if gap:
        S = (0 if prefix is None else prefix.shape[0]) - gap
        position = torch.cat(
            [position[:S], position.new_zeros(gap, position.shape[1]), position[S:]]
        )
    return tokens + position


def magnitudes(wide: Inputs, power: int) -> Inputs:
    """|normalised pixel|^p and |weight|^p …; the scale of the pixels moves into image_std."""
    found: Inputs = {k: v.abs() ** power for k, v in wide.items() if isinstance(v, torch.Tensor)}
    C = wide["pixel_values"].shape[1]
    scale = torch.ones(C, 1, 1, dtype=torch.float64)
    if "image_mean" in wide:
        scale = (wide["rescale_factor"] / torch.tensor(wide["image_std"]).double()).view(-1, 1, 1)
    normalised = _normalised({**wide, "pixel_values": wide["pixel_values"].double()})
    found["pixel_values"] = (normalised / scale).abs() ** power
    found["image_std"] = (scale.abs() ** -power).flatten().tolist()
    return found


def rounded_before(wide: Inputs) -> torch.Tensor | None:
    """The tokens before their position is added, as the reference says."""
    without = {k: v for k, v in wide.items() if k != "position_embed"}
    return plain(without) if "position_embed" in wide else None


def traffic(inputs: Inputs) -> tuple[int, int]:
    """Bytes: pixels, weight and output once. FLOPs: the product."""
    pixels, weight = inputs["pixel_values"], inputs["weight"]
    B, C, H, W = pixels.shape
    D, _, P, _ = weight.shape
    N = (H // P) * (W // P)
    R = inputs["prefix_tokens"].shape[0] if "prefix_tokens" in inputs else 0
    out = B * (R + N) * D * weight.element_size()
    return pixels.nbytes + weight.nbytes + out, 2 * B * N * D * C * P * P


def _set(**changes: Any) -> Any:
    return lambda inputs: {**inputs, **changes}


INVALID = [
    Invalid("pixels_3d", _set(pixel_values=torch.zeros(3, 8, 8)), r"pixel_values must be \[B, C, H, W\], got \[3, 8, 8\]"),
    Invalid("pixels_int32", _set(pixel_values=torch.zeros(1, 3, 8, 12, dtype=torch.int32)), "pixel_values .*int32", TypeError),
    Invalid("height", _set(pixel_values=torch.zeros(1, 3, 9, 12)), r"9×12 pixels"),
    Invalid("channels", _set(weight=torch.zeros(8, 4, 4, 4)), r"weight must be \[D, 3, P_h, P_w\].*got \[8, 4, 4, 4\]"),
    Invalid("weight_2d", _set(weight=torch.zeros(8, 48)), r"weight must be .*got \[8, 48\]"),
    Invalid("weight_int", _set(weight=torch.zeros(8, 3, 4, 4, dtype=torch.int64)), "weight must be float64", TypeError),
    Invalid("patch_0", _set(weight=torch.zeros(8, 3, 0, 4)), "at least 1×1"),
    Invalid("bias", _set(bias=torch.zeros(9)), r"bias must be \[D\] = \[8\], got \[9\]"),
    Invalid("bias_dtype", _set(bias=torch.zeros(8).half()), "bias must be of the dtype of weight"),
    Invalid("prefix", _set(prefix_tokens=torch.zeros(1, 9)), r"prefix_tokens must be \[R, D\]"),
    Invalid("positions", _set(position_embed=torch.zeros(99, 8)), "position_embed must be .*got 99 rows"),
    Invalid("position_width", _set(position_embed=torch.zeros(6, 7)), r"position_embed must be \[rows, D\]"),
    Invalid("mean", _set(image_mean=[0.5]), "image_mean must be one number for each of 3 channels"),
    Invalid("mean_nan", _set(image_mean=[0.5, float("nan"), 0.5]), "image_mean must be finite"),
    Invalid("std_0", _set(image_std=[0.5, 0.0, 0.5]), "image_std must be non-zero"),
    Invalid("device", _set(pixel_values=torch.zeros(1, 3, 8, 12, device="meta")), "pixel_values must be on the device of weight"),
]  # fmt: skip
