# SPDX-License-Identifier: Apache-2.0
"""``mmkernels::mrope_positions``: schema and shapes. Positions have no gradient.

Arguments are those of ``reference.py``; ``family`` is a row of ``families.py``. Kernels:
``csrc/mrope_positions/mrope_positions_cpu.cpp`` on CPU, ``triton.py`` on CUDA.
"""

from typing import Any

import torch

from mmkernels import backends
from mmkernels.ops.mrope_positions import reference
from mmkernels.ops.mrope_positions.families import Family


def _fake(
    input_ids: torch.Tensor,
    mm_token_type_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    rule = Family(*rest[-1])
    dtype = torch.float32 if rule.fractional else torch.int64
    packed = cu_seqlens is not None
    samples = 1 if input_ids.dim() == 1 else input_ids.shape[0]
    if cu_seqlens is not None:
        samples = cu_seqlens.shape[0] - 1
    return (
        input_ids.new_empty((rule.axes + packed, *input_ids.shape), dtype=dtype),
        input_ids.new_empty((samples, 1), dtype=dtype),
    )


FORWARD = backends.define(
    "mrope_positions",
    "(Tensor input_ids, Tensor? mm_token_type_ids, Tensor? attention_mask, Tensor? cu_seqlens, Tensor? image_grid,"
    " Tensor? video_grid, Tensor? seconds, Tensor? audio_seqlens, Tensor? images_per_sample, int[] family)"
    " -> (Tensor, Tensor)",
    reference=reference.mrope_positions,
    fake=_fake,
    autocast_skip=(6,),
)
