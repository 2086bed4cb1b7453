# SPDX-License-Identifier: Apache-2.0
"""Patch embedding: images to patch tokens."""

from mmkernels.ops.patch_embed.api import patch_embed
from mmkernels.ops.patch_embed.packed import PackedPatches, patch_embed_packed

__all__ = ["PackedPatches", "patch_embed", "patch_embed_packed"]
