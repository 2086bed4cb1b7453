# SPDX-License-Identifier: Apache-2.0
"""A diffusers pipeline in the place of our generator: the output projector's conditions are its prompt embeddings.

Dimensions: n pictures, m condition tokens, C their width, H×W pixels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


class DiffusersGenerator:
    """``conditions`` and ``generate`` of ``ImageGenerator``, by a pipeline called like ``StableDiffusionPipeline``.

    Called on what ``MMLLM.output_projector`` gives. Not a ``Module``, so ``MMLLM.generator`` takes it only in a model
    configured without a generator; its weights are then in no state_dict of the model.

    Args:
        pipeline: Takes ``prompt_embeds`` and has ``encode_prompt``, ``device`` and ``unet``. It is frozen: nothing here
            has gradients.
    Source: diffusers 0.42.1, pipelines/stable_diffusion/pipeline_stable_diffusion.py; GILL and NExT-GPT draw this way.
    """

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    @classmethod
    def from_folder(cls, folder: Path) -> "DiffusersGenerator":
        """Loads what ``save_pretrained`` wrote, safetensors only.

        Raises:
            ImportError: diffusers is not installed.
            ValueError: There is no such folder.
        """
        if not folder.is_dir():
            raise ValueError(f"generator: {folder} must be the folder of a diffusers pipeline")
        try:
            from diffusers import StableDiffusionPipeline
        except ImportError as error:
            raise ImportError(
                f"generator: {folder} needs diffusers ({error}): pip install diffusers"
            ) from None
        return cls(StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True))

    @torch.no_grad()
    def conditions(self, prompts: Sequence[str]) -> torch.Tensor:
        """The text encoder's states ``[n, m, C]``: what an output projector learns to match."""
        device = self.pipeline.device
        embeds: torch.Tensor = self.pipeline.encode_prompt(list(prompts), device, 1, False)[0]
        return embeds

    @torch.no_grad()
    def generate(
        self,
        condition: torch.Tensor,
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """``[n, m, C]`` → pictures uint8 ``[n, 3, H, W]``; guidance is against the empty prompt.

        Raises:
            ValueError: C is not the width the pipeline reads.
        """
        width = self.pipeline.unet.config.cross_attention_dim
        if condition.dim() != 3 or condition.shape[-1] != width:
            raise ValueError(
                f"generator: condition must be [n, m, {width}], the pipeline's cross_attention_dim, "
                f"got {list(condition.shape)}"
            )
        images: torch.Tensor = self.pipeline(
            prompt_embeds=condition, num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale, generator=generator, output_type="pt",
        ).images  # fmt: skip
        return (images * 255).round().clamp(0, 255).to(torch.uint8)
