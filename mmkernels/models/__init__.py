# SPDX-License-Identifier: Apache-2.0
"""The reference MM-LLM; ``mmllm.py`` shows the whole flow."""

from mmkernels.models.config import DecoderConfig, MMConfig, ProjectorConfig, VisionConfig
from mmkernels.models.mmllm import MMLLM

__all__ = ["MMLLM", "DecoderConfig", "MMConfig", "ProjectorConfig", "VisionConfig"]
