# SPDX-License-Identifier: Apache-2.0
"""Patch merging in plain PyTorch: the definition of correct.

Dimensions: N rows of C features, M merged rows of J neighbours each.

Row m is ``features[index[m, 0]] … features[index[m, J−1]]`` side by side; −1 is a row of zeros, no row occurs twice.
The norm is that of each row of C (before) or of the merged J·C (after, in the order they are returned in). What
rounds where: everything in at least fp32, one rounding at the end.
"""

import torch
import torch.nn.functional as F


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
    """``[M, J·C]``, of row m the J neighbours one after the other, or of each channel the J values.

    ``index`` is ``[M, J]``; without it ``group`` = J rows after each other are merged.
    """
    acc = torch.promote_types(features.dtype, torch.float32)
    w, b = (None if t is None else t.to(acc) for t in (weight, bias))
    rows = features.to(acc)
    if norm != "none" and not norm_after:
        rows = _normalised(rows, norm, w, b, eps)
    merged = gathered(rows, index, group)  # zeros stay zeros: they have no norm
    merged = (merged.transpose(1, 2) if channels_first else merged).flatten(1)
    if norm != "none" and norm_after:
        merged = _normalised(merged, norm, w, b, eps)
    return merged.to(features.dtype)


def gathered(rows: torch.Tensor, index: torch.Tensor | None, group: int) -> torch.Tensor:
    """``[M, J, C]``."""
    if index is None:
        return rows.reshape(len(rows) // group, group, rows.shape[1])
    return F.pad(rows, (0, 0, 0, 1))[torch.where(index < 0, len(rows), index)]


def _normalised(
    rows: torch.Tensor,
    norm: str,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    if norm == "layer":
        return F.layer_norm(rows, rows.shape[-1:], weight, bias, eps)
    return F.rms_norm(rows, rows.shape[-1:], weight, eps)


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
    """Gradients of (features, weight, bias); empty where ``needs`` says no."""
    acc, (N, C) = torch.promote_types(features.dtype, torch.float32), features.shape
    x = gathered(features.to(acc), index, group)
    x = (x.transpose(1, 2) if channels_first else x).flatten(1)
    g = grad.to(acc)
    if not norm_after:  # rows of C again
        g, x = (_split(t, C, channels_first) for t in (g, x))
    d_x, d_weight, d_bias = g, g, g
    if norm != "none":
        d_x, d_weight, d_bias = _through_norm(g, x, norm, weight, eps)
    if norm_after:
        d_x = _split(d_x, C, channels_first)
    if index is None:
        d_features = d_x.reshape(N, C)
    else:
        d_features = g.new_zeros(N + 1, C)
        d_features[torch.where(index < 0, N, index).flatten()] = d_x
        d_features = d_features[:N]
    if norm != "none" and not norm_after and index is not None:
        kept = (index >= 0).view(-1, 1)  # what was padded is 0 whatever the norm
        d_weight, d_bias = d_weight * kept, d_bias * kept
    found = (d_features, d_weight.sum(0), d_bias.sum(0))
    return tuple(  # type: ignore[return-value]
        t.to(features.dtype) if need else features.new_empty(0)
        for t, need in zip(found, needs, strict=True)
    )


def _split(merged: torch.Tensor, C: int, channels_first: bool) -> torch.Tensor:
    """``[M, J·C]`` → ``[M·J, C]``."""
    if channels_first:
        merged = merged.view(len(merged), C, -1).transpose(1, 2)
    return merged.reshape(-1, C)


def _through_norm(
    g: torch.Tensor, x: torch.Tensor, norm: str, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of rows: the gradient of the normalised x, and the terms of those of weight and bias."""
    centred = x - x.mean(-1, keepdim=True) if norm == "layer" else x
    r = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y, a = centred * r, g if weight is None else g * weight.to(g.dtype)
    d_x = a - y * (a * y).mean(-1, keepdim=True)
    if norm == "layer":
        d_x = d_x - a.mean(-1, keepdim=True)
    return d_x * r, g * y, g
