# SPDX-License-Identifier: Apache-2.0
"""Q-Former: BERT layers whose queries read image features in every n-th layer; text may join the queries.

Parameters are named as in transformers' ``Blip2QFormerModel``, so its state_dict loads.

Dimensions: B images, Q queries, n feature tokens, D width, A heads, X feature width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from mmkernels.nn.cross_attention import CrossAttention


class QFormer(nn.Module):
    """Turns ``n`` feature tokens into ``Q`` query states.

    Args:
        hidden_size, num_heads, num_layers, intermediate_size: The BERT sizes.
        encoder_hidden_size: Width of the feature tokens.
        cross_attention_frequency: Layers ``0, f, 2f, …`` have cross-attention.
        layer_norm_eps: Of every LayerNorm.
        text: Layers have a feed-forward of their own for rows of text (``use_qformer_text_input``), which take part
            in the self-attention but read no features (InstructBLIP).
        algorithm: As in ``mmkernels.cross_attention``.
    Source: BLIP-2 (Li et al. 2023), section 3.1; InstructBLIP (Dai et al. 2023). There is no dropout.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        num_layers: int,
        intermediate_size: int,
        encoder_hidden_size: int,
        cross_attention_frequency: int = 2,
        layer_norm_eps: float = 1e-12,
        text: bool = False,
        algorithm: str = "auto",
    ) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(hidden_size, layer_norm_eps)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList()
        for i in range(num_layers):
            reads = i % cross_attention_frequency == 0
            cross = (
                CrossAttention(hidden_size, num_heads, encoder_hidden_size, algorithm=algorithm)
                if reads
                else None
            )
            self.encoder.layer.append(
                QFormerLayer(hidden_size, num_heads, intermediate_size, layer_norm_eps, cross, text)
            )

    def forward(
        self,
        query_embeds: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        text_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``[B or 1, Q, D]``, ``[B, n, X]`` → ``[B, Q, D]``, of the queries.

        With a batch of 1 and no text, the first self-attention runs once for all images. Masks (non-zero =
        attend): ``encoder_attention_mask`` ``[B, n]``; of text ``[B, L, D]`` ``attention_mask`` ``[B, Q + L]``.
        """
        Q, hidden_states = query_embeds.shape[1], query_embeds
        if text_embeds is not None:
            queries = query_embeds.expand(text_embeds.shape[0], -1, -1)
            hidden_states = torch.cat([queries, text_embeds], 1)
        masks = [
            None if m is None else m[:, None, None].bool()
            for m in (attention_mask, encoder_attention_mask)
        ]
        hidden_states = self.layernorm(hidden_states)
        for layer in self.encoder.layer:  # type: ignore[union-attr]
            hidden_states = layer(hidden_states, encoder_hidden_states, *masks, Q)
        return hidden_states[:, :Q]


class QFormerLayer(nn.Module):
    """Self-attention, cross-attention where the layer has one, feed-forward; each post-norm."""

    def __init__(
        self, hidden_size: int, num_heads: int, intermediate_size: int, eps: float,
        cross: CrossAttention | None, text: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.attention = _Attention(SelfAttention(hidden_size, num_heads), hidden_size, eps)
        if cross is not None:
            self.crossattention = _Attention(cross, hidden_size, eps)
        self.has_cross_attention = cross is not None
        self.intermediate_query = nn.Module()
        self.intermediate_query.dense = nn.Linear(hidden_size, intermediate_size)
        self.output_query = _Output(intermediate_size, hidden_size, eps)
        if text:
            self.intermediate = nn.Module()
            self.intermediate.dense = nn.Linear(hidden_size, intermediate_size)
            self.output = _Output(intermediate_size, hidden_size, eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        features: torch.Tensor,
        mask: torch.Tensor | None,
        features_mask: torch.Tensor | None,
        Q: int,
    ) -> torch.Tensor:
        """Rows from Q on are text."""
        hidden_states = self.attention(hidden_states, mask)
        queries, text = hidden_states[:, :Q], hidden_states[:, Q:]
        if self.has_cross_attention:
            queries = self.crossattention(queries, features, features_mask)
        inner = F.gelu(self.intermediate_query.dense(queries))  # type: ignore[operator]
        output: torch.Tensor = self.output_query(inner, queries)
        if text.shape[1] == 0:
            return output
        inner = F.gelu(self.intermediate.dense(text))  # type: ignore[operator]
        return torch.cat([output, self.output(inner, text)], 1)


class SelfAttention(nn.Module):
    """Bidirectional self-attention of queries and text; submodules named as in BERT."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.num_heads = num_heads

    def forward(
        self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        q_BAQd, k_BAQd, v_BAQd = (
            linear(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        return (
            F.scaled_dot_product_attention(q_BAQd, k_BAQd, v_BAQd, mask).transpose(1, 2).flatten(2)
        )


class _Attention(nn.Module):
    """An attention, its output projection and the norm over the residual sum."""

    def __init__(self, attention: nn.Module, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.attention = attention
        self.output = _Output(hidden_size, hidden_size, eps)

    def forward(self, hidden_states: torch.Tensor, *context: torch.Tensor | None) -> torch.Tensor:
        output: torch.Tensor = self.output(self.attention(hidden_states, *context), hidden_states)
        return output


class _Output(nn.Module):
    """``LayerNorm(dense(x) + residual)``; a residual of batch 1 broadcasts."""

    def __init__(self, in_features: int, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, hidden_size)
        self.LayerNorm = nn.LayerNorm(hidden_size, eps)

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.LayerNorm(self.dense(hidden_states) + residual)
        return output
