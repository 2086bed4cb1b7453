# SPDX-License-Identifier: Apache-2.0
"""Patch embedding on CUDA: pixels are gathered, normalised and multiplied tile by tile.

Neither a float image nor a patch matrix exists. Dimensions: B images, C channels, H×W pixels, P_h×P_w
a patch, N patches an image, K = C·P_h·P_w values a patch, D width, R prefix tokens, T = R + N tokens an
image, S position rows; M rows of a product: all tokens (forward) or all patches (backward).

What rounds where: pixels are normalised in fp32 with scale and shift as hi + lo pairs, and rounded once
to the weight's dtype; bias and position are added in fp32 and the sum rounds once. fp32 products are IEEE.
No atomics: the same bits in every run.
"""

import struct
from typing import Any

import torch
import triton
import triton.language as tl

_SMS = 132  # of an H200; a constant, so that results depend on shapes only


@triton.jit
def _columns(
    k, affine, stride_c, stride_h, stride_w,
    C: tl.constexpr, P_h: tl.constexpr, P_w: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    """Of value k of a patch: its offset from the patch's first pixel, and its channel's affine."""
    c, py, px = k // (P_h * P_w), k // P_w % P_h, k % P_w
    offset = c.to(tl.int64) * stride_c + py.to(tl.int64) * stride_h + px.to(tl.int64) * stride_w
    scale_hi = tl.zeros(k.shape, tl.float32)
    scale_lo, shift_hi, shift_lo = scale_hi, scale_hi, scale_hi
    if NORMALISE:
        for i in tl.static_range(C):
            scale_hi = tl.where(c == i, affine[4 * i], scale_hi)
            scale_lo = tl.where(c == i, affine[4 * i + 1], scale_lo)
            shift_hi = tl.where(c == i, affine[4 * i + 2], shift_hi)
            shift_lo = tl.where(c == i, affine[4 * i + 3], shift_lo)
    return offset, scale_hi, scale_lo, shift_hi, shift_lo


@triton.jit
def _patch_offset(b, p, grid_w, stride_b, stride_h, stride_w, P_h: tl.constexpr, P_w: tl.constexpr):
    """Offset of the first pixel of patch p of image b."""
    gy, gx = (p // grid_w).to(tl.int64), (p % grid_w).to(tl.int64)
    return b.to(tl.int64) * stride_b + gy * P_h * stride_h + gx * P_w * stride_w


@triton.jit
def _values(
    pixels, rows, columns, valid, scale_hi, scale_lo, shift_hi, shift_lo,
    NORMALISE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A tile of normalised patches. Not valid: finite, to be met by a zero of the other factor."""
    x = tl.load(pixels + rows[:, None] + columns[None, :], mask=valid, other=0).to(tl.float32)
    if NORMALISE:
        # Hi and lo apart: the rounding of one product would not cancel next to the mean.
        x = tl.fma(x, scale_hi[None, :], shift_hi[None, :]) + tl.fma(
            x, scale_lo[None, :], shift_lo[None, :]
        )
    return x.to(DTYPE)


@triton.jit
def _patch_embed_kernel(
    pixels, weight_DK, bias, position_SD, prefix_RD, out_MD, affine,
    M, N, R, S, D, grid_w, stride_b, stride_c, stride_h, stride_w,
    C: tl.constexpr, P_h: tl.constexpr, P_w: tl.constexpr, NORMALISE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_PREFIX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = C * P_h * P_w
    tiles_d = tl.cdiv(D, BLOCK_D)
    pid = tl.program_id(0)
    # Neighbouring programs share their pixels; the weight stays in L2 anyway.
    m = pid // tiles_d * BLOCK_M + tl.arange(0, BLOCK_M)
    d = pid % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
    T = R + N
    t = m % T
    p = t - R
    is_patch = (m < M) & (p >= 0)
    rows = _patch_offset(m // T, p, grid_w, stride_b, stride_h, stride_w, P_h, P_w)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        offset, scale_hi, scale_lo, shift_hi, shift_lo = _columns(
            k, affine, stride_c, stride_h, stride_w, C, P_h, P_w, NORMALISE
        )
        x = _values(
            pixels, rows, offset, is_patch[:, None] & (k < K)[None, :],
            scale_hi, scale_lo, shift_hi, shift_lo, NORMALISE, weight_DK.dtype.element_ty,
        )  # fmt: skip
        w = tl.load(
            weight_DK + d.to(tl.int64)[None, :] * K + k[:, None],
            mask=(d < D)[None, :] & (k < K)[:, None],
            other=0,
        )
        acc = tl.dot(x, w, acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias + d, mask=d < D, other=0).to(tl.float32)[None, :]
    columns = d.to(tl.int64)[None, :]
    in_width = (d < D)[None, :]
    if HAS_PREFIX:
        is_prefix = (m < M) & (p < 0)
        prefix = tl.load(
            prefix_RD + t.to(tl.int64)[:, None] * D + columns,
            mask=is_prefix[:, None] & in_width,
            other=0,
        )
        acc = tl.where(is_prefix[:, None], prefix.to(tl.float32), acc)
    if HAS_POSITION:
        # The last N rows are the patches'; the ones before belong to the first prefix tokens.
        s = tl.where(p >= 0, S - N + p, t)
        has_row = (m < M) & ((p >= 0) | (t < S - N))
        acc += tl.load(
            position_SD + s.to(tl.int64)[:, None] * D + columns,
            mask=has_row[:, None] & in_width,
            other=0,
        ).to(tl.float32)
    out = acc.to(out_MD.dtype.element_ty)
    tl.store(out_MD + m.to(tl.int64)[:, None] * D + columns, out, mask=(m < M)[:, None] & in_width)


@triton.jit
def _grad_weight_kernel(
    grad, pixels, partial_DK, affine,
    M, N, R, D, grid_w, stride_b, stride_c, stride_h, stride_w, rows_per_split,
    C: tl.constexpr, P_h: tl.constexpr, P_w: tl.constexpr, NORMALISE: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of ``grad`` transposed times the patches, over the rows of one split."""
    K: tl.constexpr = C * P_h * P_w
    tiles_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    d = tl.program_id(0) // tiles_k * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.program_id(0) % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    split = tl.program_id(1)
    offset, scale_hi, scale_lo, shift_hi, shift_lo = _columns(
        k, affine, stride_c, stride_h, stride_w, C, P_h, P_w, NORMALISE
    )
    acc = tl.zeros((BLOCK_D, BLOCK_K), tl.float32)
    start = split * rows_per_split
    end = tl.minimum(start + rows_per_split, M)
    for m0 in range(start, end, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        b, p = m // N, m % N
        token = b.to(tl.int64) * (R + N) + R + p
        dy = tl.load(
            grad + token[:, None] * D + d[None, :],
            mask=(m < end)[:, None] & (d < D)[None, :],
            other=0,
        )
        x = _values(
            pixels, _patch_offset(b, p, grid_w, stride_b, stride_h, stride_w, P_h, P_w), offset,
            (m < end)[:, None] & (k < K)[None, :],
            scale_hi, scale_lo, shift_hi, shift_lo, NORMALISE, DTYPE,
        )  # fmt: skip
        acc = tl.dot(tl.trans(dy), x, acc, input_precision="ieee")
    rows = split.to(tl.int64) * D + d
    tl.store(
        partial_DK + rows[:, None] * K + k[None, :],
        acc.to(partial_DK.dtype.element_ty),
        mask=(d < D)[:, None] & (k < K)[None, :],
    )


@triton.jit
def _grad_pixels_kernel(
    grad, weight_DK, grad_pixels, affine,
    M, N, R, D, grid_w, stride_b, stride_c, stride_h, stride_w,
    C: tl.constexpr, P_h: tl.constexpr, P_w: tl.constexpr, NORMALISE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``grad`` times the weight, scaled by channel; each pixel belongs to one patch."""
    K: tl.constexpr = C * P_h * P_w
    tiles_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    m = tl.program_id(0) // tiles_k * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    b, p = m // N, m % N
    token = b.to(tl.int64) * (R + N) + R + p
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        dy = tl.load(
            grad + token[:, None] * D + d[None, :],
            mask=(m < M)[:, None] & (d < D)[None, :],
            other=0,
        )
        w = tl.load(
            weight_DK + d.to(tl.int64)[:, None] * K + k[None, :],
            mask=(d < D)[:, None] & (k < K)[None, :],
            other=0,
        )
        acc = tl.dot(dy, w, acc, input_precision="ieee")
    offset, scale_hi, _, _, _ = _columns(
        k, affine, stride_c, stride_h, stride_w, C, P_h, P_w, NORMALISE
    )
    if NORMALISE:
        acc *= scale_hi[None, :]
    rows = _patch_offset(b, p, grid_w, stride_b, stride_h, stride_w, P_h, P_w)
    tl.store(
        grad_pixels + rows[:, None] + offset[None, :],
        acc.to(grad_pixels.dtype.element_ty),
        mask=(m < M)[:, None] & (k < K)[None, :],
    )


def forward_config(M: int, D: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile of the forward kernel: the largest that still gives every multiprocessor one."""
    if dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_D": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}
    # Wide in D: a pixel is converted once for each tile of D. 128×256 spills.
    tiles = triton.cdiv(M, 64) * triton.cdiv(D, 256)
    BLOCK_D, warps = (256, 8) if tiles >= _SMS else (64, 4)
    return {"BLOCK_M": 64, "BLOCK_D": BLOCK_D, "BLOCK_K": 64, "num_warps": warps, "num_stages": 3}


def grad_weight_config(dtype: torch.dtype) -> dict[str, int]:
    """Tile of the weight gradient."""
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_D": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": 64, "BLOCK_D": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3}


def grad_pixels_config(dtype: torch.dtype) -> dict[str, int]:
    """Tile of the pixel gradient."""
    if dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_D": 32, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": 128, "BLOCK_D": 64, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3}


def affine_pairs(scale: list[float] | None, shift: list[float] | None) -> tuple[float, ...]:
    """``scale_hi, scale_lo, shift_hi, shift_lo`` of each channel, all exact in fp32."""
    if scale is None or shift is None:
        return (0.0,)
    return tuple(
        part
        for pair in zip(scale, shift, strict=True)
        for value in pair
        for part in (_fp32(value), _fp32(value - _fp32(value)))
    )


def _fp32(value: float) -> float:
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


def _image(
    pixels: torch.Tensor, weight: torch.Tensor, scale: list[float] | None, shift: list[float] | None
) -> dict[str, Any]:
    """The arguments every kernel takes: how the pixels lie in memory and are normalised."""
    _, C, P_h, P_w = weight.shape
    strides = dict(
        zip(("stride_b", "stride_c", "stride_h", "stride_w"), pixels.stride(), strict=True)
    )
    return {
        **strides, "grid_w": max(pixels.shape[3] // P_w, 1), "affine": affine_pairs(scale, shift),
        "C": C, "P_h": P_h, "P_w": P_w, "NORMALISE": scale is not None and shift is not None,
    }  # fmt: skip


def patch_embed(
    pixel_values: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    position_embed: torch.Tensor | None,
    prefix_tokens: torch.Tensor | None,
    pixel_scale: list[float] | None,
    pixel_shift: list[float] | None,
) -> torch.Tensor:
    """As ``reference.patch_embed``, in one launch."""
    B, _, H, W = pixel_values.shape
    D, _, P_h, P_w = weight.shape
    N = (H // P_h) * (W // P_w)
    R = 0 if prefix_tokens is None else prefix_tokens.shape[0]
    out = weight.new_empty(B, R + N, D)
    if out.numel() == 0:
        return out
    bias, position_embed, prefix_tokens = (
        None if t is None else t.contiguous() for t in (bias, position_embed, prefix_tokens)
    )
    M = B * (R + N)
    config = forward_config(M, D, weight.dtype)
    grid = (triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(D, config["BLOCK_D"]),)
    _patch_embed_kernel[grid](
        pixel_values, weight.contiguous(), bias, position_embed, prefix_tokens, out,
        M=M, N=N, R=R, D=D, S=0 if position_embed is None else position_embed.shape[0],
        HAS_BIAS=bias is not None, HAS_POSITION=position_embed is not None,
        HAS_PREFIX=prefix_tokens is not None,
        **_image(pixel_values, weight, pixel_scale, pixel_shift), **config,
    )  # fmt: skip
    return out


def patch_embed_backward(
    grad: torch.Tensor,
    pixel_values: torch.Tensor,
    weight: torch.Tensor,
    pixel_scale: list[float] | None,
    pixel_shift: list[float] | None,
    prefix_rows: int,
    position_rows: int,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As ``reference.patch_embed_backward``; ``grad`` is read once for all but weight and pixels."""
    grad = grad.contiguous()
    R, N = prefix_rows, grad.shape[1] - prefix_rows
    empty = weight.new_empty(0)
    d_pixels, d_weight, d_bias, d_position, d_prefix = empty, empty, empty, empty, empty
    if needs[0]:
        d_pixels = _grad_pixels(grad, pixel_values, weight, pixel_scale, pixel_shift, R)
    if needs[1]:
        d_weight = _grad_weight(grad, pixel_values, weight, pixel_scale, pixel_shift, R)
    if any(needs[2:]):
        summed_TD = grad.sum(0, dtype=torch.float32)
        d_bias = summed_TD[R:].sum(0).to(weight.dtype)
        summed = summed_TD.to(weight.dtype)
        positioned = position_rows - N
        d_position = torch.cat([summed[:positioned], summed[R:]]) if needs[3] else empty
        d_prefix = summed[:R].clone()
    return (
        d_pixels, d_weight, d_bias if needs[2] else empty, d_position, d_prefix if needs[4] else empty,
    )  # fmt: skip


def _grad_weight(
    grad: torch.Tensor,
    pixel_values: torch.Tensor,
    weight: torch.Tensor,
    pixel_scale: list[float] | None,
    pixel_shift: list[float] | None,
    R: int,
) -> torch.Tensor:
    B, T, D = grad.shape
    M, K = B * (T - R), weight[0].numel() if D else 0
    if M * D * K == 0:
        return torch.zeros_like(weight, memory_format=torch.contiguous_format)
    config = grad_weight_config(weight.dtype)
    BLOCK_M = config["BLOCK_M"]
    tiles = triton.cdiv(D, config["BLOCK_D"]) * triton.cdiv(K, config["BLOCK_K"])
    # Enough splits to fill the chip, each long enough to be worth its partial result.
    splits = max(1, min(2 * _SMS // tiles, M // (8 * BLOCK_M)))
    rows_per_split = triton.cdiv(triton.cdiv(M, splits), BLOCK_M) * BLOCK_M
    splits = triton.cdiv(M, rows_per_split)
    dtype = weight.dtype if splits == 1 else torch.float32
    partial = torch.empty((splits, *weight.shape), dtype=dtype, device=weight.device)
    _grad_weight_kernel[(tiles, splits)](
        grad, pixel_values, partial, M=M, N=T - R, R=R, D=D, rows_per_split=rows_per_split,
        DTYPE=triton_dtype(weight.dtype),
        **_image(pixel_values, weight, pixel_scale, pixel_shift), **config,
    )  # fmt: skip
    return partial[0] if splits == 1 else partial.sum(0).to(weight.dtype)


def _grad_pixels(
    grad: torch.Tensor,
    pixel_values: torch.Tensor,
    weight: torch.Tensor,
    pixel_scale: list[float] | None,
    pixel_shift: list[float] | None,
    R: int,
) -> torch.Tensor:
    B, T, D = grad.shape
    d_pixels = torch.empty_like(pixel_values, memory_format=torch.contiguous_format)
    if d_pixels.numel() == 0:
        return d_pixels
    M, K = B * (T - R), d_pixels.numel() // (B * (T - R))
    config = grad_pixels_config(weight.dtype)
    grid = (triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(K, config["BLOCK_K"]),)
    _grad_pixels_kernel[grid](
        grad, weight.contiguous(), d_pixels, M=M, N=T - R, R=R, D=D,
        **_image(d_pixels, weight, pixel_scale, pixel_shift), **config,
    )  # fmt: skip
    return d_pixels


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Triton's name for a dtype of torch."""
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[
        dtype
    ]
