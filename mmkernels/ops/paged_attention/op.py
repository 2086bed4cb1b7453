# SPDX-License-Identifier: Apache-2.0
"""Attention over pages as a torch op: schema and shapes. The contract every kernel keeps.

``mmkernels::paged_attention``; arguments are those of ``reference.py``. No autograd: caches are written in place, so
there is nothing to go back through. Autocast changes nothing here; ``api.py`` brings the query to the caches' dtype.
Kernels: ``csrc/paged_attention/paged_attention_cpu.cpp`` on CPU, ``triton.py`` on CUDA.
"""

from typing import Any

import torch

from mmkernels import backends
from mmkernels.ops.paged_attention import reference


def _fake(query: torch.Tensor, *rest: Any) -> torch.Tensor:
    return query.new_empty(query.shape)


FORWARD = backends.define(
    "paged_attention",
    "(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor seq_lens, Tensor? cu_seqlens_q,"
    " Tensor? k_scale, Tensor? v_scale, Tensor? group_of_seq, Tensor? prefix_pages, Tensor? prefix_lens, bool causal,"
    " float scale) -> Tensor",
    reference=reference.paged_attention,
    fake=_fake,
    autocast_skip=tuple(range(11)),
)
backends.register_triton(FORWARD, "mmkernels.ops.paged_attention.triton")
