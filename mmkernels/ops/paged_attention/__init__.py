# SPDX-License-Identifier: Apache-2.0
"""Attention over a paged KV cache, a shared prefix once a group."""

from mmkernels.ops.paged_attention.api import paged_attention

__all__ = ["paged_attention"]
