# SPDX-License-Identifier: Apache-2.0
"""The public ``patch_merge``: what it computes, and its checks."""

import torch

from mmkernels import checks
from mmkernels.ops.norm import Norm, check_norm
from mmkernels.ops.patch_merge import layout
from mmkernels.ops.patch_merge.layout import OP, Grid
from mmkernels.ops.patch_merge.op import FORWARD


def patch_merge(
    features: torch.Tensor,
    merge_size: int | tuple[int, int] = 2,
    *,
    grid_thw: Grid | None = None,
    blocks: bool = False,
    order: str = "kkc",
    transposed: bool = False,
    pad: bool = False,
    norm: Norm | None = None,
    norm_after: bool = False,
) -> torch.Tensor:
    """``m×m`` neighbouring tokens become one, their features side by side: what a merging projector's Linear reads.

    ``out[Y, X] = norm(cat(features[Y·m + dy, X·m + dx] for dy, dx < m))``, one pass, J = m·m.

    Args:
        features: ``[B, H, W, C]``, or packed ``[tokens, C]`` with ``grid_thw``.
        merge_size: m, or (m_h, m_w): ``(1, 4)`` merges four tokens of a row. At least 1; 1 leaves the norm alone.
        grid_thw: t, h and w of each image, ``[images, 3]`` int32 or int64, in tokens before merging.
        blocks: The tokens already lie block after block, as Qwen2-VL orders its patches: nothing is gathered. Then
            ``[tokens, C]`` needs no grid.
        order: Of the J·C merged features: ``"kkc"`` token after token (Qwen, InternVL, Idefics3), ``"ckk"`` channel
            after channel (``F.unfold`` in Pixtral and Mistral3, a ``Conv2d`` weight in GLM-4V).
        transposed: Merged tokens by columns (InternVL's ``ps_version`` v1), not by rows.
        pad: Fills sides that do not divide by tokens of 0 (VILA, Ovis2); else they are an error.
        norm: ``Norm("layer" or "rms", weight, bias, eps)`` of each token's C features or, ``norm_after``, of the
            J·C merged ones (weight in their order). Padding stays 0 under a norm before.

    Returns:
        ``[B, M, J·C]``, or ``[M, J·C]`` of packed tokens; features' dtype (the autocast dtype under autocast).

    Gradients: features, norm.weight, norm.bias; recomputed, nothing but the inputs is saved. Deterministic.

    Raises:
        ValueError, TypeError: Names argument, got, expected. On CUDA the numbers of a grid on the GPU are not read.

    Numerics: without a norm bitwise the input; a norm runs in fp32 (fp64) and rounds once.

    Source: ``Qwen2VLPatchMerger``, ``InternVLModel.pixel_shuffle``, ``Idefics3Connector``, ``Mistral3PatchMerger``.
    """
    merge = _merge_of(merge_size)
    checks.floating(OP, "features", features)
    if order not in ("kkc", "ckk"):
        checks.fail(OP, "order", repr(order), '"kkc" or "ckk"')
    group = merge[0] * merge[1]
    width = features.shape[-1] * (group if norm_after else 1)
    check_norm(OP, "norm", norm, width, features, "features")
    dense = features.dim() == 4
    if not dense and (features.dim() != 2 or (grid_thw is None and not blocks)):
        expected = "[B, H, W, C], or [tokens, C] with grid_thw or blocks"
        checks.fail(OP, "features", list(features.shape), expected)
    if dense and blocks:
        checks.fail(OP, "blocks", True, "False with features [B, H, W, C]")
    if dense and grid_thw is not None:
        checks.fail(OP, "grid_thw", "given", "None with features [B, H, W, C]")
    index = _index(features, grid_thw, merge, blocks, transposed, pad)
    kind, weight, bias, eps = norm or Norm("none")
    out: torch.Tensor = FORWARD(
        features.flatten(0, -2), index, weight, bias, group, kind, norm_after,
        order == "ckk", eps,
    )  # fmt: skip
    if not dense:
        return out
    H, W = features.shape[1:3]
    return out.view(features.shape[0], -(-H // merge[0]) * -(-W // merge[1]), out.shape[1])


def normed(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """The norm alone, over the last axis; its gradients have the same bits for any number of threads."""
    kind, weight, bias, eps = norm
    out: torch.Tensor = FORWARD(x.flatten(0, -2), None, weight, bias, 1, kind, False, False, eps)
    return out.view(x.shape)


def _index(
    features: torch.Tensor,
    grid_thw: Grid | None,
    merge: tuple[int, int],
    blocks: bool,
    transposed: bool,
    pad: bool,
) -> torch.Tensor | None:
    """``[M, J]`` rows of features; None where they already follow each other."""
    if features.dim() == 4:
        B, H, W, _ = features.shape
        if not pad and (H % merge[0] or W % merge[1]):
            expected = f"multiples of {merge[0]} and {merge[1]} (or choose pad)"
            checks.fail(OP, "features", f"{H}×{W} tokens", expected)
        if merge == (1, 1) and not transposed:
            return None
        return layout.dense_index(B, H, W, merge, transposed, features.device)
    tokens, group = features.shape[0], merge[0] * merge[1]
    if blocks and (transposed or pad):
        checks.fail(OP, "blocks", True, "False with transposed or pad")
    if blocks and tokens % group:
        checks.fail(OP, "features", f"{tokens} tokens", f"a multiple of {group}")
    grid = None if grid_thw is None else layout.checked_grid(grid_thw, tokens, merge, pad)
    if grid is None or blocks or (merge == (1, 1) and not transposed):
        return None
    merged = layout.merged_count(grid, tokens, merge, pad)
    return layout.packed_index(grid.to(features.device), merge, transposed, merged)


def _merge_of(merge_size: int | tuple[int, int]) -> tuple[int, int]:
    sizes = (merge_size, merge_size) if isinstance(merge_size, int) else tuple(merge_size)
    if len(sizes) != 2 or min(sizes) < 1:
        checks.fail(OP, "merge_size", merge_size, "one number or two, of at least 1")
    return sizes
