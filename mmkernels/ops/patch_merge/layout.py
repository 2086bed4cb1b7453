# SPDX-License-Identifier: Apache-2.0
"""Which tokens become neighbours: an index of rows for every layout of tokens."""

from collections.abc import Sequence

import torch

from mmkernels import checks

OP = "patch_merge"
Grid = torch.Tensor | Sequence[Sequence[int]]


def dense_index(
    B: int, H: int, W: int, merge: tuple[int, int], transposed: bool, device: torch.device
) -> torch.Tensor:
    """``[B·M, J]`` of a raster ``[B, H, W]``; −1 beyond its edge."""
    h, w = -(-H // merge[0]), -(-W // merge[1])
    if H % merge[0] == 0 and W % merge[1] == 0:
        places = torch.arange(B * H * W, device=device).view(B, h, merge[0], w, merge[1])
        order = (0, 3, 1, 2, 4) if transposed else (0, 1, 3, 2, 4)
        return places.permute(order).reshape(B * h * w, merge[0] * merge[1])
    y = torch.arange(h * merge[0], device=device).view(h, 1, merge[0], 1)
    x = torch.arange(w * merge[1], device=device).view(1, w, 1, merge[1])
    index = torch.where((y < H) & (x < W), y * W + x, -1)  # [h, w, m_h, m_w]
    index = (index.transpose(0, 1) if transposed else index).reshape(h * w, -1)
    first = torch.arange(B, device=device).view(B, 1, 1) * (H * W)
    return torch.where(index < 0, -1, index + first).flatten(0, 1)


def packed_index(
    grid: torch.Tensor, merge: tuple[int, int], transposed: bool, merged: int
) -> torch.Tensor:
    """``[merged, J]`` of images one after the other, each ``t·h·w`` tokens in raster order; no sync."""
    m_h, m_w = merge
    t, h, w = grid.unbind(1)
    high, wide = -(-h // m_h), -(-w // m_w)
    count = t * high * wide
    ends = count.cumsum(0)
    at = torch.arange(merged, device=grid.device)
    image = torch.searchsorted(ends, at, right=True).clamp(max=max(len(grid) - 1, 0))
    inside = at - (ends - count)[image]
    high, wide, h, w = high[image], wide[image], h[image], w[image]
    step, rest = inside // (high * wide), inside % (high * wide)
    Y, X = (rest % high, rest // high) if transposed else (rest // wide, rest % wide)
    y = (Y * m_h)[:, None] + torch.arange(m_h, device=grid.device).repeat_interleave(m_w)
    x = (X * m_w)[:, None] + torch.arange(m_w, device=grid.device).repeat(m_h)
    tokens = (t * grid[:, 1] * grid[:, 2]).cumsum(0) - t * grid[:, 1] * grid[:, 2]
    row = tokens[image, None] + step[:, None] * (h * w)[:, None] + y * w[:, None] + x
    return torch.where((y < h[:, None]) & (x < w[:, None]), row, -1)


def checked_grid(grid_thw: Grid, tokens: int, merge: tuple[int, int], pad: bool) -> torch.Tensor:
    """``[images, 3]`` int64; its numbers are checked where reading them waits for nobody."""
    grid = checks.grid(OP, "grid_thw", grid_thw)
    if grid.numel() == 0:
        grid = grid.view(0, 3).long()
    if grid.dim() != 2 or grid.shape[1] != 3 or grid.dtype not in (torch.int32, torch.int64):
        got = f"{grid.dtype} {list(grid.shape)}"
        checks.fail(OP, "grid_thw", got, "int32 or int64 [images, 3]")
    grid = grid.long()
    if grid.device.type != "cpu":
        return grid
    bad = (grid < 1).any(1)
    if not pad:
        bad |= (grid[:, 1] % merge[0] != 0) | (grid[:, 2] % merge[1] != 0)
    for i in bad.nonzero()[:1, 0].tolist():
        expected = "at least 1 everywhere"
        if not pad:
            expected += f", h and w multiples of {merge[0]} and {merge[1]} (or choose pad)"
        checks.fail(OP, "grid_thw", f"{grid[i].tolist()} in row {i}", expected)
    if (total := int(grid.prod(1).sum())) != tokens:
        checks.fail(OP, "grid_thw", f"{total} tokens", f"grids of the {tokens} tokens given")
    return grid


def merged_count(grid: torch.Tensor, tokens: int, merge: tuple[int, int], pad: bool) -> int:
    """Merged tokens of all images. With ``pad`` and a grid on a GPU, reading it waits for the GPU."""
    if not pad:
        return tokens // (merge[0] * merge[1])
    t, h, w = grid.unbind(1)
    return int((t * -(-h // merge[0]) * -(-w // merge[1])).sum())
