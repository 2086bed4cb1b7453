# SPDX-License-Identifier: Apache-2.0
"""open_clip's ViT: ``conv1``, ``class_embedding``, ``positional_embedding``; patched as it is.

Structures are those of open_clip's ``src/open_clip/transformer.py``. The stem is found and replaced, here whole. The
``AttentionalPooler`` is an ``nn.MultiheadAttention`` of learned queries: ``mmkernels.cross_attention`` takes its
parameters.
"""

import torch
from compare import assert_close, same_patched
from torch import nn

import mmkernels


class VisionStem(nn.Module):
    """What comes before the transformer."""

    def __init__(self, width: int = 64, patch: int = 16, side: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((side // patch) ** 2 + 1, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        x = x.reshape(x.shape[0], x.shape[1], -1).permute(0, 2, 1)
        x = torch.cat([self.class_embedding.view(1, 1, -1).expand(x.shape[0], -1, -1), x], 1)
        return x + self.positional_embedding


class AttentionalPooler(nn.Module):
    """CoCa's: ``n_queries`` read all tokens; keys and values of another width."""

    def __init__(
        self, d_model: int = 48, context_dim: int = 64, n_head: int = 4, n_queries: int = 8
    ) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(n_queries, d_model))
        self.attn = nn.MultiheadAttention(
            d_model, n_head, kdim=context_dim, vdim=context_dim, batch_first=True
        )
        self.ln_q, self.ln_k = nn.LayerNorm(d_model), nn.LayerNorm(context_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.ln_k(x)
        q = self.ln_q(self.query)
        return self.attn(q.expand(x.shape[0], -1, -1), x, x, need_weights=False)[0]


def pooled(pooler: AttentionalPooler, x: torch.Tensor) -> torch.Tensor:
    """The same without keys and values; queries are projected once for all images."""
    a, norm = pooler.attn, pooler.ln_k
    b_q, b_k, b_v = a.in_proj_bias.chunk(3)
    query = nn.functional.linear(pooler.ln_q(pooler.query), a.q_proj_weight, b_q)
    out = mmkernels.cross_attention(
        query, x, a.k_proj_weight, a.v_proj_weight, b_k, b_v, num_heads=a.num_heads,
        context_norm=mmkernels.Norm("layer", norm.weight, norm.bias, norm.eps),
    )  # fmt: skip
    return a.out_proj(out)


torch.manual_seed(0)
same_patched(VisionStem(), torch.randn(2, 3, 64, 64))
pooler, tokens = AttentionalPooler(), torch.randn(2, 17, 64)
assert_close(pooled(pooler, tokens), pooler(tokens), "AttentionalPooler")
print("AttentionalPooler: cross_attention agrees")
