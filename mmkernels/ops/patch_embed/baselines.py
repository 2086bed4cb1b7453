# SPDX-License-Identifier: Apache-2.0
"""Patch embedding as others run it: what benchmarks compare with. Arguments are those of the public ops."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from mmkernels.ops.patch_embed.arguments import edge_of, stride_of
from mmkernels.ops.patch_embed.layout import Layout, Source, patch_count
from mmkernels.ops.patch_embed.reference import merge_order, position_rows
from mmkernels.testing.case import Inputs

Project = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, list[int]], torch.Tensor]


def eager(inputs: Inputs) -> torch.Tensor:
    """As transformers' fast processor and embeddings run it: a float image, a convolution, cat, add."""
    return _embed(inputs, _convolution)


def library(inputs: Inputs) -> torch.Tensor:
    """``F.linear`` on unfolded patches: the honest baseline where convolutions are slow."""
    return _embed(inputs, _linear)


def ceiling(inputs: Inputs) -> torch.Tensor:
    """The bare GEMM, its rows made beforehand (see ``prepare_ceiling``)."""
    return F.linear(inputs["_rows"], inputs["_weight"])


def prepare_ceiling(inputs: Inputs) -> None:
    """Rows and weight for ``ceiling``: those of a still frame under a temporal weight folded."""
    weight = inputs["weight"].detach()
    weight = weight.sum(2) if folds(inputs) else weight
    inputs["_weight"] = weight.flatten(1)
    with torch.no_grad():
        tokens = eager(
            {k: v for k, v in inputs.items() if "position" not in k and "prefix" not in k}
        )
    count = tokens.numel() // weight.shape[0]
    inputs["_rows"] = torch.randn(count, weight[0].numel()).to(weight)


def folds(inputs: Inputs) -> bool:
    """Whether all images are one frame under a temporal weight."""
    values: Any = inputs.get("images", inputs.get("pixel_values"))
    if inputs["weight"].dim() != 5 or inputs["weight"].shape[2] == 1 or "grid_thw" in inputs:
        return False
    if "image_sizes" in inputs:
        return all(len(size) == 2 or size[0] == 1 for size in inputs["image_sizes"])
    if isinstance(values, list):
        return bool(values) and all(v.dim() == 3 or v.shape[1] == 1 for v in values)
    return bool(values.dim() == 4 or (values.dim() == 5 and values.shape[2] == 1))


def per_channel(numbers: torch.Tensor, values: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """Numbers of the channels, shaped to multiply ``values``: an image, a clip, a batch, rows or a buffer."""
    if numbers.numel() == 1:
        return numbers.to(values.device)
    numbers = numbers.to(values.device)
    if "image_sizes" in inputs:
        planes = [size for size in inputs["image_sizes"]]
        counts = [_volume(size) for size in planes]
        return torch.cat([numbers.repeat_interleave(n) for n in counts])
    if "grid_thw" in inputs or ("pixel_values" in inputs and values.dim() < 4):
        run = values.shape[-1] // numbers.numel()
        ppc = inputs.get("patch_order") == "ppc"
        return numbers.repeat(run) if ppc else numbers.repeat_interleave(run)
    trailing = values.dim() - (1 if "images" in inputs else 2)
    return numbers.view(-1, *[1] * trailing)


def _volume(size: Any) -> int:
    total = 1
    for n in size:
        total *= n
    return total


def affine(values: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """Rescaled and normalised in fp32 (fp64 stays)."""
    x = values.to(torch.promote_types(inputs["weight"].dtype, torch.float32))
    if "image_mean" not in inputs:
        return values if values.is_floating_point() else x
    rescale = inputs["rescale_factor"]
    mean, std = (
        torch.tensor(inputs[k], dtype=torch.float64) / rescale for k in ("image_mean", "image_std")
    )
    return (x - per_channel(mean.to(x), x, inputs)) / per_channel(std.to(x), x, inputs)


def _embed(inputs: Inputs, project: Project) -> torch.Tensor:
    dtype, weight = inputs["weight"].dtype, inputs["weight"]
    if "pixel_values" in inputs:
        x = affine(inputs["pixel_values"], inputs).to(dtype)
        tokens, grid = _tokens(x, x.dim() == 4, inputs, project)
        return _finish(tokens, grid, inputs)
    images = inputs["images"]
    if "grid_thw" in inputs:
        rows = affine(images, inputs).to(dtype)
        tokens = _of_rows(rows, inputs, project)
        grids = [tuple(g) for g in inputs["grid_thw"].tolist()]
        pieces = tokens.split([t * h * w for t, h, w in grids])
        return _packed([p[None] for p in pieces], grids, inputs)
    if "image_sizes" in inputs:
        C, sizes = weight.shape[1], inputs["image_sizes"]
        flat = affine(images, inputs).split([C * _volume(s) for s in sizes])
        values = [v.view(C, *s) for v, s in zip(flat, sizes, strict=True)]
    else:
        values = [affine(image, inputs) for image in images]
    found = [_tokens(v.to(dtype)[None], v.dim() == 3, inputs, project) for v in values]
    return _packed([t for t, _ in found], [g for _, g in found], inputs)


def _packed(tokens: list[torch.Tensor], grids: list[Any], inputs: Inputs) -> torch.Tensor:
    done = [_finish(t, g, inputs)[0] for t, g in zip(tokens, grids, strict=True)]
    return torch.cat(done) if done else inputs["weight"].new_empty(0, inputs["weight"].shape[0])


def _conv_weight(inputs: Inputs, C: int) -> torch.Tensor:
    weight: torch.Tensor = inputs["weight"]
    if weight.dim() > 2:
        return weight if weight.dim() == 5 else weight.unsqueeze(2)
    side = int((weight.shape[1] // C) ** 0.5)
    if inputs.get("patch_order") == "ppc":
        return weight.view(-1, 1, side, side, C).permute(0, 4, 1, 2, 3)
    return weight.view(-1, C, 1, side, side)


def _tokens(
    x: torch.Tensor, still: bool, inputs: Inputs, project: Project
) -> tuple[torch.Tensor, Any]:
    """``[B,N,D]`` in raster order, and the grid."""
    if x.dim() == 3:
        B, N, K = x.shape
        return _of_rows(x.reshape(B * N, K), inputs, project).view(B, N, -1), (1, 1, N)
    weight = _conv_weight(inputs, x.shape[1])
    patch = list(weight.shape[2:])
    stride = stride_of(inputs.get("stride")) or patch
    if still or x.shape[2] == 1:  # the frame is repeated, as the processors of video models do
        x = (x.unsqueeze(2) if still else x).expand(-1, -1, patch[0], -1, -1)
    edges = edge_of(inputs.get("pad", False), inputs.get("crop", False))
    counts = [
        patch_count(n, p, s, edges) for n, p, s in zip(x.shape[2:], patch, stride, strict=True)
    ]
    short = [
        (n - 1) * s + p - size
        for n, s, p, size in zip(counts, stride, patch, x.shape[2:], strict=True)
    ]
    if short[0] > 0:
        x = torch.cat([x, x[:, :, -1:].expand(-1, -1, short[0], -1, -1)], 2)
    x = F.pad(x, (0, max(short[2], 0), 0, max(short[1], 0)))
    return project(x, weight, inputs.get("bias"), stride), tuple(counts)


def _convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: list[int]
) -> torch.Tensor:
    if weight.shape[2] == 1 and x.shape[2] == 1:
        y = F.conv2d(x[:, :, 0], weight[:, :, 0], bias, stride=stride[1:])
    else:
        y = F.conv3d(x, weight, bias, stride=stride)
    return y.flatten(2).transpose(1, 2)


def _linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: list[int]
) -> torch.Tensor:
    p = weight.shape[2:]
    rows = x.unfold(2, p[0], stride[0]).unfold(3, p[1], stride[1]).unfold(4, p[2], stride[2])
    return F.linear(
        rows.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4).flatten(1, 3), weight.flatten(1), bias
    )


def _of_rows(rows: torch.Tensor, inputs: Inputs, project: Project) -> torch.Tensor:
    weight = inputs["weight"]
    if project is _convolution and weight.dim() == 5:  # as Qwen2-VL runs its rows
        x = rows.view(-1, *weight.shape[1:])
        return F.conv3d(x, weight, inputs.get("bias"), stride=weight.shape[2:]).flatten(1)
    return F.linear(rows, weight.flatten(1), inputs.get("bias"))


def _finish(tokens: torch.Tensor, grid: Any, inputs: Inputs) -> torch.Tensor:
    """Merge order, prefix tokens, positions."""
    m, last, prefix = (
        inputs.get("merge_size", 1),
        inputs.get("prefix") == "last",
        inputs.get("prefix_tokens"),
    )
    B, N, D = tokens.shape
    if m > 1 and "grid_thw" not in inputs:
        tokens = merge_order(tokens.view(B, *grid, D), m)
    if prefix is not None:
        own = prefix.expand(B, -1, -1)
        tokens = torch.cat([tokens, own] if last else [own, tokens], 1)
    tables = inputs.get("position_embed", inputs.get("position_table"))
    if tables is None:
        return tokens
    mode = inputs.get("position_mode", "bilinear") if "position_table" in inputs else "fixed"
    layout = Layout(
        [],
        [],
        "exact",
        m,
        last,
        mode,
        inputs.get("align_corners", False),
        inputs.get("antialias", False),
    )
    position = position_rows(
        tables if isinstance(tables, list) else [tables], Source(None, grid, 1), layout
    )
    gap = tokens.shape[1] - position.shape[0]
    if gap:
        split = position.shape[0] if last else position.shape[0] - N
        position = torch.cat([position[:split], position.new_zeros(gap, D), position[split:]])
    return tokens + position
