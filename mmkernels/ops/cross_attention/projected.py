# SPDX-License-Identifier: Apache-2.0
"""Cross-attention the usual way, where forming K and V is cheaper: torch's GEMMs and SDPA."""

import torch
import torch.nn.functional as F

from mmkernels import transforms
from mmkernels.ops.cross_attention.arguments import over_latents
from mmkernels.ops.norm import Norm
from mmkernels.ops.patch_merge.api import normed


def projected(
    query: torch.Tensor,
    context: torch.Tensor,
    latents: torch.Tensor | None,
    weights: tuple[torch.Tensor | None, ...],
    mask: torch.Tensor | None,
    position: tuple[torch.Tensor, ...],
    A: int,
    scale: float,
    dropout_p: float,
    key_norm: Norm | None = None,
) -> torch.Tensor:
    """``[B, Q, A·d]``; mask and position are the context's.

    Context and latents are projected one by one: what is joined is K and V, not the wider sources.
    """
    sources = [context] if latents is None else [context, latents]
    key_weight, value_weight, key_bias, value_bias = weights
    assert key_weight is not None and value_weight is not None
    keys = [F.linear(s, key_weight, key_bias) for s in sources]
    if position:
        keys[0] = keys[0] + _of_tokens([F.linear(p, key_weight) for p in position])
    values = [F.linear(s, value_weight, value_bias) for s in sources]
    key, value = (t[0] if len(t) == 1 else torch.cat(t, 1) for t in (keys, values))
    query = query.expand(key.shape[0], *query.shape[-2:])
    q, k, v = (t.unflatten(-1, (A, -1)).transpose(1, 2) for t in (query, key, value))
    k = k if key_norm is None else normed(k, key_norm)
    if mask is not None:
        mask = mask.to(k.dtype) if mask.is_floating_point() else mask
    mask = over_latents(mask, latents)
    with transforms.plain_attention((q, k, v, mask)):
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, scale=scale)
    return out.transpose(1, 2).flatten(2)


def _of_tokens(tables: list[torch.Tensor]) -> torch.Tensor:
    """``[n, ·]``, of a grid the sum of its row and its column."""
    if len(tables) == 1:
        return tables[0]
    rows, columns = tables
    return (rows[:, None] + columns[None]).flatten(0, 1)
