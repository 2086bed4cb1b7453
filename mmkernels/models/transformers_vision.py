# SPDX-License-Identifier: Apache-2.0
"""A CLIP or SigLIP vision tower of transformers as encoder; pixels go in as bytes, through ``patch_embed``.

Dimensions: C channels, H×W pixels, N patches, D width.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import mmkernels
from mmkernels.models.config import TransformersVisionConfig
from mmkernels.models.features import Features

MODEL_TYPES = ("clip_vision_model", "siglip_vision_model")


class TransformersVision(nn.Module):
    """Hidden states of layer ``layer`` (−1: the last; LLaVA takes −2), before the final norm."""

    def __init__(self, config: TransformersVisionConfig) -> None:
        from transformers import AutoConfig, AutoModel

        super().__init__()
        values = json.loads(config.config)
        if values.get("model_type") not in MODEL_TYPES:
            raise ValueError(
                f"vision: model_type must be one of {MODEL_TYPES}, got {values.get('model_type')!r}"
            )
        made = AutoConfig.for_model(**values)  # which could name a kernel of the hub
        self.model: Any = AutoModel.from_config(made, attn_implementation="sdpa")
        self.model.embeddings = Embeddings(self.model.embeddings, config)
        self.layer, self.width = config.layer, int(self.model.config.hidden_size)
        self.side = self.model.config.image_size // self.model.config.patch_size

    def forward(self, items: Sequence[torch.Tensor]) -> Features:
        """Images ``[3, H, W]`` and clips ``[T, 3, H, W]``, uint8, of the tower's size → features ``[T, D]``."""
        frames = [item if item.dim() == 4 else item[None] for item in items]
        grids = tuple((len(f), self.side, self.side) for f in frames)
        prefix = int(hasattr(self.model.embeddings, "class_embedding"))
        if not frames and not torch.is_grad_enabled():
            return Features(self.model.embeddings.position_embedding.weight[:0], (), prefix)
        out = self.model(torch.cat(frames or [self._blank()]), output_hidden_states=True)
        tokens = out.hidden_states[self.layer].flatten(0, 1)
        return Features(tokens if frames else tokens[:0], grids, prefix)

    def _blank(self) -> torch.Tensor:
        """A picture of which nothing is kept: the layers before ``layer`` still get a gradient, of zeros."""
        weight, side = (
            self.model.embeddings.position_embedding.weight,
            self.model.embeddings.image_size,
        )
        return torch.zeros(1, 3, side, side, dtype=torch.uint8, device=weight.device)


class Embeddings(nn.Module):
    """In place of the tower's own, with its parameters: normalisation, patches, class token, positions in one op."""

    def __init__(self, replaced: Any, config: TransformersVisionConfig) -> None:
        super().__init__()
        self.patch_embedding, self.position_embedding = (
            replaced.patch_embedding, replaced.position_embedding,
        )  # fmt: skip
        if hasattr(replaced, "class_embedding"):
            self.class_embedding = replaced.class_embedding
        self.image_size, self.config = int(replaced.image_size), config

    def forward(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False
    ) -> torch.Tensor:
        """``[B, C, H, W]`` uint8 → ``[B, N, D]``, with a class token first where there is one."""
        if pixel_values.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"vision: images must be {self.image_size}×{self.image_size}, got {list(pixel_values.shape[-2:])}"
            )
        conv, c = self.patch_embedding, self.config
        return mmkernels.patch_embed(
            pixel_values, conv.weight, conv.bias, rescale_factor=1 / 255, image_mean=c.image_mean,
            image_std=c.image_std, position_embed=self.position_embedding.weight, 
            prefix_tokens=getattr(self, "class_embedding", None),
        )  # fmt: skip
