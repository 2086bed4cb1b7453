# SPDX-License-Identifier: Apache-2.0
"""Patch embedding on CUDA: pixels are gathered, normalised and multiplied tile by tile.

Neither a float image nor a patch matrix exists. Dimensions: B images, C channels, T×H×W frames and
pixels, P a patch and S its stride, N patches an image, K = C·P_t·P_h·P_w values a patch, D width, R prefix
tokens an image; M rows of a product: tokens of a batch (forward), patches of a batch (backward).

What rounds where: pixels are normalised in fp32 with scale and shift as hi + lo pairs, and rounded once
to the weight's dtype; bias and position (resampled in fp32) are added in fp32 and the sum rounds once.
fp32 products are IEEE. No atomics: the same bits in every run. A dense batch is one launch.

The numbers of packed images are found from their shapes on the host, one row of ``table`` each, and
copied once, from pinned memory; nothing is read back. Grids of rows stay on the device.
"""

import functools
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton
import triton.language as tl

from mmkernels.ops.patch_embed import fold, reference
from mmkernels.ops.patch_embed import triton_kernels as kernels
from mmkernels.ops.patch_embed.layout import Layout, Source, check_positions, sources

_SMS = 132  # of an H200; a constant, so that results depend on shapes only
_CHANNELS = 4  # up to here an affine travels as numbers, not as a table
_captured: list[torch.Tensor] = []  # host tables that CUDA graphs read again at every replay

# Columns of the table: pointer, strides c t h w, frames, height, width, grid t h w, first token, first
# patch, still, image, unused.
_WIDTH, _GRID, _FIRST_TOKEN = 16, slice(8, 11), 11


def forward_config(M: int, D: int, scattered: bool, dtype: torch.dtype) -> dict[str, int]:
    """Tile of the forward kernel: the largest that still gives every multiprocessor one.

    ``scattered``: each value has a mask, an affine or an odd place of its own. That takes registers.
    """
    if dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_D": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}
    # Wide in D: a pixel is converted once for each tile of D. 128×256 spills.
    tiles = triton.cdiv(M, 64) * triton.cdiv(D, 256)
    BLOCK_D, warps = (256, 8) if tiles >= _SMS else (64, 4)
    BLOCK_K, stages = (32, 4) if scattered else (64, 3)
    return {
        "BLOCK_M": 64, "BLOCK_D": BLOCK_D, "BLOCK_K": BLOCK_K, "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


def grad_weight_config(K: int, padded: bool, dtype: torch.dtype) -> dict[str, int]:
    """Tile of the weight gradient, narrower in K where each value has a mask."""
    if dtype == torch.float32:
        BLOCK_K = 32 if padded else 64
        return {"BLOCK_M": 32, "BLOCK_D": 64, "BLOCK_K": BLOCK_K, "num_warps": 8, "num_stages": 2}
    BLOCK_K = 128 if K > 64 else 64
    return {"BLOCK_M": 64, "BLOCK_D": 128, "BLOCK_K": BLOCK_K, "num_warps": 8, "num_stages": 3}


def grad_patches_config(lines: bool, dtype: torch.dtype) -> dict[str, int]:
    """Tile of the pixel gradient, smaller where pixels are stored one by one and not in ``lines``."""
    if dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_D": 32, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
    BLOCK_M = 128 if lines else 64
    return {"BLOCK_M": BLOCK_M, "BLOCK_D": 64, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3}


@dataclass(frozen=True)
class _Images:
    """How images reach the kernels (``KIND``, see ``triton_kernels.py``)."""

    kind: str
    pixels: (
        torch.Tensor
    )  # [B,C,T,H,W] if dense; rows as [1,K,1,1,n]; of packed images the dtype counts
    tokens: int
    patches: int  # an image, if dense
    count: int  # images
    grid: tuple[int, int, int] = (1, 1, 1)
    table: torch.Tensor | None = None
    host: torch.Tensor | None = None  # the table where the host knows it
    merge: int = 1
    still: bool = True  # all grids are of one frame
    pad_time: bool = False
    pad_space: bool = False
    unit: bool = False
    align: int = 1
    tiles: dict[int, torch.Tensor] = field(default_factory=dict)  # by BLOCK_M, if packed

    def rows(self, R: int, block: int, patches: bool = False) -> dict[str, Any]:
        """The arguments of ``_rows``: of all tokens, or of all patches of a dense batch."""
        dense = self.kind == "dense"
        return {
            "table": self.table, "tiles": self.tiles.get(block), "KIND": self.kind, "R": R,
            "images": self.count, "steps": 0 if dense else self.count.bit_length(),
            "M": self.count * self.patches if patches and dense else self.tokens,
            "N": self.patches, "grid_h": self.grid[1], "grid_w": self.grid[2],
        }  # fmt: skip

    def repeats(self, weight: torch.Tensor) -> bool:
        """Whether every image is one frame under a weight of several."""
        if weight.shape[2] == 1 or self.kind == "ragged":
            return False
        frames = self.host[:, 5] if self.host is not None else torch.tensor(self.pixels.shape[2])
        return bool((frames == 1).all())

    def flat(self, R: int) -> "_Images":
        """Rows without prefix tokens are their own tokens: no product needs to know whose they are."""
        if self.kind != "ragged" or R:
            return self
        n = self.pixels.shape[4]
        return replace(self, kind="dense", patches=n, count=1, grid=(1, 1, n), merge=1, still=True)

    def tile_count(self, M: int, block: int) -> int:
        """Tiles of M rows; packed images end theirs on their own."""
        return len(self.tiles[block]) if self.kind == "packed" else triton.cdiv(M, block)

    def cut(self, weight: torch.Tensor, layout: Layout) -> dict[str, Any]:
        """How pixels lie in memory and fall into patches."""
        names = ("stride_b", "stride_c", "stride_t", "stride_h", "stride_w")
        strides = self.pixels.stride() if self.kind != "packed" else (0,) * 5
        shape = self.pixels.shape[2:] if self.kind != "packed" else (0,) * 3
        return {
            **dict(zip(names, strides, strict=True)), **dict(zip("THW", shape, strict=True)),
            "count": self.pixels.shape[4] if self.kind == "ragged" else 0,
            **_patch(weight, layout), "MERGE": self.merge, "STILL": self.still,
            "PREFIX_LAST": layout.prefix_last, "PAD_TIME": self.pad_time,
            "PAD_SPACE": self.pad_space, "UNIT": self.unit, "ALIGN": self.align,
        }  # fmt: skip


def _patch(weight: torch.Tensor, layout: Layout) -> dict[str, int]:
    names = ("C", "P_t", "P_h", "P_w", "S_t", "S_h", "S_w")
    return dict(zip(names, (*weight.shape[1:], *layout.stride), strict=True))


def _images(
    images: Sequence[torch.Tensor],
    weight: torch.Tensor,
    grid_thw: torch.Tensor | None,
    R: int,
    layout: Layout,
    blocks: Iterable[int],
) -> _Images:
    """Finds the kind of ``images``; tiles of packed ones for each BLOCK_M of ``blocks``."""
    if images[0].dim() == 2:
        return _rows(images[0], grid_thw, R, layout)
    if images[0].dim() == 5 and len(images) == 1:
        return _dense(sources(images, weight.shape[1:], layout, None)[0], weight, R, layout)
    host = _host_table(images, weight, R, layout)
    return _packed(host, images[0], weight, R, layout, blocks)


def _dense(source: Source, weight: torch.Tensor, R: int, layout: Layout) -> _Images:
    assert source.pixels is not None
    B, N = source.count, source.patches
    # In steps of the patch from the first pixel to the last: does any go past the image?
    past = [
        (n - 1) * step + patch > size and N > 0
        for n, step, patch, size in zip(
            source.grid, layout.stride, weight.shape[2:], source.pixels.shape[2:], strict=True
        )
    ]
    return _Images(
        "dense", source.pixels, B * (R + N), N, B, source.grid, merge=layout.merge_size,
        still=source.grid[0] <= 1, pad_time=past[0], pad_space=past[1] or past[2],
    )  # fmt: skip


def _rows(rows: torch.Tensor, grid_thw: torch.Tensor | None, R: int, layout: Layout) -> _Images:
    """Rows are images of one line of pixels with K channels."""
    if grid_thw is None:
        N, count = layout.sizes
        pixels = rows.unflatten(0, (count, N)).transpose(1, 2)[:, :, None, None]
        return _Images("dense", pixels, count * (R + N), N, count, (1, 1, N))
    n, count = rows.shape[0], grid_thw.shape[0]
    pixels = rows.t()[None, :, None, None]
    if R == 0 and layout.position_mode == "none":  # nobody asks whose row it is
        return _Images("dense", pixels, n, n, 1, (1, 1, n))
    table = torch.zeros(max(count, 1), _WIDTH, dtype=torch.int64, device=rows.device)
    grid_thw = grid_thw.to(rows.device, non_blocking=True).contiguous()
    kernels._ragged_table_kernel[(1,)](grid_thw, table, images=count, R=R, count=n, BLOCK=128)
    return _Images(
        "ragged", pixels, n + count * R, 0, count, table=table, merge=layout.merge_size,
        still=False,
    )  # fmt: skip


def _host_table(
    images: Sequence[torch.Tensor], weight: torch.Tensor, R: int, layout: Layout
) -> torch.Tensor:
    """``[images, 16]`` int64 on the CPU, by the native library where there is one."""
    if hasattr(torch.ops.mmkernels, "patch_embed_table") and weight.device.type != "meta":
        return torch.ops.mmkernels.patch_embed_table(weight, images, R, *layout.arguments())
    found = sources(images, weight.shape[1:], layout, None)
    # A batch among several is as many images.
    each = [(s.pixels[b], s.grid) for s in found for b in range(s.count) if s.pixels is not None]
    host = torch.tensor(
        [
            [x.data_ptr(), *x.stride(), *x.shape[1:], *grid, 0, 0, 0, 0, 0] for x, grid in each
        ],
        dtype=torch.int64,
    ).view(-1, _WIDTH)  # fmt: skip
    N = host[:, _GRID].prod(1)
    host[:, 12] = N.cumsum(0) - N
    host[:, 11] = host[:, 12] + torch.arange(len(host)) * R
    host[:, 14] = torch.arange(len(host))
    return host


def _packed(
    host: torch.Tensor, image: torch.Tensor, weight: torch.Tensor, R: int, layout: Layout,
    blocks: Iterable[int],
) -> _Images:  # fmt: skip
    table, tiles = _upload(host, R, sorted(set(blocks)), weight.device)
    steps = torch.tensor(layout.stride)
    past = ((host[:, _GRID] - 1) * steps + torch.tensor(weight.shape[2:]) > host[:, 5:8]).any(0)
    unit = bool((host[:, 4] == 1).all())
    aligned = (host[:, 0] % 16 == 0) & (host[:, 1:4] % 16 == 0).all(1)
    return _Images(
        "packed", image, int(host[:, _GRID].prod(1).sum()) + len(host) * R, 0, len(host),
        table=table, host=host, merge=layout.merge_size,
        still=bool((host[:, 8] <= 1).all()), pad_time=bool(past[0]), pad_space=bool(past[1:].any()),
        unit=unit, align=16 if bool(aligned.all()) else 1, tiles=tiles,
    )  # fmt: skip


def _upload(
    host: torch.Tensor, R: int, blocks: list[int], device: torch.device
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """The table and, for each BLOCK_M, image and first place of every tile, in one copy."""
    tokens = host[:, _GRID].prod(1) + R
    parts = [host]
    for block in blocks:
        count = (tokens + block - 1) // block
        image = torch.repeat_interleave(torch.arange(len(host)), count)
        first = (count.cumsum(0) - count)[image]
        parts.append(torch.stack([image, (torch.arange(len(image)) - first) * block], 1))
    pinned = torch.empty(
        sum(p.numel() for p in parts), dtype=torch.int64, pin_memory=device.type == "cuda"
    )
    torch.cat([p.flatten() for p in parts], out=pinned)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured.append(pinned)
    pieces = pinned.to(device, non_blocking=True).split([p.numel() for p in parts])
    tiles = {b: p.view(-1, 2) for b, p in zip(blocks, pieces[1:], strict=True)}
    return pieces[0].view(-1, _WIDTH), tiles


def _affine(
    scale: list[float] | None, shift: list[float] | None, device: torch.device
) -> dict[str, Any]:
    """Scale and shift of each channel as ``scale_hi, scale_lo, shift_hi, shift_lo``, exact in fp32."""
    if scale is None or shift is None:
        return {"affine": (0.0,), "AFFINE": "none"}
    if len(scale) <= _CHANNELS:
        return {"affine": affine_pairs(scale, shift), "AFFINE": "numbers"}
    if scale.count(scale[0]) == len(scale) and shift.count(shift[0]) == len(shift):
        return {"affine": affine_pairs(scale[:1], shift[:1]), "AFFINE": "same"}
    host = _affine_table(tuple(scale), tuple(shift), device.type == "cuda")
    return {"affine": host.to(device, non_blocking=True), "AFFINE": "table"}


@functools.lru_cache(maxsize=32)
def _affine_table(scale: tuple[float, ...], shift: tuple[float, ...], pinned: bool) -> torch.Tensor:
    """``[channels, 4]``, kept: rows have hundreds of channels and few processors."""
    both = torch.tensor([scale, shift], dtype=torch.float64)
    hi = both.float()
    pairs = torch.stack(
        [hi, (both - hi.double()).float()], 2
    )  # [scale or shift, channel, hi or lo]
    host = pairs.transpose(0, 1).reshape(-1, 4).contiguous()
    return host.pin_memory() if pinned else host


def affine_pairs(scale: list[float], shift: list[float]) -> tuple[float, ...]:
    """``scale_hi, scale_lo, shift_hi, shift_lo`` of each channel, all exact in fp32."""
    return tuple(
        part
        for pair in zip(scale, shift, strict=True)
        for value in pair
        for part in (_fp32(value), _fp32(value - _fp32(value)))
    )


def _fp32(value: float) -> float:
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


def _check_positions(shape: Sequence[int], images: _Images, layout: Layout, R: int) -> None:
    """As the reference; grids that only the device knows are met by masks."""
    if layout.position_mode not in ("fixed", "factorised") or images.kind == "ragged":
        return
    if images.host is None:
        check_positions(shape, Source(None, images.grid, images.count), layout, R)
        return
    N, h, w = images.host[:, _GRID].prod(1), images.host[:, 9], images.host[:, 10]
    if layout.position_mode == "fixed":
        wrong = (N > shape[0]) | (shape[0] - N > R)
    else:
        wrong = (h > shape[0]) | (w > shape[1])
    for image in wrong.nonzero()[:1, 0].tolist():
        grid = images.host[image, _GRID].tolist()
        check_positions(shape, Source(None, tuple(grid), 1), layout, R)


def patch_embed(
    images: list[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    positions: list[torch.Tensor],
    prefix_tokens: torch.Tensor | None,
    grid_thw: torch.Tensor | None,
    pixel_scale: list[float] | None,
    pixel_shift: list[float] | None,
    *layout_arguments: Any,
) -> torch.Tensor:
    """As ``reference.patch_embed``, in one launch (two with ``grid_thw``; a few more to fold a weight)."""
    layout = Layout(*layout_arguments)
    D, R = weight.shape[0], 0 if prefix_tokens is None else prefix_tokens.shape[0]
    if not images:
        return weight.new_empty(0, D)
    if images[0].dtype == torch.float64:  # fp32 would not hold what normalising leaves of it
        return reference.patch_embed(
            images, weight, bias, positions, prefix_tokens, grid_thw, pixel_scale, pixel_shift,
            *layout_arguments,
        )  # fmt: skip
    block = forward_config(0, D, False, weight.dtype)["BLOCK_M"]
    found = _images(images, weight, grid_thw, R, layout, [block])
    shape = [n for p in positions for n in p.shape[:-1]]
    _check_positions(shape, found, layout, R)
    out = weight.new_empty(found.tokens, D)
    if out.numel() == 0:
        return out
    pixels, padded = images[0].dtype, found.pad_space
    if found.repeats(weight) and fold.allowed(pixels, weight.dtype, pixel_scale, padded):
        found = replace(found, pad_time=False)
        weight, bias, pixel_scale, pixel_shift = fold.folded(weight, bias, pixel_scale, pixel_shift)
    bias, prefix_tokens, position, columns = (
        None if t is None else t.contiguous()
        for t in (bias, prefix_tokens, *positions, *[None] * (2 - len(positions)))
    )
    affine = _affine(pixel_scale, pixel_shift, weight.device)
    scattered = found.pad_time or found.pad_space or affine["AFFINE"] == "table"
    scattered |= any(s < p for s, p in zip(layout.stride, weight.shape[2:], strict=True))
    config = forward_config(found.tokens, D, scattered, weight.dtype)
    grid = (found.tile_count(found.tokens, block) * triton.cdiv(D, config["BLOCK_D"]),)
    kernels._patch_embed_kernel[grid](
        found.pixels, weight.contiguous(), bias, position, columns, prefix_tokens, out, D=D,
        rows=shape[0] if shape else 0, columns=shape[-1] if shape else 0,
        POSITION=layout.position_mode, ALIGN_CORNERS=layout.align_corners,
        ANTIALIAS=layout.antialias, HAS_BIAS=bias is not None, HAS_PREFIX=R > 0,
        **found.rows(R, block), **found.cut(weight, layout), **affine, **config,
    )  # fmt: skip
    return out


def patch_embed_backward(
    grad: torch.Tensor,
    images: list[torch.Tensor],
    weight: torch.Tensor,
    grid_thw: torch.Tensor | None,
    pixel_scale: list[float] | None,
    pixel_shift: list[float] | None,
    prefix_rows: int,
    position_shape: list[int],
    needs: list[bool],
    *layout_arguments: Any,
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """As ``reference.patch_embed_backward``."""
    layout = Layout(*layout_arguments)
    if not images or images[0].dtype == torch.float64:
        return reference.patch_embed_backward(
            grad, images, weight, grid_thw, pixel_scale, pixel_shift,
            prefix_rows, position_shape, needs, *layout_arguments,
        )  # fmt: skip
    grad, R = grad.contiguous(), prefix_rows
    affine = _affine(pixel_scale, pixel_shift, weight.device)
    blocks = {
        _SUM_ROWS, grad_weight_config(0, False, weight.dtype)["BLOCK_M"],
        grad_patches_config(False, weight.dtype)["BLOCK_M"],
    }  # fmt: skip
    found = _images(images, weight, grid_thw, R, layout, blocks)
    empty = weight.new_empty(0)
    d_images, d_weight = [i.new_empty(0) for i in images], empty
    of_pixels, own, own_layout = found, weight, layout
    if folds := found.repeats(weight):
        own_layout = replace(layout, stride=[1, *layout.stride[1:]])
        of_pixels, own = replace(found, pad_time=False), fold.summed(weight)
    if needs[0]:
        g, w = grad, own
        if folds and images[0].dtype != weight.dtype:
            # Gradients of pixels finer than the weight would show that its sum was rounded.
            g, w = grad.float(), fold.summed(weight.float())
        d_images = _grad_images(g, images, of_pixels.flat(R), w, affine, R, own_layout)
    if needs[1]:
        d_weight = _grad_weight(grad, of_pixels.flat(R), own, affine, R, own_layout)
        d_weight = d_weight.expand_as(weight).contiguous()
    if found.kind == "dense":
        rest = _grad_dense(grad, found, weight, position_shape, needs, R, layout)
    else:
        rest = _grad_packed(grad, found, weight, position_shape, needs, R, layout)
    return d_images, d_weight, *rest


_Rest = tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]  # of bias, positions, prefix tokens


def _grad_dense(
    grad: torch.Tensor, images: _Images, weight: torch.Tensor, shape: list[int],
    needs: list[bool], R: int, layout: Layout,
) -> _Rest:  # fmt: skip
    """``grad`` is read once: images of one grid share all their rows."""
    empty, D, N = weight.new_empty(0), weight.shape[0], images.patches
    if not any(needs[2:]):
        return empty, [], empty
    count, grid = images.count, images.grid
    summed = grad.view(count, R + N, D).sum(0, dtype=torch.float32)
    first = 0 if layout.prefix_last else R
    prefix = summed[N:] if layout.prefix_last else summed[:R]
    patches = summed[first : first + N]
    d_bias = patches.sum(0).to(weight.dtype) if needs[2] else empty
    d_prefix = prefix.to(weight.dtype, copy=True) if needs[4] else empty
    tables: list[torch.Tensor] = []
    if needs[3] and layout.position_mode == "fixed":
        (t, h, w), m = grid, images.merge
        raster = patches.view(t, h // m, w // m, m, m, D).transpose(2, 3).reshape(N, D)
        pieces = [prefix[: shape[0] - N], raster]
        tables = [torch.cat(pieces[::-1] if layout.prefix_last else pieces).to(weight.dtype)]
    elif needs[3]:
        tables = _grad_tables(summed, images, weight, shape, R, layout)
    return d_bias, tables, d_prefix


def _grad_packed(
    grad: torch.Tensor, images: _Images, weight: torch.Tensor, shape: list[int],
    needs: list[bool], R: int, layout: Layout,
) -> _Rest:  # fmt: skip
    empty, D = weight.new_empty(0), weight.shape[0]
    d_bias, d_prefix, tables = empty, empty, []
    if needs[2]:
        d_bias = _sum_patches(grad, images, R, layout).to(weight.dtype)
    if needs[3]:
        tables = _grad_tables(grad, images, weight, shape, R, layout)
    if needs[4]:
        assert images.table is not None
        table = images.table[: images.count]
        first = table[:, _FIRST_TOKEN]
        if layout.prefix_last:
            first = first + table[:, _GRID].prod(1)
        token = (first[:, None] + torch.arange(R, device=grad.device)).flatten()
        token = token.clamp(0, max(len(grad) - 1, 0))  # whatever a grid on the device says
        of_prefix = grad[token] if len(grad) else grad.new_empty(len(token), D)
        d_prefix = of_prefix.view(-1, R, D).sum(0, dtype=torch.float32).to(weight.dtype)
    return d_bias, tables, d_prefix


_SUM_ROWS = 64


def _sum_patches(grad: torch.Tensor, images: _Images, R: int, layout: Layout) -> torch.Tensor:
    if R == 0:
        return grad.sum(0, dtype=torch.float32)
    D, block = grad.shape[1], 128
    tiles = images.tile_count(images.tokens, _SUM_ROWS)
    partial = torch.empty(tiles, D, dtype=torch.float32, device=grad.device)
    if partial.numel():
        kernels._sum_patches_kernel[(tiles * triton.cdiv(D, block),)](
            grad, partial, D=D, PREFIX_LAST=layout.prefix_last, BLOCK_M=_SUM_ROWS, BLOCK_D=block,
            **images.rows(R, _SUM_ROWS),
        )  # fmt: skip
    return partial.sum(0)


def _grad_tables(
    grad: torch.Tensor, images: _Images, weight: torch.Tensor, shape: list[int], R: int,
    layout: Layout,
) -> list[torch.Tensor]:  # fmt: skip
    """Each row of a table looks for its places in every image: no atomics and nothing to sort."""
    D, mode = weight.shape[0], layout.position_mode
    if mode == "none":
        return []
    common = {"R": R, "D": D, "MERGE": images.merge, "PREFIX_LAST": layout.prefix_last}
    if mode == "fixed":
        out = weight.new_empty(*shape, D)
        if out.numel():
            block = 128
            kernels._grad_fixed_kernel[(shape[0] * triton.cdiv(D, block),)](
                grad, out, images.table, images=images.count, tokens=len(grad), rows=shape[0],
                BLOCK_Q=16, BLOCK_D=block, **common,
            )  # fmt: skip
        return [out]
    if mode == "factorised":
        sizes = [("rows", shape[0], 1), ("columns", 1, shape[1])]
        shapes = [(shape[0], D), (shape[1], D)]
    else:
        sizes, shapes = [(mode, shape[0], shape[1])], [(*shape, D)]
    return [
        _grad_table(grad, images, *size, layout, common).to(weight.dtype).view(s)
        for size, s in zip(sizes, shapes, strict=True)
    ]


def _grad_table(
    grad: torch.Tensor, images: _Images, mode: str, rows: int, columns: int, layout: Layout,
    common: dict[str, Any],
) -> torch.Tensor:  # fmt: skip
    D, block = common["D"], 128
    count = 1 if images.kind == "dense" else images.count
    programs = rows * columns * triton.cdiv(D, block)
    splits = max(1, min(count, triton.cdiv(4 * _SMS, max(programs, 1))))
    images_per_split = max(1, triton.cdiv(count, splits))
    splits = max(1, triton.cdiv(count, images_per_split))
    partial = torch.empty(splits, rows * columns, D, dtype=torch.float32, device=grad.device)
    if partial.numel():
        kernels._grad_table_kernel[(programs, splits)](
            grad, partial, images.table, images=count, images_per_split=images_per_split,
            tokens=len(grad), rows=rows, columns=columns,
            grid_t=images.grid[0], grid_h=images.grid[1], grid_w=images.grid[2],
            KIND=images.kind, POSITION=mode, ALIGN_CORNERS=layout.align_corners,
            ANTIALIAS=layout.antialias, BLOCK_Q=16, BLOCK_D=block, num_warps=8, **common,
        )  # fmt: skip
    return partial[0] if splits == 1 else partial.sum(0)


def _grad_weight(
    grad: torch.Tensor, images: _Images, weight: torch.Tensor, affine: dict[str, Any], R: int,
    layout: Layout,
) -> torch.Tensor:  # fmt: skip
    D, K = weight.shape[0], weight[0].numel() if weight.shape[0] else 0
    config = grad_weight_config(K, images.pad_time or images.pad_space, weight.dtype)
    block = config["BLOCK_M"]
    rows = images.rows(R, block, patches=True)
    M = rows["M"]
    if M * D * K == 0:
        return torch.zeros_like(weight, memory_format=torch.contiguous_format)
    tile_count = images.tile_count(M, block)
    tiles = triton.cdiv(D, config["BLOCK_D"]) * triton.cdiv(K, config["BLOCK_K"])
    # Enough splits to fill the chip, each long enough to be worth its partial result.
    splits = max(1, min(2 * _SMS // tiles, tile_count // 8))
    tiles_per_split = triton.cdiv(tile_count, splits)
    splits = triton.cdiv(tile_count, tiles_per_split)
    dtype = weight.dtype if splits == 1 else torch.float32
    partial = torch.empty((splits, *weight.shape), dtype=dtype, device=weight.device)
    kernels._grad_weight_kernel[(tiles, splits)](
        grad, images.pixels, partial, D=D, tile_count=tile_count,
        tiles_per_split=tiles_per_split, DTYPE=triton_dtype(weight.dtype),
        **rows, **images.cut(weight, layout), **affine, **config,
    )  # fmt: skip
    return partial[0] if splits == 1 else partial.sum(0).to(weight.dtype)


def _grad_images(
    grad: torch.Tensor, images: list[torch.Tensor], found: _Images, weight: torch.Tensor,
    affine: dict[str, Any], R: int, layout: Layout,
) -> list[torch.Tensor]:  # fmt: skip
    """Straight to the pixels where each is in one patch at most; else by way of rows ``[patches, K]``."""
    patch = list(weight.shape[2:])
    gather = found.pad_time or any(s < p for s, p in zip(layout.stride, patch, strict=True))
    # Every pixel is written unless some lie beside all patches, or a grid may leave rows out.
    covered = layout.edge != "crop" and layout.stride == patch and found.kind != "ragged"
    new = torch.empty_like if gather or covered else torch.zeros_like
    d_images = [new(i, memory_format=torch.contiguous_format) for i in images]
    M = found.tokens - found.count * R
    if M == 0 or sum(i.numel() for i in images) == 0:
        return [d.zero_() for d in d_images]
    if images[0].dim() == 2:
        _grad_patches(grad, found, d_images[0], weight, affine, R, layout, to_rows=True)
        return d_images
    target = replace(found, pixels=d_images[0])
    if found.kind == "packed":
        block = grad_patches_config(False, weight.dtype)["BLOCK_M"]
        host = _host_table(d_images, weight, R, layout)
        target = _packed(host, d_images[0], weight, R, layout, {block})
    if gather:
        rows_MK = torch.empty(M, weight[0].numel(), dtype=torch.float32, device=grad.device)
        _grad_patches(grad, target, rows_MK, weight, affine, R, layout, to_rows=True)
        _gather_pixels(rows_MK, target, weight, layout)
    else:
        _grad_patches(grad, target, target.pixels, weight, affine, R, layout, to_rows=False)
    return d_images


def _grad_patches(
    grad: torch.Tensor, images: _Images, out: torch.Tensor, weight: torch.Tensor,
    affine: dict[str, Any], R: int, layout: Layout, to_rows: bool,
) -> None:  # fmt: skip
    D, K = weight.shape[0], weight[0].numel() if weight.shape[0] else 1
    cut = images.cut(weight, layout)
    steps = (K,) if to_rows else (weight.shape[4], *images.pixels.stride()[:4])
    lines = images.kind != "packed" and all(s % 8 == 0 for s in steps) and not images.pad_space
    config = grad_patches_config(lines, weight.dtype)
    block = config["BLOCK_M"]
    rows = images.rows(R, block, patches=True)
    grid = (images.tile_count(rows["M"], block) * triton.cdiv(K, config["BLOCK_K"]),)
    kernels._grad_patches_kernel[grid](
        grad, weight.contiguous(), out, D=D, TO_ROWS=to_rows, **rows, **cut, **affine, **config
    )


def _gather_pixels(
    rows_MK: torch.Tensor, target: _Images, weight: torch.Tensor, layout: Layout
) -> None:
    block, largest = 256, target.pixels[0].numel()
    if target.host is not None:
        largest = weight.shape[1] * int(target.host[:, 5:8].prod(1).max())
    blocks = triton.cdiv(largest, block)
    T, H, W = target.pixels.shape[2:] if target.kind == "dense" else (0, 0, 0)
    t, h, w = target.grid
    kernels._gather_pixels_kernel[(target.count * blocks,)](
        rows_MK, target.pixels, target.table, N=target.patches, T=T, H=H, W=W,
        grid_t=t, grid_h=h, grid_w=w, blocks=blocks, KIND=target.kind, MERGE=target.merge,
        BLOCK=block, **_patch(weight, layout),
    )  # fmt: skip


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Triton's name for a dtype of torch."""
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[
        dtype
    ]
