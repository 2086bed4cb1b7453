# SPDX-License-Identifier: Apache-2.0
"""mmkernels: fused kernels for the multimodal front of MM-LLMs, as torch ops."""

from mmkernels.backends import backend, load_native
from mmkernels.ops import (
    OPS,
    CompactedKV,
    Norm,
    PackedPatches,
    PackPlan,
    RopeTable,
    compact_kv,
    cross_attention,
    merge_embeddings,
    mrope,
    mrope_positions,
    pack_bins,
    pack_embeddings,
    paged_attention,
    patch_embed,
    patch_embed_packed,
    patch_merge,
    plan_pack,
    poll_errors,
    rope_table,
    rope_write_kv,
)
from mmkernels.version import __version__

# hf is made of the ops above.
# isort: split
from mmkernels.hf import NothingToPatch, Patched, patch

load_native()

__all__ = [
    "OPS",
    "CompactedKV",
    "Norm",
    "NothingToPatch",
    "PackPlan",
    "PackedPatches",
    "Patched",
    "RopeTable",
    "__version__",
    "backend",
    "compact_kv",
    "cross_attention",
    "merge_embeddings",
    "mrope",
    "mrope_positions",
    "pack_bins",
    "pack_embeddings",
    "paged_attention",
    "patch",
    "patch_embed",
    "patch_embed_packed",
    "patch_merge",
    "plan_pack",
    "poll_errors",
    "rope_table",
    "rope_write_kv",
]
