# SPDX-License-Identifier: Apache-2.0
"""Output projector: learned queries read the backbone's states at its signal tokens and speak the generator's width.

Dimensions: n drawings, r signal tokens, E backbone width, m condition tokens, C their width.
"""

import torch
from torch import nn

from mmkernels.models.config import OutputProjectorConfig


class OutputProjector(nn.Module):
    """``model(tfm(fc(x), query_embs))``; parameters are named as in GILL's ``TextFcLayer``.

    Args:
        config: The sizes.
        backbone_size: E.
    Source: GILLMapper (Koh et al. 2023, gill/layers.py); NExT-GPT (Wu et al. 2023, code/model/layers.py) has the same.
        Both are pre-norm without dropout, whatever their papers leave open.
    """

    def __init__(self, config: OutputProjectorConfig, backbone_size: int) -> None:
        super().__init__()
        D = config.hidden_size
        self.fc = nn.Linear(backbone_size, D)
        self.tfm = nn.Transformer(
            D, config.num_heads, num_decoder_layers=config.num_decoder_layers,
            dim_feedforward=config.intermediate_size, dropout=0.0, batch_first=True, norm_first=True,
            custom_encoder=_encoder(config),
        )  # fmt: skip
        self.model = nn.Linear(D, config.condition_size)
        self.query_embs = nn.Parameter(torch.randn(1, config.num_condition_tokens, D))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[n, r, E]`` → ``[n, m, C]``. GILL and NExT-GPT give the sum of the last hidden states and the input
        embeddings of the signal tokens.

        Raises:
            ValueError: ``hidden_states`` has another shape.
        """
        E = self.fc.in_features
        if hidden_states.dim() != 3 or hidden_states.shape[-1] != E:
            raise ValueError(
                f"output projector: hidden_states must be [n, r, {E}], got {list(hidden_states.shape)}"
            )
        queries = self.query_embs.expand(hidden_states.shape[0], -1, -1)
        condition: torch.Tensor = self.model(self.tfm(self.fc(hidden_states), queries))
        return condition


def _encoder(config: OutputProjectorConfig) -> nn.TransformerEncoder:
    """What ``nn.Transformer`` would build, but for nested tensors, which pre-norm layers cannot take."""
    layer = nn.TransformerEncoderLayer(
        config.hidden_size, config.num_heads, config.intermediate_size, dropout=0.0, batch_first=True,
        norm_first=True,
    )  # fmt: skip
    return nn.TransformerEncoder(
        layer,
        config.num_encoder_layers,
        nn.LayerNorm(config.hidden_size),
        enable_nested_tensor=False,
    )
