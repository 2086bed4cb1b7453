# SPDX-License-Identifier: Apache-2.0
"""Multimodal rotary positions: transformers' ``get_rope_index`` of every family, as one op."""

from mmkernels.ops.mrope_positions.api import mrope_positions
from mmkernels.ops.mrope_positions.families import FAMILIES, Family, family_of

__all__ = ["FAMILIES", "Family", "family_of", "mrope_positions"]
