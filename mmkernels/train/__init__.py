# SPDX-License-Identifier: Apache-2.0
"""Training of the reference MM-LLM: data, stages, checkpoints, evaluation; a collator for everybody's."""

from mmkernels.train.collator import PackingCollator

__all__ = ["PackingCollator"]
