# SPDX-License-Identifier: Apache-2.0
"""Patch embedding in plain PyTorch: the definition of correct.

Dimensions: C channels, T×H×W frames and pixels, P a patch and S its stride (t, h, w), N patches an image
on a grid t×h×w, K = C·P_t·P_h·P_w values a patch, D width, R prefix tokens an image, m merge size,
M patches of all images.

What rounds where: pixels are normalised in fp64 and rounded once to the weight's dtype; the product
and bias follow ``F.linear`` (accumulated in at least fp32, rounded once); a resampled position is summed
in at least fp32 and rounded once; adding the position rounds once more, as it does in eager models.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from mmkernels.ops.patch_embed.layout import Layout, Source, check_positions, grids, sources

__all__ = ["patch_embed", "patch_embed_backward", "patch_embed_grids"]
patch_embed_grids = grids


def cut(
    clips: torch.Tensor, patch: Sequence[int], source: Source, layout: Layout, fill: float
) -> torch.Tensor:
    """``[B,C,T,H,W]`` → ``[B,N,K]``: time padded by the last frame, pixels by ``fill``; any rest cropped."""
    _, C, T, H, W = clips.shape
    (P_t, P_h, P_w), (S_t, S_h, S_w), (t, h, w) = patch[1:], layout.stride, source.grid
    if source.patches == 0:
        return clips.new_empty(clips.shape[0], 0, math.prod(patch))
    frames = torch.arange((t - 1) * S_t + P_t, device=clips.device).clamp(max=T - 1)
    x = clips[:, :, frames]
    high, wide = (h - 1) * S_h + P_h, (w - 1) * S_w + P_w
    x = F.pad(x, (0, max(0, wide - W), 0, max(0, high - H)), value=fill)[..., :high, :wide]
    x = x.unfold(2, P_t, S_t).unfold(3, P_h, S_h).unfold(4, P_w, S_w)  # [B,C,t,h,w,P_t,P_h,P_w]
    x = x.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4)
    return merge_order(x, layout.merge_size)


def merge_order(x_BthwK: torch.Tensor, m: int) -> torch.Tensor:
    """``[B,t,h,w,K]`` → ``[B,N,K]``, the patches of an m×m block one after the other."""
    B, t, h, w, K = x_BthwK.shape
    blocks = x_BthwK.reshape(B, t, h // m, m, w // m, m, K).transpose(3, 4)
    return blocks.reshape(B, t * h * w, K)


def normalised(
    pixels: torch.Tensor, dtype: torch.dtype, scale: list[float] | None, shift: list[float] | None
) -> torch.Tensor:
    """``pixel · scale + shift`` of each channel (dimension 1), rounded once to ``dtype``."""
    if scale is None or shift is None:
        return pixels.to(dtype)
    view = (-1, *[1] * (pixels.dim() - 2))
    a = torch.tensor(scale, dtype=torch.float64, device=pixels.device).view(view)
    b = torch.tensor(shift, dtype=torch.float64, device=pixels.device).view(view)
    return (pixels.double() * a + b).to(dtype)


def _patch_rows(
    images: list[torch.Tensor], found: list[Source], weight: torch.Tensor,
    scale: list[float] | None, shift: list[float] | None, layout: Layout,
) -> list[torch.Tensor]:  # fmt: skip
    """Of each source its normalised patches ``[B,N,K]`` in the weight's dtype."""
    if images and images[0].dim() == 2:
        rows = normalised(images[0], weight.dtype, scale, shift)
        pieces = rows.split([s.count * s.patches for s in found])
        return [r.view(s.count, s.patches, r.shape[1]) for r, s in zip(pieces, found, strict=True)]
    patch = weight.shape[1:]
    values = [normalised(s.pixels, weight.dtype, scale, shift) for s in found]  # type: ignore[arg-type]
    return [cut(v, patch, s, layout, 0.0) for v, s in zip(values, found, strict=True)]


def axis_matrix(n_out: int, like: torch.Tensor, n_in: int, layout: Layout) -> torch.Tensor:
    """``[n_out, n_in]``: row i holds the weights of the table rows that make position i of an axis."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    if layout.position_mode == "nearest":
        index = torch.arange(n_out, device=like.device) * n_in // n_out
        return F.one_hot(index, n_in).to(dtype)
    # Resampling the identity gives the weights; its second axis keeps its size.
    eye = torch.eye(n_in, dtype=torch.float64, device=like.device)[None, None]
    resampled = F.interpolate(
        eye, (n_out, n_in), mode=layout.position_mode,
        align_corners=layout.align_corners, antialias=layout.antialias,
    )  # fmt: skip
    return resampled[0, 0].to(dtype)


def position_rows(tables: list[torch.Tensor], source: Source, layout: Layout) -> torch.Tensor:
    """The positions of an image in sequence order, ``[N,D]`` or, fixed, with rows of prefix tokens."""
    (t, h, w), table = source.grid, tables[0]
    D, m = table.shape[-1], layout.merge_size
    if layout.position_mode == "fixed":
        own = table.shape[0] - source.patches
        first = 0 if layout.prefix_last else own
        patches = table[first : first + source.patches].view(1, t, h, w, D)
        return torch.cat(
            [table[:first], merge_order(patches, m)[0], table[first + source.patches :]]
        )
    if layout.position_mode == "factorised":
        plane = tables[0][:h, None] + tables[1][None, :w]
    else:
        rows, columns = (
            axis_matrix(o, table, i, layout) for o, i in zip((h, w), table.shape, strict=False)
        )
        plane = torch.einsum("yi,xj,ijd->yxd", rows, columns, table.to(rows.dtype)).to(table.dtype)
    return merge_order(plane.expand(1, t, h, w, D), m)[0]


def patch_embed(
    images: list[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    positions: list[torch.Tensor],
    prefix_tokens: torch.Tensor | None,
    grid_thw: torch.Tensor | None,
    pixel_scale: list[float] | None,
    pixel_shift: list[float] | None,
    *layout_arguments: object,
) -> torch.Tensor:
    """``[tokens, D]``: of each image ``weight @ patch + bias`` and its prefix tokens, plus positions."""
    layout = Layout(*layout_arguments)  # type: ignore[arg-type]
    found = sources(images, weight.shape[1:], layout, grid_thw)
    rows = _patch_rows(images, found, weight, pixel_scale, pixel_shift, layout)
    D = weight.shape[0]
    R = 0 if prefix_tokens is None else prefix_tokens.shape[0]
    # No tokens of no image: even then every argument has a gradient, zero.
    none = F.linear(weight.new_empty(0, weight.shape[1:].numel()), weight.flatten(1), bias)
    also = [*positions, *([] if prefix_tokens is None else [prefix_tokens])]
    out = [none, *(t.flatten(0, -2)[:0] for t in also)]
    out += [i.flatten()[:0, None].expand(0, D).to(weight.dtype) for i in images]
    for source, rows_BNK in zip(found, rows, strict=True):
        tokens = F.linear(rows_BNK, weight.flatten(1), bias)
        if prefix_tokens is not None:
            prefix = prefix_tokens.expand(source.count, R, D)
            tokens = torch.cat([tokens, prefix] if layout.prefix_last else [prefix, tokens], 1)
        if positions:
            shape = [n for p in positions for n in p.shape[:-1]]
            check_positions(shape, source, layout, R)
            tokens = _add_positions(
                tokens, position_rows(positions, source, layout), source, layout
            )
        out.append(tokens.flatten(0, 1))
    return torch.cat(out)


def _add_positions(
    tokens: torch.Tensor, position: torch.Tensor, source: Source, layout: Layout
) -> torch.Tensor:
    """Prefix tokens without a position of their own keep what they are."""
    rest = tokens.shape[1] - position.shape[0]
    if rest == 0:
        return tokens + position
    split = position.shape[0] if layout.prefix_last else position.shape[0] - source.patches
    zeros = position.new_zeros(rest, position.shape[1])
    return tokens + torch.cat([position[:split], zeros, position[split:]])


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
    *layout_arguments: object,
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Gradients of (images, weight, bias, positions, prefix_tokens); empty where ``needs`` says no.

    ``position_shape`` holds the sizes of the tables but D. Sums run in at least fp32 and round once.
    """
    layout = Layout(*layout_arguments)  # type: ignore[arg-type]
    found = sources(images, weight.shape[1:], layout, grid_thw)
    D, R = weight.shape[0], prefix_rows
    acc = torch.promote_types(weight.dtype, torch.float32)
    lengths = [s.count * (R + s.patches) for s in found]
    per_image = [
        g.view(s.count, R + s.patches, D) for g, s in zip(grad.split(lengths), found, strict=True)
    ]
    first = 0 if layout.prefix_last else R
    of_patches = [g[:, first : first + s.patches] for g, s in zip(per_image, found, strict=True)]
    empty = weight.new_empty(0)
    grad_MD = torch.cat([g.flatten(0, 1) for g in of_patches] or [weight.new_empty(0, D)])
    d_images = [i.new_empty(0) for i in images]
    if needs[0]:
        d_images = _grad_images(
            grad_MD @ weight.flatten(1), images, found, weight, pixel_scale, layout
        )
    d_weight, d_bias, d_prefix = empty, empty, empty
    if needs[1]:
        rows = _patch_rows(images, found, weight, pixel_scale, pixel_shift, layout)
        K = weight[0].numel() if D else 0
        rows_MK = torch.cat([r.flatten(0, 1) for r in rows] or [weight.new_empty(0, K)])
        d_weight = (grad_MD.t() @ rows_MK).view_as(weight) if D else torch.zeros_like(weight)
    if needs[2]:
        d_bias = grad_MD.sum(0, dtype=acc).to(weight.dtype)
    tables = (
        _grad_tables(per_image, of_patches, found, weight, position_shape, layout, R)
        if needs[3]
        else []
    )
    if needs[4]:
        own = slice(-R, None) if layout.prefix_last and R else slice(0, R)
        d_prefix = weight.new_zeros(R, D, dtype=acc)
        for g in per_image:
            d_prefix = d_prefix + g[:, own].sum(0, dtype=acc)
        d_prefix = d_prefix.to(weight.dtype)
    return d_images, d_weight, d_bias, tables, d_prefix


def _grad_tables(
    per_image: list[torch.Tensor], of_patches: list[torch.Tensor], found: list[Source],
    weight: torch.Tensor, shape: list[int], layout: Layout, R: int,
) -> list[torch.Tensor]:  # fmt: skip
    """The transposes of ``position_rows``."""
    D, mode = weight.shape[0], layout.position_mode
    acc = torch.promote_types(weight.dtype, torch.float32)
    sizes = [(n, D) for n in shape] if mode == "factorised" else [(*shape, D)]
    tables = [weight.new_zeros(s, dtype=acc) for s in sizes]
    for whole, patches, source in zip(per_image, of_patches, found, strict=True):
        (t, h, w), m = source.grid, layout.merge_size
        summed = patches.sum(0, dtype=acc).view(t, h // m, w // m, m, m, D).transpose(2, 3)
        raster = summed.reshape(t, h, w, D)
        if mode == "fixed":
            own = shape[0] - source.patches
            prefix = whole[:, -R:] if layout.prefix_last and R else whole[:, :R]
            of_prefix = prefix[:, :own].sum(0, dtype=acc)
            pieces = [of_prefix, raster.flatten(0, 2)]
            tables[0] += torch.cat(pieces[::-1] if layout.prefix_last else pieces)
        elif mode == "factorised":
            tables[0][:h] += raster.sum((0, 2))
            tables[1][:w] += raster.sum((0, 1))
        else:
            rows, columns = (
                axis_matrix(o, weight, i, layout) for o, i in zip((h, w), shape, strict=True)
            )
            tables[0] += torch.einsum("yi,xj,yxd->ijd", rows, columns, raster.sum(0))
    return [t.to(weight.dtype) for t in tables]


def _grad_images(
    rows_MK: torch.Tensor, images: list[torch.Tensor], found: list[Source], weight: torch.Tensor,
    scale: list[float] | None, layout: Layout,
) -> list[torch.Tensor]:  # fmt: skip
    """``grad · weight`` added back to the pixels each value came from, times the channel's scale."""
    rows = rows_MK.to(torch.promote_types(rows_MK.dtype, torch.float32))
    a = torch.tensor(scale, dtype=torch.float64, device=rows.device) if scale else None
    if images and images[0].dim() == 2:
        return [(rows if a is None else rows * a).to(images[0].dtype)]
    pieces = rows.split([s.count * s.patches for s in found])
    grads = [_grad_clips(r, s, a, weight, layout) for r, s in zip(pieces, found, strict=True)]
    if images and images[0].dim() == 1:
        return [torch.cat([g.flatten() for g in grads]).to(images[0].dtype)]
    return [g.view(i.shape).to(i.dtype) for g, i in zip(grads, images, strict=True)]


def _grad_clips(
    rows: torch.Tensor,
    source: Source,
    scale: torch.Tensor | None,
    weight: torch.Tensor,
    layout: Layout,
) -> torch.Tensor:
    assert source.pixels is not None
    B, C, T, H, W = source.pixels.shape
    places = torch.arange(B * C * T * H * W, device=rows.device).view(B, C, T, H, W)
    index = cut(places, weight.shape[1:], source, layout, B * C * T * H * W).flatten()
    total = rows.new_zeros(B * C * T * H * W + 1).index_add(0, index, rows.flatten())
    clips = total[:-1].view(B, C, T, H, W)
    return clips if scale is None else clips * scale.view(-1, 1, 1, 1)
