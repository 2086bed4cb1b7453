# SPDX-License-Identifier: Apache-2.0
"""The reference MM-LLM; ``mmllm.py`` shows the whole flow."""

from mmkernels.models.config import AudioConfig, DecoderConfig, MMConfig, VisionConfig
from mmkernels.models.features import Features
from mmkernels.models.generate import answer, draw, generate
from mmkernels.models.mmllm import MMLLM
from mmkernels.models.parts import from_parts

__all__ = [
    "MMLLM",
    "AudioConfig",
    "DecoderConfig",
    "Features",
    "MMConfig",
    "VisionConfig",
    "answer",
    "draw",
    "from_parts",
    "generate",
]
