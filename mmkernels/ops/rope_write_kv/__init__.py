# SPDX-License-Identifier: Apache-2.0
"""Rotary positions and the write into a paged KV cache, in one pass."""

from mmkernels.ops.rope_write_kv.api import rope_write_kv

__all__ = ["rope_write_kv"]
