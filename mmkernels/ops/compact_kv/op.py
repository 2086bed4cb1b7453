# SPDX-License-Identifier: Apache-2.0
"""Compaction as a torch op: schema and shapes. The contract every kernel keeps.

``mmkernels::compact_kv``; arguments are those of ``reference.py``. Writes the caches, returns new lengths. No autograd,
nothing for autocast. Kernels: ``csrc/compact_kv/compact_kv_cpu.cpp`` on CPU, ``triton.py`` on CUDA.
"""

from typing import Any

import torch

from mmkernels import backends
from mmkernels.ops.compact_kv import reference


def _fake(key_cache: torch.Tensor, value_cache: torch.Tensor, *rest: Any) -> torch.Tensor:
    seq_lens = rest[2]
    return seq_lens.new_empty(seq_lens.shape, dtype=torch.int64)


FORWARD = backends.define(
    "compact_kv",
    "(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor block_table, Tensor target_table, Tensor seq_lens,"
    " Tensor keep) -> Tensor",
    reference=reference.compact_kv,
    fake=_fake,
    autocast_skip=tuple(range(6)),
)
backends.register_triton(FORWARD, "mmkernels.ops.compact_kv.triton")
