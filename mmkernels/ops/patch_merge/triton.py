# SPDX-License-Identifier: Apache-2.0
"""Patch merging on CUDA: a program takes what one norm covers, a token or a merged row, and writes it once.

What rounds where: as the reference; sums in fp32. Backward: a program makes its rows' gradient and leaves mean and
1/σ; the norm's gradients are sums of columns over splits of the rows, added up in order. No atomics.
"""

from typing import Any

import torch
import triton
import triton.language as tl

_SPLITS = 64  # of the rows in the norm's gradients: a constant, so that bits depend on shapes only


@triton.jit
def _row_of(index, m, j, J: tl.constexpr, HAS_INDEX: tl.constexpr):
    """The row of features that is neighbour j of merged row m; negative: padding."""
    if HAS_INDEX:
        return tl.load(index + m * J + j)
    return m * J + j


@triton.jit
def _values(
    x_NC, index, m, j, part, C, N,
    J: tl.constexpr, HAS_INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of the features of a neighbour, 0 beyond them and where it is padding."""
    row = _row_of(index, m, j, J, HAS_INDEX)
    c = part * BLOCK + tl.arange(0, BLOCK)
    inside = (c < C) & (row >= 0) & (row < N)
    return tl.load(x_NC + row * C + c, mask=inside, other=0).to(tl.float32), c, row


@triton.jit
def _places(c, j, C, J: tl.constexpr, CHANNELS_FIRST: tl.constexpr):
    """Where values of neighbour j lie in a merged row."""
    if CHANNELS_FIRST:
        return c * J + j
    return j * C + c


@triton.jit
def _stats(
    x_NC, index, m, first, C, N, eps,
    J: tl.constexpr, COVERED: tl.constexpr, NORM: tl.constexpr, HAS_INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean (0 of an RMSNorm) and 1/√(variance + eps) of the neighbours from ``first`` on that a norm covers."""
    parts = tl.cdiv(C, BLOCK)
    mean = 0.0
    if NORM == "layer":
        total = tl.zeros((BLOCK,), tl.float32)
        for i in range(0, COVERED * parts):
            x, _, _ = _values(
                x_NC, index, m, first + i // parts, i % parts, C, N, J, HAS_INDEX, BLOCK
            )
            total += x
        mean = tl.sum(total, 0) / (COVERED * C)
    squares = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, COVERED * parts):
        x, c, _ = _values(x_NC, index, m, first + i // parts, i % parts, C, N, J, HAS_INDEX, BLOCK)
        centred = tl.where(c < C, x - mean, 0.0)
        squares += centred * centred
    return mean, 1.0 / tl.sqrt_rn(tl.sum(squares, 0) / (COVERED * C) + eps)


@triton.jit
def _merge_kernel(
    x_NC, index, weight, bias, out, C, N, eps,
    J: tl.constexpr, COVERED: tl.constexpr, NORM: tl.constexpr, CHANNELS_FIRST: tl.constexpr,
    HAS_INDEX: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    m, first = pid // (J // COVERED), pid % (J // COVERED) * COVERED
    parts = tl.cdiv(C, BLOCK)
    mean, r = 0.0, 1.0
    if NORM != "none":
        mean, r = _stats(x_NC, index, m, first, C, N, eps, J, COVERED, NORM, HAS_INDEX, BLOCK)
    for i in range(0, COVERED * parts):
        j = first + i // parts
        x, c, row = _values(x_NC, index, m, j, i % parts, C, N, J, HAS_INDEX, BLOCK)
        place = _places(c, j, C, J, CHANNELS_FIRST)
        if NORM != "none":
            x = (x - mean) * r
            at = c if COVERED < J or J == 1 else place
            if HAS_WEIGHT:
                x *= tl.load(weight + at, mask=c < C, other=0).to(tl.float32)
            if HAS_BIAS:
                x += tl.load(bias + at, mask=c < C, other=0).to(tl.float32)
            if COVERED == 1:  # before the merge: padding stays 0
                x = tl.where(row >= 0, x, 0.0)
        tl.store(out + m * J * C + place, x.to(out.dtype.element_ty), mask=c < C)


@triton.jit
def _grad_kernel(
    grad, x_NC, index, weight, dx_NC, stats, C, N, eps,
    J: tl.constexpr, COVERED: tl.constexpr, NORM: tl.constexpr, CHANNELS_FIRST: tl.constexpr,
    HAS_INDEX: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    m, first = pid // (J // COVERED), pid % (J // COVERED) * COVERED
    parts = tl.cdiv(C, BLOCK)
    mean, r = 0.0, 1.0
    flat, along = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    if NORM != "none":
        mean, r = _stats(x_NC, index, m, first, C, N, eps, J, COVERED, NORM, HAS_INDEX, BLOCK)
        tl.store(stats + 2 * pid, mean)
        tl.store(stats + 2 * pid + 1, r)
        for i in range(0, COVERED * parts):
            j = first + i // parts
            x, c, _ = _values(x_NC, index, m, j, i % parts, C, N, J, HAS_INDEX, BLOCK)
            place = _places(c, j, C, J, CHANNELS_FIRST)
            g = tl.load(grad + m * J * C + place, mask=c < C, other=0).to(tl.float32)
            if HAS_WEIGHT:
                at = c if COVERED < J or J == 1 else place
                g *= tl.load(weight + at, mask=c < C, other=0).to(tl.float32)
            flat += g
            along += g * tl.where(c < C, (x - mean) * r, 0.0)
    flat_mean = tl.sum(flat, 0) / (COVERED * C) if NORM == "layer" else 0.0
    along_mean = tl.sum(along, 0) / (COVERED * C)
    for i in range(0, COVERED * parts):
        j = first + i // parts
        x, c, row = _values(x_NC, index, m, j, i % parts, C, N, J, HAS_INDEX, BLOCK)
        place = _places(c, j, C, J, CHANNELS_FIRST)
        g = tl.load(grad + m * J * C + place, mask=c < C, other=0).to(tl.float32)
        if NORM != "none":
            if HAS_WEIGHT:
                at = c if COVERED < J or J == 1 else place
                g *= tl.load(weight + at, mask=c < C, other=0).to(tl.float32)
            g = (g - flat_mean - (x - mean) * r * along_mean) * r
        inside = (c < C) & (row >= 0) & (row < N)
        tl.store(dx_NC + row * C + c, g.to(dx_NC.dtype.element_ty), mask=inside)


@triton.jit
def _grad_norm_kernel(
    grad, x_NC, index, stats, partial, C, N, M, rows_per_split, columns,
    J: tl.constexpr, COVERED: tl.constexpr, CHANNELS_FIRST: tl.constexpr,
    HAS_INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A split's sums of g·y and of g, of a block of the norm's columns; ``partial`` is [2, splits, columns]."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    split, splits = tl.program_id(1), tl.num_programs(1)
    valid = at < columns
    d_weight, d_bias = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for i in range(0, rows_per_split):
        norm = (split * rows_per_split + i).to(tl.int64)  # which of all norms
        m = norm // (J // COVERED)
        if COVERED < J or J == 1:
            j, c = norm % J + at * 0, at
        elif CHANNELS_FIRST:
            j, c = at % J, at // J
        else:
            j, c = at // C, at % C
        here = valid & (m < M)
        if HAS_INDEX:
            row = tl.load(index + m * J + j, mask=here, other=-1)
        else:
            row = m * J + j
        kept = here & (row >= 0) & (row < N)
        x = tl.load(x_NC + row * C + c, mask=kept, other=0).to(tl.float32)
        g = tl.load(grad + m * J * C + _places(c, j, C, J, CHANNELS_FIRST), mask=here, other=0)
        g = g.to(tl.float32)
        mean = tl.load(stats + 2 * norm, mask=m < M, other=0)
        r = tl.load(stats + 2 * norm + 1, mask=m < M, other=0)
        if COVERED < J or J == 1:  # before the merge: padding has no norm
            g = tl.where(kept, g, 0.0)
        d_weight += g * (x - mean) * r
        d_bias += g
    tl.store(partial + split.to(tl.int64) * columns + at, d_weight, mask=valid)
    tl.store(partial + (splits + split).to(tl.int64) * columns + at, d_bias, mask=valid)


def config(C: int) -> dict[str, int]:
    """A block of one token's features: all of them up to 2,048."""
    block = min(2048, max(32, triton.next_power_of_2(C)))
    return {"BLOCK": block, "num_warps": 8 if block > 1024 else 4}


def _arguments(
    features: torch.Tensor,
    index: torch.Tensor | None,
    group: int,
    norm_after: bool,
    channels_first: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, int, dict[str, Any]]:
    features, index = features.contiguous(), None if index is None else index.contiguous()
    M = features.shape[0] // group if index is None else index.shape[0]
    meta = {
        "J": group, "COVERED": group if norm_after else 1, "CHANNELS_FIRST": channels_first,
        "HAS_INDEX": index is not None,
    }  # fmt: skip
    return features, index, M, meta


def patch_merge(
    features: torch.Tensor,
    index: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    group: int,
    norm: str,
    norm_after: bool,
    channels_first: bool,
    eps: float,
) -> torch.Tensor:
    """As ``reference.patch_merge``, in one launch."""
    features, index, M, meta = _arguments(features, index, group, norm_after, channels_first)
    N, C = features.shape
    out = features.new_empty(M, group * C)
    if out.numel():
        weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
        _merge_kernel[(M * (group // meta["COVERED"]),)](
            features, index, weight, bias, out, C, N, eps, NORM=norm, HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None, **meta, **config(C),
        )  # fmt: skip
    return out


def patch_merge_backward(
    grad: torch.Tensor,
    features: torch.Tensor,
    index: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    group: int,
    norm: str,
    norm_after: bool,
    channels_first: bool,
    eps: float,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As ``reference.patch_merge_backward``."""
    features, index, M, meta = _arguments(features, index, group, norm_after, channels_first)
    grad, (N, C) = grad.contiguous(), features.shape
    columns = C * meta["COVERED"]
    norms = M * (group // meta["COVERED"])
    d_features = features.new_zeros(N, C) if index is not None else features.new_empty(N, C)
    stats = torch.empty((norms, 2), dtype=torch.float32, device=features.device)
    splits = max(1, min(_SPLITS, norms // 8))
    partial = torch.zeros((2, splits, columns), dtype=torch.float32, device=features.device)
    if grad.numel():
        weight = None if weight is None else weight.contiguous()
        _grad_kernel[(norms,)](
            grad, features, index, weight, d_features, stats, C, N, eps, NORM=norm,
            HAS_WEIGHT=weight is not None, **meta, **config(C),
        )  # fmt: skip
        if needs[1] or needs[2]:
            _grad_norm_kernel[(triton.cdiv(columns, 128), splits)](
                grad, features, index, stats, partial, C, N, M, triton.cdiv(norms, splits), columns,
                BLOCK=128, num_warps=4, **meta,
            )  # fmt: skip
    d_weight, d_bias = partial.sum(1).to(features.dtype)
    return (
        d_features if needs[0] else features.new_empty(0),
        d_weight.clone() if needs[1] else features.new_empty(0),
        d_bias.clone() if needs[2] else features.new_empty(0),
    )
