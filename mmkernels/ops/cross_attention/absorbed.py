# SPDX-License-Identifier: Apache-2.0
"""Cross-attention without K and V: our op."""

import torch
import torch.nn.functional as F

from mmkernels.ops.cross_attention import flops  # noqa: F401 (registers the formulas)
from mmkernels.ops.cross_attention.arguments import over_latents
from mmkernels.ops.cross_attention.op import FORWARD


def absorbed(
    query: torch.Tensor,
    context: torch.Tensor,
    latents: torch.Tensor | None,
    weights: tuple[torch.Tensor | None, ...],
    mask: torch.Tensor | None,
    position: tuple[torch.Tensor, ...],
    A: int,
    scale: float,
    dropout_p: float,
) -> torch.Tensor:
    """As ``projected``."""
    if position:
        scores = position_scores(query, position, weights[0], A, scale)
        mask = _add_scores(mask, scores, context)
    mask = over_latents(mask, latents)
    n = context.shape[1] + (0 if latents is None else latents.shape[1])
    keep = None
    if dropout_p > 0:
        keep = torch.rand(len(context), A, query.shape[-2], n, device=context.device) >= dropout_p
    out: torch.Tensor = FORWARD(query, context, latents, *weights, mask, keep, A, scale, dropout_p)[
        0
    ]
    return out


def position_scores(
    query: torch.Tensor,
    position: tuple[torch.Tensor, ...],
    key_weight: torch.Tensor | None,
    A: int,
    scale: float,
) -> torch.Tensor:
    """What positions of keys add to the scores, ``[1 or B, A, Q, n]``, at least in fp32: a table at a time."""
    assert key_weight is not None
    wide = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        q = query.to(wide).unflatten(-1, (A, -1)).transpose(-2, -3) * scale
        weight = key_weight.to(wide)  # once: its gradient then rounds once
        tables = [F.linear(p.to(wide), weight) for p in position]
        scores = [q @ t.unflatten(-1, (A, -1)).permute(1, 2, 0) for t in tables]
    if len(scores) == 2:
        rows, columns = scores
        scores = [(rows[..., :, None] + columns[..., None, :]).flatten(-2)]
    return scores[0] if query.dim() == 3 else scores[0][None]


def _add_scores(
    mask: torch.Tensor | None, scores: torch.Tensor, context: torch.Tensor
) -> torch.Tensor:
    if mask is None:
        return scores.expand(context.shape[0], *scores.shape[1:])
    if mask.dtype == torch.bool:
        return torch.where(mask, scores, -torch.inf)
    return scores + mask
