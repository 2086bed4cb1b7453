# SPDX-License-Identifier: Apache-2.0
"""FLOPs of every op, for ``torch.utils.flop_counter.FlopCounterMode``, which counts matrix products alone.

Without a formula a custom op counts nothing, and the utilisation that a trainer reports is too low. The ops that
multiply matrices have a ``flops.py`` of their own. The others move rows, rotate, normalise or write: 0, as torch counts
a gather, a norm or a sum.
"""

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from mmkernels.ops.cross_attention import flops as cross_attention
from mmkernels.ops.paged_attention import flops as paged_attention
from mmkernels.ops.patch_embed import flops as patch_embed

MULTIPLYING = (cross_attention, paged_attention, patch_embed)
MOVING = (
    "patch_embed_grids",
    "patch_merge",
    "patch_merge_backward",
    "merge_embeddings",
    "merge_embeddings_out",
    "merge_embeddings_backward",
    "pack_embeddings",
    "pack_embeddings_backward",
    "mrope",
    "mrope_backward",
    "mrope_positions",
    "rope_write_kv",
    "compact_kv",
)


@register_flop_formula([getattr(torch.ops.mmkernels, name) for name in MOVING])
def nothing(*args: Any, **kwargs: Any) -> int:
    """No matrix product."""
    return 0
