# SPDX-License-Identifier: Apache-2.0
"""The ops. ``OPS`` names them; tests and benchmarks walk it and read ``ops/<op>/cases.py``."""

from mmkernels.ops.compact_kv import CompactedKV, compact_kv
from mmkernels.ops.cross_attention import cross_attention
from mmkernels.ops.merge_embeddings import merge_embeddings, poll_errors
from mmkernels.ops.mrope import RopeTable, mrope, rope_table
from mmkernels.ops.mrope_positions import mrope_positions
from mmkernels.ops.norm import Norm
from mmkernels.ops.pack_embeddings import PackPlan, pack_bins, pack_embeddings, plan_pack
from mmkernels.ops.paged_attention import paged_attention
from mmkernels.ops.patch_embed import PackedPatches, patch_embed, patch_embed_packed
from mmkernels.ops.patch_merge import patch_merge
from mmkernels.ops.rope_write_kv import rope_write_kv

# isort: split
from mmkernels.ops import flops  # noqa: F401 (registers the formulas, of ops that are defined)

OPS = (
    "patch_embed",
    "cross_attention",
    "merge_embeddings",
    "patch_merge",
    "pack_embeddings",
    "mrope_positions",
    "mrope",
    "rope_write_kv",
    "paged_attention",
    "compact_kv",
)

__all__ = [
    "OPS",
    "CompactedKV",
    "Norm",
    "PackPlan",
    "PackedPatches",
    "RopeTable",
    "compact_kv",
    "cross_attention",
    "merge_embeddings",
    "mrope",
    "mrope_positions",
    "pack_bins",
    "pack_embeddings",
    "paged_attention",
    "patch_embed",
    "patch_embed_packed",
    "patch_merge",
    "plan_pack",
    "poll_errors",
    "rope_table",
    "rope_write_kv",
]
