# SPDX-License-Identifier: Apache-2.0
"""Patch embedding: images to patch tokens."""

from mmkernels.ops.patch_embed.api import patch_embed

__all__ = ["patch_embed"]
