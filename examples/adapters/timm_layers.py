# SPDX-License-Identifier: Apache-2.0
"""timm's ``PatchEmbed`` and ``AttentionPoolLatent``.

Structures are those of timm's ``layers/patch_embed.py`` and ``layers/attention_pool.py``. PatchEmbed's ``proj`` is
found and replaced by ``mmkernels.patch``; the pool's attention is one call of ``mmkernels.cross_attention``.
"""

import torch
import torch.nn.functional as F
from compare import assert_close, same_patched
from torch import nn

import mmkernels


class PatchEmbed(nn.Module):
    """``proj``, flatten, norm."""

    def __init__(self, embed_dim: int = 64, patch_size: int = 16) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class AttentionPoolLatent(nn.Module):
    """SigLIP's head as timm writes it: latent, ``q``, ``kv``, ``proj``."""

    def __init__(self, dim: int = 64, num_heads: int = 4, latent_len: int = 1) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.latent = nn.Parameter(torch.randn(1, latent_len, dim))
        self.q, self.kv, self.proj = (
            nn.Linear(dim, dim),
            nn.Linear(dim, 2 * dim),
            nn.Linear(dim, dim),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, N, C = x.shape
        q = (
            self.q(self.latent.expand(B, -1, -1))
            .view(B, -1, self.num_heads, C // self.num_heads)
            .transpose(1, 2)
        )
        k, v = self.kv(x).view(B, N, 2, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, -1, C))


def pooled(pool: AttentionPoolLatent, x: torch.Tensor) -> torch.Tensor:
    """The same without keys and values."""
    (w_k, w_v), (b_k, b_v) = pool.kv.weight.chunk(2), pool.kv.bias.chunk(2)
    out = mmkernels.cross_attention(
        pool.q(pool.latent[0]), x, w_k, w_v, b_k, b_v, num_heads=pool.num_heads
    )
    return pool.proj(out)


torch.manual_seed(0)
same_patched(PatchEmbed(), torch.randn(2, 3, 64, 96))
pool, tokens = AttentionPoolLatent(), torch.randn(2, 50, 64)
assert_close(pooled(pool, tokens), pool(tokens), "AttentionPoolLatent")
print("AttentionPoolLatent: cross_attention agrees")
