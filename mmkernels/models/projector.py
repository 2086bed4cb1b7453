# SPDX-License-Identifier: Apache-2.0
"""Projector: a few learned queries read the encoder's features and speak the decoder's width."""

import torch
from torch import nn

from mmkernels.models.config import MMConfig
from mmkernels.nn import QFormer


class Projector(nn.Module):
    """Q-Former and a linear layer; parameters are named as in ``Blip2Model``."""

    def __init__(self, config: MMConfig, *, algorithm: str = "auto") -> None:
        super().__init__()
        sizes = config.projector
        self.query_tokens = nn.Parameter(torch.randn(1, sizes.num_query_tokens, sizes.hidden_size))
        self.qformer = QFormer(
            hidden_size=sizes.hidden_size,
            num_heads=sizes.num_heads,
            num_layers=sizes.num_layers,
            intermediate_size=sizes.intermediate_size,
            encoder_hidden_size=config.vision.hidden_size,
            cross_attention_frequency=sizes.cross_attention_frequency,
            algorithm=algorithm,
        )
        self.language_projection = nn.Linear(sizes.hidden_size, config.decoder.hidden_size)

    def forward(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """``[B, n, X]`` → image features ``[B, Q, E]``."""
        hidden_states = self.qformer(self.query_tokens, image_embeds)
        image_features: torch.Tensor = self.language_projection(hidden_states)
        return image_features
