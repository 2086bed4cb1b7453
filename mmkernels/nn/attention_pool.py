# SPDX-License-Identifier: Apache-2.0
"""Attention pooling: learned probes read all tokens of an image."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import mmkernels
from mmkernels import checks
from mmkernels.ops.cross_attention import Position


class AttentionPool(nn.Module):
    """The MAP head of SigLIP: one probe attends to all tokens; norm and MLP with a residual follow.

    ``y = attention(probe, x); pooled = y + mlp(layernorm(y))``. Submodules and parameters are named as in
    ``SiglipMultiheadAttentionPoolingHead``, so its state_dict loads.

    Args:
        hidden_size, num_heads, intermediate_size: The head's sizes.
        num_probes: Rows that are pooled into.
        layer_norm_eps: Of the norm.
        algorithm: As in ``mmkernels.cross_attention``: with one query absorption saves nearly all of the work.
    Source: SigLIP (Zhai et al. 2023); multihead attention pooling, Lee et al. 2019.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        *,
        num_probes: int = 1,
        layer_norm_eps: float = 1e-6,
        algorithm: str = "auto",
    ) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, num_probes, hidden_size))
        self.attention = nn.MultiheadAttention(hidden_size, num_heads, batch_first=True)
        self.layernorm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.mlp = nn.Module()
        self.mlp.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.mlp.fc2 = nn.Linear(intermediate_size, hidden_size)
        self.algorithm = algorithm

    def forward(
        self, hidden_state: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``[B, n, D]`` → ``[B, D]`` (``[B, probes, D]`` with more than one).

        The mask is ``[B, n]``, non-zero = attend. An image whose mask hides every token gives the average of all its
        values, as in transformers.
        """
        mask = None if attention_mask is None else hiding(attention_mask, hidden_state)
        y = multihead_attention(
            self.attention, self.probe[0], hidden_state, mask=mask, algorithm=self.algorithm
        )
        inner = F.gelu(self.mlp.fc1(self.layernorm(y)), approximate="tanh")  # type: ignore[operator]
        pooled: torch.Tensor = y + self.mlp.fc2(inner)  # type: ignore[operator]
        return pooled[:, 0] if pooled.shape[1] == 1 else pooled


def hiding(attention_mask: torch.Tensor, hidden_state: torch.Tensor) -> torch.Tensor:
    """``[B, n]`` → what is added to the scores, ``[B, 1, 1, n]``: the least number of the dtype, as transformers adds.

    Added to every score of a row, it leaves them equal.
    """
    least = torch.finfo(checks.dtype_of(hidden_state)).min
    shown = attention_mask[:, None, None].bool()
    return torch.zeros_like(shown, dtype=hidden_state.dtype).masked_fill(~shown, least)


def multihead_attention(
    attention: Any,
    query: torch.Tensor,
    context: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    key_position: Position | None = None,
    dropout: float | None = None,
    algorithm: str = "auto",
) -> torch.Tensor:
    """``attention(query, context, context)`` without its K and V where that pays; ``query`` ``[Q, D]`` serves all.

    ``attention``: an ``nn.MultiheadAttention``, or what names its parameters so, which then says its ``dropout``.
    """
    if dropout is None:
        dropout = attention.dropout if attention.training else 0.0
    w_q, w_k, w_v = projections(attention)
    bias = attention.in_proj_bias
    b_q, b_k, b_v = (None, None, None) if bias is None else bias.chunk(3)
    out = mmkernels.cross_attention(
        F.linear(query, w_q, b_q), context, w_k, w_v, b_k, b_v, num_heads=attention.num_heads,
        attention_mask=mask, key_position=key_position, algorithm=algorithm, dropout_p=dropout,
    )  # fmt: skip
    projected: torch.Tensor = attention.out_proj(out)
    return projected


def projections(attention: Any) -> tuple[torch.Tensor, ...]:
    """Weights of query, key and value: in one parameter, or in three where their inputs differ in width."""
    if attention.in_proj_weight is not None:
        return attention.in_proj_weight.chunk(3)
    return attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight
