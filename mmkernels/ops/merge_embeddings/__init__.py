# SPDX-License-Identifier: Apache-2.0
"""Merging: token lookup and feature scatter in one pass."""

from mmkernels.ops.merge_embeddings.api import merge_embeddings, poll_errors

__all__ = ["merge_embeddings", "poll_errors"]
