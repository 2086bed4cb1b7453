# SPDX-License-Identifier: Apache-2.0
"""FLOPs of the absorbed algorithm, for ``torch.utils.flop_counter.FlopCounterMode``."""

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from mmkernels.ops.cross_attention import op  # noqa: F401 (defines the ops)

Shape = tuple[int, ...]


def _products(
    query: Shape,
    context: Shape,
    latents: Shape | None,
    offsets: Shape | None,
    width: int,
    heads: int,
) -> tuple[int, int, int]:
    """FLOPs of a product of all query rows with a weight, with and without a shared query's, and of one of all score
    rows with all keys."""
    B, X = context[0] if offsets is None else offsets[0] - 1, context[-1]
    keys = context[0] * (context[1] if offsets is None else 1) + (B * latents[1] if latents else 0)
    through = 2 * query[-2] * width * X
    return B * through, through * (B if len(query) == 3 else 1), 2 * heads * query[-2] * keys * X


@register_flop_formula(torch.ops.mmkernels.cross_attention)
def forward(
    query: Shape, context: Shape, latents: Shape | None, key_weight: Shape, *rest: Any, **_: Any
) -> int:
    """q' and the output's projection; scores and P·X."""
    offsets, heads = rest[-5], rest[-3]
    all_rows, own_rows, scores = _products(query, context, latents, offsets, key_weight[0], heads)
    return own_rows + all_rows + 2 * scores


@register_flop_formula(torch.ops.mmkernels.cross_attention_backward)
def backward(
    grad: Shape,
    query: Shape,
    context: Shape,
    latents: Shape | None,
    key_weight: Shape,
    *rest: Any,
    **_: Any,
) -> int:
    """q', dZ, scores and dP; then what each gradient asks for."""
    offsets, heads, needs = rest[-8], rest[-4], rest[-1]
    all_rows, own_rows, scores = _products(query, context, latents, offsets, key_weight[0], heads)
    flops = own_rows + all_rows + 2 * scores
    flops += 2 * scores * (bool(needs[0] or needs[3] or needs[4]) + bool(needs[1] or needs[2]))
    return flops + own_rows * bool(needs[0]) + all_rows * (bool(needs[3]) + bool(needs[4]))
