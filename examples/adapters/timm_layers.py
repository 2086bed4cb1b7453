# SPDX-License-Identifier: Apache-2.0
"""timm's ``PatchEmbed`` and ``AttentionPoolLatent``, SigLIP's head there: both found by ``mmkernels.patch``.

With timm installed its own classes are taken. Otherwise what is below, which has the structure and the names of timm's
``timm/layers/patch_embed.py`` and ``timm/layers/attention_pool.py``.
"""

from typing import Any

import torch
import torch.nn.functional as F
from compare import same_patched, show
from torch import nn


class PatchEmbed(nn.Module):
    """``proj``, flatten, norm."""

    def __init__(
        self, img_size: int = 224, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768, norm_layer: Any = None
    ) -> None:  # fmt: skip
        super().__init__()
        self.img_size = (img_size, img_size)
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[2:] == self.img_size, f"expected an image of {self.img_size}"
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class Mlp(nn.Module):
    """Two layers and a GELU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class AttentionPoolLatent(nn.Module):
    """``latent`` reads all tokens; keys and values come of one layer; norm and MLP follow."""

    def __init__(
        self, in_features: int, num_heads: int = 8, latent_len: int = 1, qk_norm: bool = False,
        pool_type: str = "token", norm_layer: Any = None, feat_size: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        dim = in_features
        self.num_heads, self.latent_len, self.pool = num_heads, latent_len, pool_type
        self.pos_embed = None if feat_size is None else nn.Parameter(torch.randn(feat_size, dim))
        self.latent = nn.Parameter(torch.randn(1, latent_len, dim))
        self.q, self.kv, self.proj = (nn.Linear(dim, n) for n in (dim, 2 * dim, dim))
        norm = (lambda: nn.LayerNorm(dim // num_heads)) if qk_norm else nn.Identity  # of each head
        self.q_norm, self.k_norm = norm(), norm()
        self.proj_drop, self.mlp = nn.Dropout(0.0), Mlp(dim, 4 * dim)
        self.norm = norm_layer(dim) if norm_layer else nn.Identity()

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        B, N, C = x.shape
        x = x if self.pos_embed is None else x + self.pos_embed
        heads = (self.num_heads, C // self.num_heads)
        q = self.q(self.latent.expand(B, -1, -1)).unflatten(-1, heads).transpose(1, 2)
        k, v = self.kv(x).view(B, N, 2, *heads).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        x = self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, self.latent_len, C)))
        x = x + self.mlp(self.norm(x))
        return {"token": lambda: x[:, 0], "avg": lambda: x.mean(1)}.get(self.pool, lambda: x)()


def main() -> None:
    try:
        from timm.layers import AttentionPoolLatent as Pool
        from timm.layers import PatchEmbed as Embed
    except ImportError:
        Pool, Embed = AttentionPoolLatent, PatchEmbed  # type: ignore[misc,assignment]
    torch.manual_seed(0)
    embed = Embed(64, 16, embed_dim=64, norm_layer=nn.LayerNorm)
    pool = Pool(64, num_heads=4, norm_layer=nn.LayerNorm)
    show(same_patched(embed, torch.randn(2, 3, 64, 64)), same_patched(pool, torch.randn(2, 50, 64)))


if __name__ == "__main__":
    main()
