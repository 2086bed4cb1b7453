# SPDX-License-Identifier: Apache-2.0
"""Modules over the ops; parameters are named as in the layers they replace."""

from mmkernels.nn.attention_pool import AttentionPool
from mmkernels.nn.cross_attention import CrossAttention
from mmkernels.nn.merger import MLPProjector, PatchMerger
from mmkernels.nn.patch_embed import AudioPatchEmbed, PackedPatchEmbed, PatchEmbed
from mmkernels.nn.perceiver import PerceiverResampler
from mmkernels.nn.qformer import QFormer
from mmkernels.nn.resampler import Resampler

__all__ = [
    "AttentionPool",
    "AudioPatchEmbed",
    "CrossAttention",
    "MLPProjector",
    "PackedPatchEmbed",
    "PatchEmbed",
    "PatchMerger",
    "PerceiverResampler",
    "QFormer",
    "Resampler",
]
