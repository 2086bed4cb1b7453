# SPDX-License-Identifier: Apache-2.0
"""Neighbouring tokens side by side in one, with the norm before or after."""

from mmkernels.ops.patch_merge.api import patch_merge

__all__ = ["patch_merge"]
