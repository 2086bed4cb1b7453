# SPDX-License-Identifier: Apache-2.0
"""FLOPs of attention over pages, for ``torch.utils.flop_counter.FlopCounterMode``: as it counts SDPA's.

Every query meets every key of its sequence, those of a shared prefix included; what ``causal`` hides counts, as there.
"""

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from mmkernels.ops.paged_attention import op  # noqa: F401 (defines the op)


@register_flop_formula(torch.ops.mmkernels.paged_attention, get_raw=True)
def forward(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    group_of_seq: torch.Tensor | None,
    prefix_pages: torch.Tensor | None,
    prefix_lens: torch.Tensor | None,
    *rest: Any,
    **_: Any,
) -> int:
    """Scores, and probabilities times values. Without the numbers of ``seq_lens``: of full pages."""
    T, heads, d = query.shape
    if isinstance(seq_lens, FakeTensor) or seq_lens.device.type == "meta":
        tables = block_table.shape[1] + (0 if prefix_pages is None else prefix_pages.shape[1])
        return 4 * heads * d * T * tables * key_cache.shape[1]
    keys = seq_lens.long()
    if group_of_seq is not None and prefix_lens is not None and len(prefix_lens):
        shared = prefix_lens.long()[group_of_seq.long().clamp(min=0)]
        keys = keys + torch.where(group_of_seq >= 0, shared, 0)
    queries = torch.ones_like(keys) if cu_seqlens_q is None else cu_seqlens_q.diff()
    return 4 * heads * d * int((queries * keys).sum())
