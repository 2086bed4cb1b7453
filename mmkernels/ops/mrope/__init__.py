# SPDX-License-Identifier: Apache-2.0
"""Rotary positions of one or more axes, differentiable."""

from mmkernels.ops.mrope.api import mrope
from mmkernels.ops.mrope.table import RopeTable, rope_table

__all__ = ["RopeTable", "mrope", "rope_table"]
