# SPDX-License-Identifier: Apache-2.0
"""Rotary positions and the paged write as a torch op: schema and shapes. The contract every kernel keeps.

``mmkernels::rope_write_kv``; arguments are those of ``reference.py``. It writes two of them and has no gradient.
Kernels: ``csrc/rope/`` (C++ on CPU, CUDA C++ on CUDA).
"""

from typing import Any

import torch

from mmkernels import backends
from mmkernels.ops.rope_write_kv import reference


def _fake(query: torch.Tensor, key: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


FORWARD = backends.define(
    "rope_write_kv",
    "(Tensor query, Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache,"
    " Tensor slot_mapping, Tensor position_ids, Tensor inv_freq, Tensor? axis, str pairing,"
    " float attention_scaling, Tensor? q_norm, Tensor? k_norm, float eps, Tensor? k_scale,"
    " Tensor? v_scale) -> (Tensor, Tensor)",
    reference=reference.rope_write_kv,
    fake=_fake,
    autocast_skip=(3, 4, 7, 14, 15),
)
