# SPDX-License-Identifier: Apache-2.0
"""Cross-attention as a module: learned queries read feature tokens; K and V need not be formed."""

import torch
from torch import nn

import mmkernels


class CrossAttention(nn.Module):
    """Submodules are named as in ``Blip2QFormerMultiHeadAttention``; no output projection.

    Args:
        hidden_size: Width of the queries and of the result.
        num_heads: Divides ``hidden_size``.
        encoder_hidden_size: Width of the feature tokens.
        algorithm: As in ``mmkernels.cross_attention``.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        encoder_hidden_size: int,
        *,
        algorithm: str = "auto",
    ) -> None:
        super().__init__()
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(encoder_hidden_size, hidden_size)
        self.value = nn.Linear(encoder_hidden_size, hidden_size)
        self.num_heads = num_heads
        self.algorithm = algorithm

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``[B or 1, Q, D]``, ``[B, n, X]`` → ``[B, Q, D]``; one row of queries serves every image."""
        query = self.query(hidden_states)
        return mmkernels.cross_attention(
            query[0] if query.shape[0] == 1 else query,
            encoder_hidden_states,
            self.key.weight,
            self.value.weight,
            self.key.bias,
            self.value.bias,
            num_heads=self.num_heads,
            attention_mask=attention_mask,
            algorithm=self.algorithm,
        )
