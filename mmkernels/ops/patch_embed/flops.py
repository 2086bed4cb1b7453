# SPDX-License-Identifier: Apache-2.0
"""FLOPs of patch embedding, for ``torch.utils.flop_counter.FlopCounterMode``: as it counts the convolution's.

A still frame under a temporal weight counts as the clip it stands for, like the ``Conv3d``, though half may be saved.
"""

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from mmkernels.ops.patch_embed.layout import Layout
from mmkernels.ops.patch_embed.op import token_count


def _product(
    images: list[torch.Tensor],
    weight: torch.Tensor,
    grid_thw: torch.Tensor | None,
    layout: tuple[Any, ...],
) -> int:
    """Of all patches with the weight."""
    patches = token_count(images, weight, 0, grid_thw, Layout(*layout))
    return 2 * int(patches) * weight.numel()


@register_flop_formula(torch.ops.mmkernels.patch_embed, get_raw=True)
def forward(
    images: list[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    positions: list[torch.Tensor],
    prefix_tokens: torch.Tensor | None,
    grid_thw: torch.Tensor | None,
    pixel_scale: list[float] | None,
    pixel_shift: list[float] | None,
    *layout: Any,
    **_: Any,
) -> int:
    """One product."""
    return _product(images, weight, grid_thw, layout)


@register_flop_formula(torch.ops.mmkernels.patch_embed_backward, get_raw=True)
def backward(
    grad: torch.Tensor,
    images: list[torch.Tensor],
    weight: torch.Tensor,
    grid_thw: torch.Tensor | None,
    pixel_scale: list[float] | None,
    pixel_shift: list[float] | None,
    prefix_rows: int,
    position_shape: list[int],
    needs: list[bool],
    *layout: Any,
    **_: Any,
) -> int:
    """One product for the gradient of the pixels, one for that of the weight."""
    return _product(images, weight, grid_thw, layout) * (bool(needs[0]) + bool(needs[1]))
