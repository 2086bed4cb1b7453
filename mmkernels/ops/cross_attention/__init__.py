# SPDX-License-Identifier: Apache-2.0
"""Learned-query cross-attention with its K and V projections inside."""

from mmkernels.ops.cross_attention.api import cross_attention
from mmkernels.ops.cross_attention.arguments import Position

__all__ = ["Position", "cross_attention"]
