# SPDX-License-Identifier: Apache-2.0
"""Tokens out of the pages of every layer, in place."""

from mmkernels.ops.compact_kv.api import CompactedKV, compact_kv

__all__ = ["CompactedKV", "compact_kv"]
