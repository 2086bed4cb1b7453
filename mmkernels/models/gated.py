# SPDX-License-Identifier: Apache-2.0
"""Features beside the text instead of in it: gated cross-attention layers in the decoder (Flamingo, Otter, IDEFICS).

Dimensions: T tokens, M feature tokens, X their width, E width, A heads, K head width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from mmkernels.models.config import DecoderConfig
from mmkernels.models.features import take_part


class Media(NamedTuple):
    """``features`` ``[M, X]`` of all samples, and which of them each token sees, ``visible`` ``[T, M]`` bool."""

    features: torch.Tensor
    visible: torch.Tensor


def last_medium(
    sample_of_token: torch.Tensor,
    media_before: torch.Tensor,
    sample_of: torch.Tensor,
    medium_of: torch.Tensor,
) -> torch.Tensor:
    """``[T, M]``: a token sees the last medium before it in its sample. Indices of tokens ``[T]``: sample, media begun
    so far; of feature tokens ``[M]``: sample, number in the sample, from 1."""
    same = sample_of_token[:, None] == sample_of
    return same & (media_before[:, None] == medium_of)


class GatedCrossAttention(nn.Module):
    """``x + tanh(a)·attn(x, media)``, then ``x + tanh(b)·mlp(x)``; both gates start at 0: the language model unchanged.

    A token that sees no medium gets nothing from the attention. Many queries a sample: keys and values are formed.
    Source: Flamingo (Alayrac et al. 2022), ``GatedCrossAttentionBlock`` of open_flamingo.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        E = config.hidden_size
        A = config.gated_num_heads or config.num_attention_heads
        K = config.gated_head_dim or config.head_width
        self.num_heads = A
        self.norm = nn.LayerNorm(E)
        self.to_q = nn.Linear(E, A * K, bias=False)
        self.to_kv = nn.Linear(config.feature_width, 2 * A * K, bias=False)
        self.to_out = nn.Linear(A * K, E, bias=False)
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ff = nn.Sequential(
            nn.LayerNorm(E), nn.Linear(E, 4 * E, bias=False), nn.GELU(), nn.Linear(4 * E, E, bias=False)
        )  # fmt: skip
        self.ff_gate = nn.Parameter(torch.zeros(1))

    def forward(self, hidden_states: torch.Tensor, media: Media) -> torch.Tensor:
        hidden_states = hidden_states + self.attn_gate.tanh() * self._attend(hidden_states, media)
        output: torch.Tensor = hidden_states + self.ff_gate.tanh() * self.ff(hidden_states)
        return output

    def _attend(self, hidden_states: torch.Tensor, media: Media) -> torch.Tensor:
        if not media.features.shape[0]:
            layers = (self.norm, self.to_q, self.to_kv, self.to_out)
            unused = [p for layer in layers for p in layer.parameters()]
            return take_part(torch.zeros_like(hidden_states), media.features, *unused)
        heads = lambda x: x.unflatten(-1, (self.num_heads, -1)).transpose(0, 1)
        query = heads(self.to_q(self.norm(hidden_states)))
        key, value = (heads(x) for x in self.to_kv(media.features).chunk(2, -1))
        sees = media.visible.any(-1, keepdim=True)
        mask = media.visible | ~sees  # a row of all -inf has no softmax
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        out: torch.Tensor = self.to_out(mixed.transpose(0, 1).flatten(1))
        return out * sees
