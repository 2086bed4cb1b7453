# SPDX-License-Identifier: Apache-2.0
"""The public ``patch_embed``: what it computes, and the checks before it does."""

from collections.abc import Sequence

import torch

from mmkernels import checks
from mmkernels.ops.patch_embed.op import FORWARD

_OP = "patch_embed"


def patch_embed(
    pixel_values: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    rescale_factor: float | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    position_embed: torch.Tensor | None = None,
    prefix_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Embeds image patches: ``out[b, R+n] = weight · patch(b, n) + bias + position[n]``.

    Equals rescale → normalise → ``Conv2d(stride=P)`` → flatten → concatenate the prefix tokens → add
    positions, without the intermediate tensors: uint8 pixels are normalised where they are read.

    Args:
        pixel_values: Images ``[B, C, H, W]``, uint8 or float, any strides (NHWC is a permuted view).
            H and W in pixels, multiples of the patch. uint8 without ``rescale_factor`` means 0…255.
        weight: ``[D, C, P_h, P_w]``, the layout of ``nn.Conv2d.weight``; float64, float32, float16 or
            bfloat16. Its dtype is the output's and that of all other float arguments but the pixels.
        bias: ``[D]``.
        rescale_factor: Pixels are multiplied by it first; 1/255 in most processors.
        image_mean, image_std: One number a channel; ``(pixel · rescale_factor - mean) / std``.
        position_embed: ``[N, D]`` (patches only), ``[R+N, D]``, or ``[S+N, D]`` with S < R (the first
            S prefix tokens), a leading 1 allowed; patches in raster order.
        prefix_tokens: ``[R, D]`` (a leading 1 allowed) or ``[D]``: cls, distillation, register tokens.

    Returns:
        ``[B, R+N, D]``, contiguous, in the weight's dtype (the autocast dtype under autocast).

    Gradients: weight, bias, position_embed, prefix_tokens, and pixel_values if they are float.

    Raises:
        ValueError, TypeError: A shape, dtype or device does not fit; names argument, got, expected.

    Numerics: normalised to fp32 accuracy, rounded to the weight's dtype, accumulated in fp32 (fp64 for
        float64). Same bits for any number of CPU threads.

    Source: ViT (Dosovitskiy et al. 2021), section 3.1; ``CLIPVisionEmbeddings``,
        ``SiglipVisionEmbeddings``, ``Blip2VisionEmbeddings`` of transformers.
    """
    N = _check_images(pixel_values, weight, bias)
    prefix = _prefix(prefix_tokens, weight)
    position = _position(position_embed, weight, N, 0 if prefix is None else prefix.shape[0])
    scale, shift = _affine(pixel_values.shape[1], rescale_factor, image_mean, image_std)
    tokens: torch.Tensor = FORWARD(pixel_values, weight, bias, position, prefix, scale, shift)
    return tokens


def _check_images(
    pixel_values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> int:
    if pixel_values.dim() != 4:
        checks.fail(_OP, "pixel_values", list(pixel_values.shape), "[B, C, H, W]")
    if pixel_values.dtype != torch.uint8:
        checks.floating(_OP, "pixel_values (unless uint8)", pixel_values)
    if weight.dim() != 4:
        checks.fail(_OP, "weight", list(weight.shape), "[D, C, P_h, P_w]")
    checks.floating(_OP, "weight", weight)
    B, C, H, W = pixel_values.shape
    D, C_w, P_h, P_w = weight.shape
    if pixel_values.device != weight.device:
        checks.fail(
            _OP, "pixel_values", pixel_values.device, f"on the device of weight, {weight.device}"
        )
    if C != C_w:
        checks.fail(_OP, "weight", list(weight.shape), f"[D, {C}, P_h, P_w] for {C}-channel images")
    if P_h == 0 or P_w == 0:
        checks.fail(
            _OP, "weight", list(weight.shape), "[D, C, P_h, P_w] with a patch of at least 1×1"
        )
    if H % P_h or W % P_w:
        checks.fail(_OP, "pixel_values", f"{H}×{W} pixels", f"a multiple of the {P_h}×{P_w} patch")
    if bias is not None:
        checks.like(_OP, "bias", bias, weight, "weight")
        checks.shape(_OP, "bias", bias, (D,), "[D]")
    return (H // P_h) * (W // P_w)


def _prefix(prefix_tokens: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor | None:
    if prefix_tokens is None:
        return None
    checks.like(_OP, "prefix_tokens", prefix_tokens, weight, "weight")
    D = weight.shape[0]
    if prefix_tokens.dim() == 1:
        prefix_tokens = prefix_tokens[None]
    if prefix_tokens.dim() == 3 and prefix_tokens.shape[0] == 1:
        prefix_tokens = prefix_tokens[0]
    if prefix_tokens.dim() != 2 or prefix_tokens.shape[1] != D:
        checks.fail(_OP, "prefix_tokens", list(prefix_tokens.shape), f"[R, D] with D = {D}")
    return prefix_tokens


def _position(
    position_embed: torch.Tensor | None, weight: torch.Tensor, N: int, R: int
) -> torch.Tensor | None:
    if position_embed is None:
        return None
    checks.like(_OP, "position_embed", position_embed, weight, "weight")
    D = weight.shape[0]
    if position_embed.dim() == 3 and position_embed.shape[0] == 1:
        position_embed = position_embed[0]
    if position_embed.dim() != 2 or position_embed.shape[1] != D:
        checks.fail(_OP, "position_embed", list(position_embed.shape), f"[rows, D] with D = {D}")
    if not N <= position_embed.shape[0] <= R + N:
        rows = (
            f"{N} rows (patches)"
            if R == 0
            else f"{N} (patches) to {R + N} rows (with {R} prefix tokens)"
        )
        checks.fail(_OP, "position_embed", f"{position_embed.shape[0]} rows", rows)
    return position_embed


def _affine(
    C: int,
    rescale_factor: float | None,
    image_mean: Sequence[float] | None,
    image_std: Sequence[float] | None,
) -> tuple[list[float] | None, list[float] | None]:
    """``pixel · scale[c] + shift[c]``, in Python floats (fp64)."""
    if rescale_factor is None and image_mean is None and image_std is None:
        return None, None
    mean = _per_channel("image_mean", image_mean, C, 0.0)
    std = _per_channel("image_std", image_std, C, 1.0)
    if any(s == 0 for s in std):
        checks.fail(_OP, "image_std", std, "non-zero in every channel")
    rescale = 1.0 if rescale_factor is None else float(rescale_factor)
    return [rescale / s for s in std], [-m / s for m, s in zip(mean, std, strict=True)]


def _per_channel(
    argument: str, values: Sequence[float] | None, C: int, default: float
) -> list[float]:
    if values is None:
        return [default] * C
    numbers = [float(v) for v in values]
    if len(numbers) != C:
        checks.fail(
            _OP, argument, f"{len(numbers)} numbers", f"one number for each of {C} channels"
        )
    if any(v != v or v in (float("inf"), float("-inf")) for v in numbers):
        checks.fail(_OP, argument, numbers, "finite")
    return numbers
