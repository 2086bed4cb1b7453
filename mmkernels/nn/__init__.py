# SPDX-License-Identifier: Apache-2.0
"""Modules over the ops; parameters are named as in the layers they replace."""

from mmkernels.nn.cross_attention import CrossAttention
from mmkernels.nn.patch_embed import AudioPatchEmbed, PackedPatchEmbed, PatchEmbed
from mmkernels.nn.qformer import QFormer

__all__ = ["AudioPatchEmbed", "CrossAttention", "PackedPatchEmbed", "PatchEmbed", "QFormer"]
