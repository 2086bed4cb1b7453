# SPDX-License-Identifier: Apache-2.0
"""Published MM-LLMs as configurations: ``preset("BLIP-2")`` at its size, ``preset("BLIP-2", "tiny")`` in small.

The systems of the survey "MM-LLMs: Recent Advances in MultiModal Large Language Models" (Zhang et al. 2024) that take
images, video or audio. Each entry says of each component where its sizes come from and how what is built differs;
``docs/systems.md`` is made of them (``python -m mmkernels.models.presets``).
"""

from fnmatch import fnmatchcase

from torch import nn

from mmkernels.models.config import MMConfig
from mmkernels.models.presets import drawing, linear, qformer, resampling
from mmkernels.models.presets.schema import Part, Preset, Stage
from mmkernels.models.presets.tiny import tiny

PRESETS: dict[str, Preset] = {
    p.name: p
    for p in (
        resampling.FLAMINGO, qformer.BLIP2, linear.LLAVA, qformer.MINIGPT4, resampling.MPLUG_OWL, resampling.OTTER,
        qformer.X_LLM, qformer.VIDEOCHAT, qformer.INSTRUCTBLIP, linear.PANDAGPT, drawing.GILL, linear.PALI_X,
        qformer.VIDEO_LLAMA, linear.VIDEO_CHATGPT, linear.SHIKRA, qformer.DLP, qformer.BUBOGPT, linear.CHATSPOT,
        resampling.QWEN_VL, drawing.LAVIT, drawing.NEXT_GPT, drawing.DREAMLLM, resampling.ANYMAL, drawing.MINIGPT5,
        linear.LLAVA_15, linear.MINIGPT_V2, linear.COGVLM, linear.QWEN_AUDIO, qformer.X_INSTRUCTBLIP, drawing.CODI_2,
        linear.VILA, linear.INTERNVL, resampling.MINICPM_V,
    )
}  # fmt: skip


def preset(name: str, scale: str = "full") -> MMConfig:
    """A system's configuration, ``scale`` ``"full"`` or ``"tiny"``: ``with torch.device("meta"): MMLLM(preset(name))``.

    Raises:
        ValueError: No such system or scale.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: name must be one of {list(PRESETS)}, got {name!r}")
    if scale not in ("full", "tiny"):
        raise ValueError(f"preset: scale must be 'full' or 'tiny', got {scale!r}")
    config = PRESETS[name].config
    return config if scale == "full" else tiny(config)


def learn(model: nn.Module, stage: Stage) -> list[str]:
    """Freezes all but what learns in that stage; names of the parameters that do."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in stage.learns))
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


__all__ = ["PRESETS", "Part", "Preset", "Stage", "learn", "preset"]
