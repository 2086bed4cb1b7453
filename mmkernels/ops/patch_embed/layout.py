# SPDX-License-Identifier: Apache-2.0
"""How images fall into patches: grids, counts and the errors of what does not fall into them.

``images`` holds tensors of one of these shapes, all of one kind:
``[B,C,T,H,W]`` a batch of clips; ``[C,T,H,W]`` a clip; ``[C,H,W]`` a still image; ``[n,K]`` patches
already cut, of the images ``grid_thw`` tells (or, without it, ``sizes[1]`` images of ``sizes[0]``
patches each); ``[values]`` flat, with T (0: a still image), H and W of each image in ``sizes``.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mmkernels import checks

OP = "patch_embed"


@dataclass(frozen=True)
class Layout:
    """All that is not a tensor: how patches are cut, ordered and positioned. As the op's arguments."""

    stride: list[int]  # of the patches: t, h, w
    sizes: list[int]
    edge: str  # what happens to a rest of pixels: "exact" (an error), "pad" or "crop"
    merge_size: int
    prefix_last: bool
    position_mode: str  # none, fixed, nearest, bilinear, bicubic, factorised
    align_corners: bool
    antialias: bool

    def arguments(self) -> tuple[list[int], list[int], str, int, bool, str, bool, bool]:
        """By name: Dynamo of torch 2.11 cannot trace ``vars``."""
        return (
            self.stride, self.sizes, self.edge, self.merge_size, self.prefix_last, self.position_mode,
            self.align_corners, self.antialias,
        )  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A run of ``count`` images of the same grid: its pixels (None for rows) and grid."""

    pixels: torch.Tensor | None  # [B,C,T,H,W]
    grid: tuple[int, int, int]
    count: int

    @property
    def patches(self) -> int:
        return math.prod(self.grid)


def patch_count(size: int, patch: int, stride: int, edge: str) -> int:
    """Patches along an axis of ``size`` pixels; -1 if the axis does not divide and ``edge`` is exact."""
    if size == 0:
        return 0
    if edge == "pad":
        return max(0, -(-(size - patch) // stride)) + 1
    if edge == "exact" and (size < patch or (size - patch) % stride):
        return -1
    return max(0, (size - patch) // stride + 1)


def sources(
    images: Sequence[torch.Tensor],
    patch: Sequence[int],
    layout: Layout,
    grid_thw: torch.Tensor | None,
) -> list[Source]:
    """The images of a call and their grids; raises where a list holds one that cannot be cut."""
    if images and images[0].dim() == 2:
        return list(_row_sources(images[0], layout, grid_thw))
    if images and images[0].dim() == 1:
        images = _unflatten(images[0], patch[0], layout.sizes)
    found = []
    for i, image in enumerate(images):
        clips = image[None] if image.dim() == 4 else image
        clips = clips[None, :, None] if clips.dim() == 3 else clips
        if clips.shape[1] != patch[0]:
            expected = f"of the {patch[0]} channels of weight"
            checks.fail(OP, f"images[{i}]", list(image.shape), expected)
        found.append(Source(clips, _grid(clips, i, image, patch, layout), clips.shape[0]))
    return found


def _row_sources(
    rows: torch.Tensor, layout: Layout, grid_thw: torch.Tensor | None
) -> Iterator[Source]:
    if grid_thw is None:
        yield Source(None, (1, 1, layout.sizes[0]), layout.sizes[1])
        return
    grids = [tuple(g) for g in grid_thw.tolist()]
    m = layout.merge_size
    for i, (t, h, w) in enumerate(grids):
        if t < 1 or h < 1 or w < 1 or h % m or w % m:
            expected = f"at least 1 everywhere, h and w multiples of merge_size {m}"
            checks.fail(OP, "grid_thw", f"{[t, h, w]} in row {i}", expected)
    total = sum(math.prod(g) for g in grids)
    if total != rows.shape[0]:
        given = f"grids of the {rows.shape[0]} rows of patches given"
        checks.fail(OP, "grid_thw", f"{total} patches", given)
    for t, h, w in grids:
        yield Source(None, (t, h, w), 1)


def _unflatten(flat: torch.Tensor, C: int, sizes: Sequence[int]) -> list[torch.Tensor]:
    found, offset = [], 0
    for i in range(0, len(sizes), 3):
        T, H, W = sizes[i : i + 3]
        values = C * max(T, 1) * H * W
        if H < 1 or W < 1 or T < 0 or values > flat.shape[0] - offset:
            within = f"positive and within the {flat.shape[0]} values of the buffer"
            got = f"{max(T, 1)}×{H}×{W} after {offset} values"
            checks.fail(OP, f"image_sizes[{i // 3}]", got, within)
        piece = flat[offset : offset + values]
        found.append(piece.view(C, T, H, W) if T else piece.view(C, H, W))
        offset += values
    if offset != flat.shape[0]:
        checks.fail(OP, "image_sizes", offset, f"of all {flat.shape[0]} values of the buffer")
    return found


def _grid(
    clips: torch.Tensor, index: int, image: torch.Tensor, patch: Sequence[int], layout: Layout
) -> tuple[int, int, int]:
    T, H, W = clips.shape[2:]
    # One frame under a temporal weight repeats, whatever ``edge`` says: that is what it means.
    edges = ["pad" if T == 1 else layout.edge, layout.edge, layout.edge]
    t, h, w = map(patch_count, (T, H, W), patch[1:], layout.stride, edges)
    name = "pixel_values" if image.dim() == 5 else f"images[{index}]"
    if t < 0:
        checks.fail(OP, name, f"{T} frames", f"{_fitting(patch[1], layout.stride[0])} frames{_OR}")
    if h < 0 or w < 0:
        high, wide = (_fitting(patch[i], layout.stride[i - 1]) for i in (2, 3))
        checks.fail(OP, name, f"{H}×{W} pixels", f"{high} × {wide} pixels{_OR}")
    if image.dim() != 5 and t * h * w == 0:
        checks.fail(OP, name, list(image.shape), "of at least one patch")
    m = layout.merge_size
    if h % m or w % m:
        checks.fail(OP, name, f"{h}×{w} patches", f"a multiple of merge_size {m} patches a side")
    return t, h, w


_OR = " (or choose pad or crop)"


def _fitting(patch: int, stride: int) -> str:
    return f"a multiple of {patch}" if patch == stride else f"{patch} and a multiple of {stride}"


def check_positions(shape: Sequence[int], source: Source, layout: Layout, prefix_rows: int) -> None:
    """The position tables, whose sizes (but D) are ``shape``, reach over the image's grid."""
    _, h, w = source.grid
    N = source.patches
    if layout.position_mode == "fixed" and not 0 <= shape[0] - N <= prefix_rows:
        rows = f"{N} (patches) to {N + prefix_rows} rows (with {prefix_rows} prefix tokens)"
        rows = rows if prefix_rows else f"{N} rows (patches)"
        checks.fail(OP, "position_embed", f"{shape[0]} rows", rows)
    if layout.position_mode == "factorised" and (h > shape[0] or w > shape[1]):
        checks.fail(
            OP, "position_table", f"{shape[0]} rows and {shape[1]} columns", f"at least {h} and {w}"
        )


def grids(
    weight: torch.Tensor, images: list[torch.Tensor], prefix_rows: int, *layout: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(cu_seqlens, grid_thw)`` of a packed call: token offsets [n+1] int32 and grids [n,3] int64."""
    found = sources(images, weight.shape[1:], Layout(*layout), None)  # type: ignore[arg-type]
    each = [s.grid for s in found for _ in range(s.count)]
    grid = torch.tensor(each, dtype=torch.int64).view(-1, 3)
    offsets = F.pad((grid.prod(1) + prefix_rows).cumsum(0), (1, 0)).int()
    return offsets.to(weight.device), grid.to(weight.device)
