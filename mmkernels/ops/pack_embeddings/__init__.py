# SPDX-License-Identifier: Apache-2.0
"""``plan_pack`` and ``pack_embeddings``: samples of text and features as one sequence without padding."""

from mmkernels.ops.pack_embeddings.api import pack_embeddings
from mmkernels.ops.pack_embeddings.bins import pack_bins
from mmkernels.ops.pack_embeddings.plan import PackPlan, plan_pack

__all__ = ["PackPlan", "pack_bins", "pack_embeddings", "plan_pack"]
