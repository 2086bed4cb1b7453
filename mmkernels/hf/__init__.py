# SPDX-License-Identifier: Apache-2.0
"""``patch(model)``: the ops in models as they are, by a table of rows applied to instances."""

from mmkernels.hf.patched import NothingToPatch, Patched, patch

__all__ = ["NothingToPatch", "Patched", "patch"]
