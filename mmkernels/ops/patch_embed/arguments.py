# SPDX-License-Identifier: Apache-2.0
"""Arguments that ``patch_embed`` and ``patch_embed_packed`` share, checked and in the op's own form."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mmkernels import checks
from mmkernels.ops.patch_embed.layout import OP

Numbers = list[float] | None
Grid = torch.Tensor | Sequence[Sequence[int]]


def check_layout(name: str, pixels: torch.Tensor, weight: torch.Tensor, *, batched: bool) -> None:
    """The axes are the op's: not a picture without its batch, not one whose channels come last."""
    checks.tensor(OP, name, pixels)
    checks.tensor(OP, "weight", weight)
    if batched and pixels.dim() == 3 and weight.dim() != 2:  # else read as rows wherever W is K
        expected = "[B, C, H, W] (image[None] of one image), or rows [B, N, K] with a [D, K] weight"
        checks.fail(OP, name, list(pixels.shape), expected)
    if pixels.dim() != 3 + batched:
        return
    channel = pixels.shape[-3]
    known = weight.shape[1] if weight.dim() > 2 else 3
    # A Linear's weight does not tell its channels, but no picture is three pixels wide.
    wrong = channel != known if weight.dim() > 2 else channel > 4
    if wrong and pixels.shape[-1] == known:
        letters, order = ("[B, C, H, W]", (0, 3, 1, 2)) if batched else ("[C, H, W]", (2, 0, 1))
        expected = f"{letters} with C = {known} (permute{order} brings channels there, a view)"
        checks.fail(OP, name, list(pixels.shape), expected)


def weight_of_images(
    weight: torch.Tensor, C: int, stride: Sequence[int] | None, patch_order: str
) -> torch.Tensor:
    """``[D,C,P_t,P_h,P_w]`` of a Conv2d's, a Conv3d's or a Linear's weight: always a view."""
    checks.floating(OP, "weight", weight)
    _check_order(patch_order)
    expected = f"[D, {C}, P_h, P_w], [D, {C}, P_t, P_h, P_w] or [D, K] for {C}-channel images"
    if weight.dim() == 2:
        return _weight_of_linear(weight, C, stride, patch_order, expected)
    if weight.dim() not in (4, 5) or weight.shape[1] != C:
        checks.fail(OP, "weight", list(weight.shape), expected)
    if min(weight.shape[2:]) == 0:
        checks.fail(OP, "weight", list(weight.shape), "of a patch of at least 1×1")
    if patch_order != "cpp":
        checks.fail(OP, "patch_order", repr(patch_order), '"cpp" with the weight of a convolution')
    return weight if weight.dim() == 5 else weight.unsqueeze(2)


def _weight_of_linear(
    weight: torch.Tensor, C: int, stride: Sequence[int] | None, patch_order: str, expected: str
) -> torch.Tensor:
    D, K = weight.shape
    patch = list(stride) if stride is not None else [1, *[math.isqrt(K // max(C, 1))] * 2]
    if K == 0 or C * math.prod(patch) != K:
        hint = f"{expected}, K = {C}·P_t·P_h·P_w (stride tells the patch of a [D, K] weight, else it is square)"
        checks.fail(OP, "weight", list(weight.shape), hint)
    if patch_order == "cpp":
        return weight.view(D, C, *patch)
    return weight.view(D, *patch, C).permute(0, 4, 1, 2, 3)


def weight_of_rows(weight: torch.Tensor, K: int, patch_order: str) -> torch.Tensor:
    """``[D,K,1,1,1]``, its K in the order of the rows."""
    checks.floating(OP, "weight", weight)
    _check_order(patch_order)
    if weight.dim() not in (2, 4, 5) or math.prod(weight.shape[1:]) != K:
        expected = f"[D, {K}] or a convolution's of {K} values a patch, for rows of {K}"
        checks.fail(OP, "weight", list(weight.shape), expected)
    if patch_order == "ppc" and weight.dim() > 2:
        weight = weight.movedim(1, -1)
    return weight.flatten(1).view(weight.shape[0], K, 1, 1, 1)


def check_grid(grid_thw: torch.Tensor, rows: torch.Tensor) -> None:
    """Its shape and dtype; its numbers are the kernel's to check."""
    if rows.dim() != 2:
        checks.fail(OP, "grid_thw", "a tensor", "None unless the patches are rows [n, K]")
    if grid_thw.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{OP}: grid_thw must be int64 or int32, got {grid_thw.dtype}")
    if grid_thw.device != rows.device and grid_thw.device.type != "cpu":
        checks.fail(
            OP, "grid_thw", grid_thw.device, f"on the device of the rows, {rows.device}, or on cpu"
        )
    if grid_thw.dim() != 2 or grid_thw.shape[1] != 3:
        checks.fail(OP, "grid_thw", list(grid_thw.shape), "[images, 3]")


def reworded(op: Callable[..., Any], *args: Any) -> Any:
    """Calls the op; errors of its native kernel, RuntimeErrors at this ABI, become ValueErrors."""
    try:
        return op(*args)
    except RuntimeError as error:
        raise checks.as_value_error(OP, error) from None


def _check_order(patch_order: str) -> None:
    if patch_order not in ("cpp", "ppc"):
        checks.fail(OP, "patch_order", repr(patch_order), '"cpp" or "ppc"')


def stride_of(stride: int | Sequence[int] | None) -> list[int] | None:
    """``[t, h, w]``, from one number (pixels), two (h, w) or three."""
    if stride is None:
        return None
    numbers = [stride, stride] if isinstance(stride, int) else list(stride)
    if len(numbers) not in (2, 3) or min(numbers) < 1:
        checks.fail(
            OP, "stride", stride, "one, two (h, w) or three (t, h, w) numbers of at least 1"
        )
    return [1, *numbers] if len(numbers) == 2 else numbers


def edge_of(pad: bool, crop: bool) -> str:
    """What becomes of a rest of pixels."""
    if pad and crop:
        checks.fail(OP, "pad and crop", "both", "chosen one at most")
    return "pad" if pad else "crop" if crop else "exact"


def check_merge(merge_size: int, prefix: str) -> None:
    """Token order: ``merge_size`` and ``prefix``."""
    if merge_size < 1:
        checks.fail(OP, "merge_size", merge_size, "at least 1")
    if prefix not in ("first", "last"):
        checks.fail(OP, "prefix", repr(prefix), '"first" or "last"')


def check_pixels(name: str, pixels: torch.Tensor, weight: torch.Tensor) -> None:
    """Of a dtype and on a device the op reads."""
    if pixels.dtype != torch.uint8:
        checks.floating(OP, f"{name} (unless uint8)", pixels)
    if pixels.device != weight.device:
        checks.fail(OP, name, pixels.device, f"on the device of weight, {weight.device}")


def bias_of(bias: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor | None:
    """``[D]`` or None."""
    if bias is not None:
        checks.like(OP, "bias", bias, weight, "weight")
        checks.shape(OP, "bias", bias, (weight.shape[0],), "[D]")
    return bias


def prefix_of(prefix_tokens: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor | None:
    """``[R, D]`` or None."""
    if prefix_tokens is None:
        return None
    checks.like(OP, "prefix_tokens", prefix_tokens, weight, "weight")
    D = weight.shape[0]
    if prefix_tokens.dim() == 1:
        prefix_tokens = prefix_tokens[None]
    if prefix_tokens.dim() == 3 and prefix_tokens.shape[0] == 1:
        prefix_tokens = prefix_tokens[0]
    if prefix_tokens.dim() != 2 or prefix_tokens.shape[1] != D:
        checks.fail(OP, "prefix_tokens", list(prefix_tokens.shape), f"[R, D] with D = {D}")
    return prefix_tokens


def affine_of(
    C: int,
    rescale_factor: float | None,
    image_mean: Sequence[float] | None,
    image_std: Sequence[float] | None,
) -> tuple[Numbers, Numbers]:
    """``pixel · scale[c] + shift[c]``, in Python floats (fp64)."""
    if rescale_factor is None and image_mean is None and image_std is None:
        return None, None
    mean = _per_channel("image_mean", image_mean, C, 0.0)
    std = _per_channel("image_std", image_std, C, 1.0)
    if any(s == 0 for s in std):
        checks.fail(OP, "image_std", std, "non-zero in every channel")
    rescale = 1.0 if rescale_factor is None else float(rescale_factor)
    if not _finite(rescale):
        checks.fail(OP, "rescale_factor", rescale, "finite")
    return [rescale / s for s in std], [-m / s for m, s in zip(mean, std, strict=True)]


def affine_of_rows(
    K: int,
    patch_order: str,
    rescale_factor: float | None,
    image_mean: Sequence[float] | None,
    image_std: Sequence[float] | None,
) -> tuple[Numbers, Numbers]:
    """Of each of the K values of a row; the channels are as many as there are means (else one)."""
    channels = len(image_mean or image_std or [0])
    if K % channels:
        checks.fail(OP, "image_mean", f"{channels} numbers", f"of channels that divide K = {K}")
    scale, shift = affine_of(channels, rescale_factor, image_mean, image_std)
    if scale is None or shift is None:
        return None, None
    if patch_order == "ppc":
        return scale * (K // channels), shift * (K // channels)
    run = K // channels
    return [v for v in scale for _ in range(run)], [v for v in shift for _ in range(run)]


def _finite(value: float) -> bool:
    return value - value == 0  # math.isfinite would break the compiler's graph


def _per_channel(
    argument: str, values: Sequence[float] | None, C: int, default: float
) -> list[float]:
    if values is None:
        return [default] * C
    numbers = [float(v) for v in values]
    if len(numbers) != C:
        checks.fail(OP, argument, f"{len(numbers)} numbers", f"one number for each of {C} channels")
    if not all(_finite(v) for v in numbers):
        checks.fail(OP, argument, numbers, "finite")
    return numbers
