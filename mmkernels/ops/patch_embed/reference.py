# SPDX-License-Identifier: Apache-2.0
"""Patch embedding in plain PyTorch: the definition of correct.

Dimensions: B images, C channels, H×W pixels, P×P a patch, N patches an image, K=C·P·P values a patch,
D width, R prefix tokens, S rows of the position table (the last N of them for the patches).

What rounds where: pixels are normalised in fp64 and rounded once to the weight's dtype; the product
and bias follow ``F.linear`` (accumulated in at least fp32, rounded once); adding the position rounds
once more, as it does in eager models.
"""

import torch
import torch.nn.functional as F


def patch_rows(
    pixel_values: torch.Tensor,
    weight: torch.Tensor,
    pixel_scale: list[float] | None,
    pixel_shift: list[float] | None,
) -> torch.Tensor:
    """Normalised patches ``[B, N, K]`` in the weight's dtype, K in the order of the conv weight."""
    B, C = pixel_values.shape[:2]
    P_h, P_w = weight.shape[2:]
    x = pixel_values
    if pixel_scale is not None and pixel_shift is not None:
        scale = torch.tensor(pixel_scale, dtype=torch.float64, device=x.device).view(-1, 1, 1)
        shift = torch.tensor(pixel_shift, dtype=torch.float64, device=x.device).view(-1, 1, 1)
        x = x.double() * scale + shift
    x = x.to(weight.dtype)
    h, w = x.shape[2] // P_h, x.shape[3] // P_w
    patches_BChPwP = x.reshape(B, C, h, P_h, w, P_w)
    return patches_BChPwP.permute(0, 2, 4, 1, 3, 5).reshape(B, h * w, C * P_h * P_w)


def patch_embed(
    pixel_values: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    position_embed: torch.Tensor | None,
    prefix_tokens: torch.Tensor | None,
    pixel_scale: list[float] | None,
    pixel_shift: list[float] | None,
) -> torch.Tensor:
    """``[B, R+N, D]``: prefix tokens, then ``weight @ patch + bias``, plus the position rows."""
    rows_BNK = patch_rows(pixel_values, weight, pixel_scale, pixel_shift)
    tokens = F.linear(rows_BNK, weight.flatten(1), bias)
    B, N, D = tokens.shape
    R = 0
    if prefix_tokens is not None:
        R = prefix_tokens.shape[0]
        tokens = torch.cat([prefix_tokens.expand(B, R, D), tokens], dim=1)
    if position_embed is None:
        return tokens
    S = position_embed.shape[0]
    positioned = S - N  # the first S-N prefix tokens have a position of their own
    if positioned == R:
        return tokens + position_embed
    gap = position_embed.new_zeros(R - positioned, D)
    return tokens + torch.cat([position_embed[:positioned], gap, position_embed[positioned:]])


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
    """Gradients of (pixel_values, weight, bias, position_embed, prefix_tokens); empty if not needed.

    ``needs`` says which, in that order. Sums run in at least fp32 and round once.
    """
    B, _, D = grad.shape
    acc = torch.float64 if weight.dtype == torch.float64 else torch.float32
    grad_tokens = grad[:, prefix_rows:]
    empty = weight.new_empty(0)
    d_pixels, d_weight, d_bias, d_position, d_prefix = empty, empty, empty, empty, empty
    if needs[0]:
        d_pixels = _grad_pixels(grad_tokens, pixel_values, weight, pixel_scale)
    if needs[1]:
        rows_BNK = patch_rows(pixel_values, weight, pixel_scale, pixel_shift)
        d_weight = (grad_tokens.reshape(-1, D).t() @ rows_BNK.flatten(0, 1)).view_as(weight)
    if needs[2]:
        d_bias = grad_tokens.sum((0, 1), dtype=acc).to(weight.dtype)
    if needs[3]:
        summed = grad.sum(0, dtype=acc).to(weight.dtype)
        positioned = position_rows - grad_tokens.shape[1]
        d_position = torch.cat([summed[:positioned], summed[prefix_rows:]])
    if needs[4]:
        d_prefix = grad[:, :prefix_rows].sum(0, dtype=acc).to(weight.dtype)
    return d_pixels, d_weight, d_bias, d_position, d_prefix


def _grad_pixels(
    grad_tokens: torch.Tensor,
    pixel_values: torch.Tensor,
    weight: torch.Tensor,
    pixel_scale: list[float] | None,
) -> torch.Tensor:
    B, C, H, W = pixel_values.shape
    P_h, P_w = weight.shape[2:]
    rows_BNK = grad_tokens @ weight.flatten(1)
    patches = rows_BNK.view(B, H // P_h, W // P_w, C, P_h, P_w)
    d_pixels = patches.permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)
    if pixel_scale is not None:
        scale = torch.tensor(pixel_scale, dtype=torch.float64, device=weight.device)
        d_pixels = d_pixels.double() * scale.view(-1, 1, 1)
    return d_pixels.to(pixel_values.dtype)
