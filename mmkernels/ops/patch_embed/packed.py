# SPDX-License-Identifier: Apache-2.0
"""The public ``patch_embed_packed``: images of different sizes in one call."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from mmkernels import checks
from mmkernels.ops.patch_embed import arguments
from mmkernels.ops.patch_embed.arguments import Grid
from mmkernels.ops.patch_embed.layout import OP
from mmkernels.ops.patch_embed.op import FORWARD, GRIDS

MODES = ("fixed", "nearest", "bilinear", "bicubic", "factorised")
Tables = torch.Tensor | Sequence[torch.Tensor]


class PackedPatches(NamedTuple):
    """Tokens ``[T, D]`` of all images, their offsets ``[n+1]`` int32, their grids ``[n, 3]`` int64."""

    tokens: torch.Tensor
    cu_seqlens: torch.Tensor
    grid_thw: torch.Tensor


def patch_embed_packed(
    images: Sequence[torch.Tensor] | torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    image_sizes: Sequence[Sequence[int]] | None = None,
    grid_thw: Grid | None = None,
    stride: int | Sequence[int] | None = None,
    rescale_factor: float | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    position_table: Tables | None = None,
    position_mode: str = "bilinear",
    align_corners: bool = False,
    antialias: bool = False,
    prefix_tokens: torch.Tensor | None = None,
    prefix: str = "first",
    patch_order: str = "cpp",
    merge_size: int = 1,
    pad: bool = False,
    crop: bool = False,
) -> PackedPatches:
    """``patch_embed`` of images or clips of different sizes, packed, positions resampled for each grid.

    Of an image of grid (t, h, w): ``token[y, x] = weight · patch(y, x) + bias + Σ a_i b_j table[i, j]``
    with the weights a (rows) and b (columns) of the table's resampling to h×w; t frames share them.

    Args:
        images: A list of images ``[C, H, W]`` and clips ``[C, T, H, W]``, any strides; a flat buffer
            ``[values]`` of contiguous images, with ``image_sizes``; or patches already cut, ``[n, K]``,
            with ``grid_thw`` (Qwen2-VL's ``pixel_values``).
        image_sizes: ``(H, W)`` of each image of a flat buffer, ``(T, H, W)`` of each clip, in pixels.
        grid_thw: ``[images, 3]`` int64 or int32 (or lists): the grids of rows, in patches.
        position_table: ``[rows, columns, D]``; ``[S+N, D]`` with ``"fixed"`` (as in ``patch_embed``); two
            tables, ``[2, n, D]`` or (``[rows, D]``, ``[columns, D]``), with ``"factorised"``.
        position_mode: ``"nearest"`` row ⌊y·rows/h⌋ (the bucketised positions of Idefics2 and MiniCPM-V),
            ``"bilinear"`` or ``"bicubic"`` as ``F.interpolate``, ``"factorised"`` the sum of row y and
            column x (Gemma 4, Pix2Struct), ``"fixed"`` none.
        align_corners, antialias: As in ``F.interpolate`` (which, with ``antialias``, errs on one-column
            grids in torch 2.13 on CPU; ours does not).
        prefix_tokens: Before (or after) the patches of every image; only ``"fixed"`` tables position them.

    All other arguments are those of ``patch_embed``. One frame under a temporal weight repeats; a list of
    nothing else costs half the work where the weight can be summed.

    Returns:
        ``PackedPatches(tokens, cu_seqlens, grid_thw)``, prefix tokens counted in ``cu_seqlens``.

    Gradients: weight, bias, position_table, prefix_tokens, and the images that are float. An empty list
        gives no tokens and zero gradients.

    Raises:
        ValueError, TypeError: Names the image by its place in the list. On CUDA the numbers in ``grid_thw``
            are not read back: a grid that does not fit its rows gives rows of the wrong image's position,
            never a read out of range.

    Numerics: as ``patch_embed``; resampled positions are summed in fp32 and added before the rounding.

    Source: NaViT (Dehghani et al. 2023); ``Qwen3VLVisionModel``, ``Siglip2VisionEmbeddings``,
        ``Glm4vVisionEmbeddings``, ``MiniCPMV4_6VisionEmbeddings``, ``Gemma4VisionPatchEmbedder``.
    """
    arguments.check_merge(merge_size, prefix)
    grid_thw = None if grid_thw is None else checks.grid(OP, "grid_thw", grid_thw)
    values, sizes = _images(images, image_sizes, weight, grid_thw)
    affine = (rescale_factor, image_mean, image_std)
    conv, steps, scale, shift = _cut(values, sizes, weight, stride, patch_order, grid_thw, affine)
    bias, prefix_tokens = (
        arguments.bias_of(bias, weight),
        arguments.prefix_of(prefix_tokens, weight),
    )
    tables = _tables(position_table, position_mode, align_corners, antialias, weight)
    layout = (
        steps, sizes, arguments.edge_of(pad, crop), merge_size, prefix == "last",
        position_mode if tables else "none", align_corners, antialias,
    )  # fmt: skip
    R = 0 if prefix_tokens is None else prefix_tokens.shape[0]
    if grid_thw is None:
        cu_seqlens, grid = arguments.reworded(GRIDS, conv, values, R, *layout)
    else:
        grid = grid_thw.long()
        cu_seqlens = F.pad((grid.prod(1) + R).cumsum(0), (1, 0)).int()
    tokens: torch.Tensor = arguments.reworded(
        FORWARD, values, conv, bias, tables, prefix_tokens, grid_thw, scale, shift, *layout
    )
    return PackedPatches(tokens, cu_seqlens, grid)


def _images(
    images: Sequence[torch.Tensor] | torch.Tensor,
    image_sizes: Sequence[Sequence[int]] | None,
    weight: torch.Tensor,
    grid_thw: torch.Tensor | None,
) -> tuple[list[torch.Tensor], list[int]]:
    """The op's list of images and, of a flat buffer, its sizes."""
    rank = {True: 2, False: 1}[grid_thw is not None] if isinstance(images, torch.Tensor) else 0
    if isinstance(images, torch.Tensor):
        if images.dim() != rank:
            shapes = (
                "a list of images, rows [n, K] with grid_thw, or flat [values] with image_sizes"
            )
            checks.fail(OP, "images", list(images.shape), shapes)
        arguments.check_pixels("images", images, weight)
    elif grid_thw is not None:
        checks.fail(OP, "grid_thw", "a tensor", "None unless images are rows [n, K]")
    if (rank == 1) != (image_sizes is not None):
        checks.fail(OP, "image_sizes", image_sizes, "given with a flat buffer, and only then")
    values = [images] if isinstance(images, torch.Tensor) else list(images)
    for i, image in enumerate(values):
        checks.tensor(OP, f"images[{i}]", image)
        arguments.check_layout(f"images[{i}]", image, weight, batched=False)
        if rank == 0 and image.dim() not in (3, 4):
            checks.fail(OP, f"images[{i}]", list(image.shape), "[C, H, W] or [C, T, H, W]")
        if image.dtype != values[0].dtype or image.device != weight.device:
            arguments.check_pixels(f"images[{i}]", image, weight)
            checks.fail(
                OP, f"images[{i}]", image.dtype, f"of the dtype of images[0], {values[0].dtype}"
            )
    if values:
        arguments.check_pixels("images[0]", values[0], weight)
    return values, _flat_sizes(image_sizes or ())


def _flat_sizes(image_sizes: Sequence[Sequence[int]]) -> list[int]:
    """T (0: a still image), H and W of each."""
    flat: list[int] = []
    for i, size in enumerate(image_sizes):
        if len(size) not in (2, 3) or min(size) < 1:
            checks.fail(OP, f"image_sizes[{i}]", size, "(H, W) or (T, H, W) of at least 1")
        flat += [0, *size] if len(size) == 2 else size
    return flat


def _cut(
    values: list[torch.Tensor], sizes: list[int], weight: torch.Tensor,
    stride: int | Sequence[int] | None, patch_order: str, grid_thw: torch.Tensor | None, affine: Any,
) -> tuple[torch.Tensor, list[int], arguments.Numbers, arguments.Numbers]:  # fmt: skip
    """The weight of a convolution, its stride, scale and shift."""
    if grid_thw is not None:
        arguments.check_grid(grid_thw, values[0])
        K = values[0].shape[1]
        conv = arguments.weight_of_rows(weight, K, patch_order)
        return conv, [1, 1, 1], *arguments.affine_of_rows(K, patch_order, *affine)
    steps = arguments.stride_of(stride)
    C = values[0].shape[0] if values and values[0].dim() > 1 else _channels(weight, affine)
    conv = arguments.weight_of_images(weight, C, steps, patch_order)
    steps = steps or list(conv.shape[2:])
    return conv, steps, *arguments.affine_of(C, *affine)


def _channels(weight: torch.Tensor, affine: Any) -> int:
    """Of a flat buffer or an empty list: the convolution's, else as many as there are means, else 3."""
    if weight.dim() > 2:
        return weight.shape[1]
    return len(affine[1] or affine[2] or [0] * 3)


def _tables(
    tables: Tables | None, mode: str, align_corners: bool, antialias: bool, weight: torch.Tensor
) -> list[torch.Tensor]:
    if tables is None:
        return []
    if mode not in MODES:
        checks.fail(OP, "position_mode", repr(mode), f"one of {', '.join(MODES)}")
    found = (
        list(tables) if mode == "factorised" or not isinstance(tables, torch.Tensor) else [tables]
    )
    dims, shape = {"fixed": (2, "[S+N, D]"), "factorised": (2, "two of [n, D]")}.get(
        mode, (3, "[rows, columns, D]")
    )
    D = weight.shape[0]
    fits = len(found) == (2 if mode == "factorised" else 1)
    if not fits or any(t.dim() != dims or t.shape[-1] != D or t.numel() == 0 < D for t in found):
        got = [list(t.shape) for t in found]
        checks.fail(OP, "position_table", got, f"{shape} with D = {D} and position_mode {mode}")
    if antialias and (mode not in ("bilinear", "bicubic") or align_corners):
        checks.fail(
            OP, "antialias", True, "False but for bilinear and bicubic without align_corners"
        )
    for table in found:
        checks.like(OP, "position_table", table, weight, "weight")
    return found
