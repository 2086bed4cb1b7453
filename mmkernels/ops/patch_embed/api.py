# SPDX-License-Identifier: Apache-2.0
"""The public ``patch_embed``: what it computes, and the checks before it does."""

from collections.abc import Sequence
from typing import Any

import torch

from mmkernels import checks
from mmkernels.ops.patch_embed import arguments
from mmkernels.ops.patch_embed.arguments import Grid
from mmkernels.ops.patch_embed.layout import OP, Layout, check_positions, sources
from mmkernels.ops.patch_embed.op import FORWARD


def patch_embed(
    pixel_values: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: int | Sequence[int] | None = None,
    rescale_factor: float | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    position_embed: torch.Tensor | None = None,
    prefix_tokens: torch.Tensor | None = None,
    prefix: str = "first",
    patch_order: str = "cpp",
    merge_size: int = 1,
    grid_thw: Grid | None = None,
    pad: bool = False,
    crop: bool = False,
) -> torch.Tensor:
    """Embeds image patches: ``out[b, R+n] = weight · patch(b, n) + bias + position[n]``.

    Equals rescale → normalise → ``Conv2d``/``Conv3d`` → flatten → concatenate the prefix tokens → add
    positions, without the intermediate tensors: uint8 pixels are normalised where they are read.

    Args:
        pixel_values: Images ``[B, C, H, W]``, clips ``[B, C, T, H, W]``, or patches already cut,
            ``[n, K]``, or ``[B, N, K]`` with a ``[D, K]`` weight; uint8 or float, any strides (NHWC and
            ``[B, T, C, H, W]`` are permuted views). H and W in pixels. uint8 without ``rescale_factor``
            means 0…255. A single image needs a batch, ``image[None]``.
        weight: ``[D, C, P_h, P_w]`` of a Conv2d, ``[D, C, P_t, P_h, P_w]`` of a Conv3d, or ``[D, K]`` of
            a Linear; float64, float32, float16 or bfloat16. Its dtype is the output's and that of all
            other float arguments but the pixels. One frame (a 4-D image, or T = 1) under a temporal weight
            repeats P_t times, as processors repeat it: half the work where the weight can be summed
            instead (fp32; in 16 bits for bytes that are normalised).
        bias: ``[D]``.
        stride: Pixels from patch to patch: one number, (h, w) or (t, h, w). Default: the patch. Smaller,
            patches overlap (audio). With a ``[D, K]`` weight it also tells the patch (default: square).
        rescale_factor: Pixels are multiplied by it first; 1/255 in most processors.
        image_mean, image_std: One number a channel; ``(pixel · rescale_factor - mean) / std``.
        position_embed: ``[N, D]`` (patches only), ``[R+N, D]``, or ``[S+N, D]`` with S < R (the first
            S prefix tokens), a leading 1 allowed; in the order of the sequence, patches raster (t, h, w).
        prefix_tokens: ``[R, D]`` (a leading 1 allowed) or ``[D]``: cls, distillation, register tokens.
        prefix: ``"first"`` or ``"last"`` (Llama 4): before or after the patches.
        patch_order: K of a ``[D, K]`` weight or of rows: ``"cpp"`` (channel, t, h, w) or ``"ppc"``
            (t, h, w, channel: SigLIP2, Gemma, Pix2Struct).
        merge_size: m > 1 gives the tokens of each m×m block one after the other (Qwen2-VL), with their
            positions. Rows are in that order already; then ``grid_thw`` tells the grids.
        grid_thw: With rows ``[n, K]``: int64 or int32 ``[images, 3]`` (or lists), the grid of each image,
            on the rows' device or the CPU.
        pad: Fills the last patch of an axis that does not divide: pixels by 0 after normalising, time by
            the last frame.
        crop: Leaves a rest of pixels or frames out, as convolutions do. Default: a rest is an error.
            Rows are cut already: for them stride, pad and crop mean nothing.

    Returns:
        ``[B, R+N, D]``, contiguous, in the weight's dtype (the autocast dtype under autocast). For rows
        ``[n, K]``: ``[n + images·R, D]``, images one after the other (one image without ``grid_thw``).

    Gradients: weight, bias, position_embed, prefix_tokens, and pixel_values if they are float.

    Raises:
        ValueError, TypeError: A shape, dtype or device does not fit; names argument, got, expected.

    Numerics: normalised to fp32 accuracy, rounded to the weight's dtype, accumulated in fp32 (fp64 for
        float64); bias and position are added there and the sum rounds once. Same bits for any number of
        CPU threads.

    Source: ViT (Dosovitskiy et al. 2021), section 3.1; ``CLIPVisionEmbeddings``,
        ``Qwen2VLPatchEmbed``, ``Siglip2VisionEmbeddings``, ``ASTPatchEmbeddings`` of transformers.
    """
    arguments.check_merge(merge_size, prefix)
    arguments.check_layout("pixel_values", pixel_values, weight, batched=True)
    grid_thw = None if grid_thw is None else checks.grid(OP, "grid_thw", grid_thw)
    if pixel_values.dim() in (2, 3):
        values, conv, scale, shift, sizes = _rows(
            pixel_values, weight, patch_order, grid_thw, rescale_factor, image_mean, image_std
        )
        stride = [1, 1, 1]
    else:
        values, conv, stride = _images(pixel_values, weight, stride, patch_order, grid_thw)
        scale, shift = arguments.affine_of(values.shape[1], rescale_factor, image_mean, image_std)
        sizes = [0]  # not read; AOTInductor hands an empty list to an op as None
    arguments.check_pixels("pixel_values", pixel_values, weight)
    bias, prefix_tokens = (
        arguments.bias_of(bias, weight),
        arguments.prefix_of(prefix_tokens, weight),
    )
    positions = _positions(position_embed, weight)
    layout = Layout(
        stride, sizes, arguments.edge_of(pad, crop), merge_size, prefix == "last",
        "fixed" if positions else "none", False, False,
    )  # fmt: skip
    R = 0 if prefix_tokens is None else prefix_tokens.shape[0]
    if pixel_values.dim() < 4 and grid_thw is None and merge_size > 1:
        checks.fail(OP, "merge_size", merge_size, "1 for rows without grid_thw")
    if grid_thw is None:
        source = sources([values], conv.shape[1:], layout, None)[0]
        check_positions([len(p) for p in positions], source, layout, R)
    tokens: torch.Tensor = arguments.reworded(
        FORWARD, [values], conv, bias, positions, prefix_tokens, grid_thw, scale, shift,
        *layout.arguments(),
    )  # fmt: skip
    if pixel_values.dim() == 2:
        return tokens
    return tokens.view(pixel_values.shape[0], R + source.patches, weight.shape[0])


def _images(
    pixel_values: torch.Tensor,
    weight: torch.Tensor,
    stride: int | Sequence[int] | None,
    patch_order: str,
    grid_thw: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """``[B,C,T,H,W]``, the weight of a convolution, its stride."""
    if pixel_values.dim() not in (4, 5):
        shapes = "[B, C, H, W], [B, C, T, H, W], or rows [B, N, K] or [n, K]"
        checks.fail(OP, "pixel_values", list(pixel_values.shape), shapes)
    if grid_thw is not None:
        checks.fail(OP, "grid_thw", "a tensor", "None unless pixel_values are rows [n, K]")
    steps = arguments.stride_of(stride)
    conv = arguments.weight_of_images(weight, pixel_values.shape[1], steps, patch_order)
    clips = pixel_values if pixel_values.dim() == 5 else pixel_values.unsqueeze(2)
    return clips, conv, steps or list(conv.shape[2:])


def _rows(
    rows: torch.Tensor,
    weight: torch.Tensor,
    patch_order: str,
    grid_thw: torch.Tensor | None,
    *affine: Any,
) -> tuple[torch.Tensor, torch.Tensor, arguments.Numbers, arguments.Numbers, list[int]]:
    """``[n,K]``, its weight, scale and shift of each of the K values, the sizes of its images."""
    K = rows.shape[-1]
    conv = arguments.weight_of_rows(weight, K, patch_order)
    scale, shift = arguments.affine_of_rows(K, patch_order, *affine)
    if grid_thw is not None:
        arguments.check_grid(grid_thw, rows)
        return rows, conv, scale, shift, []
    sizes = [rows.shape[-2], rows.shape[0] if rows.dim() == 3 else 1]
    return rows.reshape(sizes[0] * sizes[1], K), conv, scale, shift, sizes


def _positions(position_embed: torch.Tensor | None, weight: torch.Tensor) -> list[torch.Tensor]:
    if position_embed is None:
        return []
    checks.like(OP, "position_embed", position_embed, weight, "weight")
    D = weight.shape[0]
    if position_embed.dim() == 3 and position_embed.shape[0] == 1:
        position_embed = position_embed[0]
    if position_embed.dim() != 2 or position_embed.shape[1] != D:
        checks.fail(OP, "position_embed", list(position_embed.shape), f"[rows, D] with D = {D}")
    return [position_embed]
