# SPDX-License-Identifier: Apache-2.0
"""Projector: a few learned queries read the encoder's features and speak the decoder's width."""

import torch
from torch import nn

from mmkernels.models.config import MMConfig
from mmkernels.models.vision import patch_positions, sincos
from mmkernels.nn import CrossAttention, QFormer


class Projector(nn.Module):
    """Q-Former and a linear layer; parameters are named as in ``Blip2Model``.

    Features get their places back first: telling digits apart, the encoder may forget where they
    are. Queries start at places from left to right and keys like queries, so each reads its column.
    """

    def __init__(self, config: MMConfig, *, algorithm: str = "auto") -> None:
        super().__init__()
        sizes, X = config.projector, config.vision.hidden_size
        side = config.vision.image_size // config.vision.patch_size
        self.position_embed = nn.Parameter(patch_positions(side, X))
        columns = torch.linspace(0, side - 1, sizes.num_query_tokens)
        queries = sincos(torch.zeros_like(columns), columns, sizes.hidden_size)
        queries[:, : sizes.hidden_size // 2] = 0  # any row
        self.query_tokens = nn.Parameter((queries + 0.5 * torch.randn_like(queries))[None])
        self.qformer = QFormer(
            hidden_size=sizes.hidden_size,
            num_heads=sizes.num_heads,
            num_layers=sizes.num_layers,
            intermediate_size=sizes.intermediate_size,
            encoder_hidden_size=X,
            cross_attention_frequency=sizes.cross_attention_frequency,
            algorithm=algorithm,
        )
        self.language_projection = nn.Linear(sizes.hidden_size, config.decoder.hidden_size)
        for module in self.qformer.modules():
            if isinstance(module, CrossAttention) and X == sizes.hidden_size:
                nn.init.normal_(module.query.weight, std=X**-0.5)
                module.key.weight.data.copy_(module.query.weight)

    def forward(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """``[B, n, X]`` → image features ``[B, Q, E]``."""
        hidden_states = self.qformer(self.query_tokens, image_embeds + self.position_embed)
        image_features: torch.Tensor = self.language_projection(hidden_states)
        return image_features
