# SPDX-License-Identifier: Apache-2.0
"""open_clip's VisionTransformer with CoCa's attention pooler: ``conv1`` and the pooler are found by ``patch``.

With open_clip installed its own class is taken. Otherwise what is below, which has the structure and the names of
open_clip's ``src/open_clip/transformer.py``: poolers of older releases hold an ``nn.MultiheadAttention``, those of
today an ``Attention`` of their own, whose parameters have the same names.
"""

from typing import Any

import torch
import torch.nn.functional as F
from compare import same_patched, show
from torch import nn

ONE_HEAD = {"attentional_pool": True, "attn_pooler_queries": 8, "attn_pooler_heads": 4}


class LayerNorm(nn.LayerNorm):
    """A subclass, which gives its input's dtype back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).to(x.dtype)


class Attention(nn.Module):
    """Keys and values may have a width of their own (``Attention`` of today, without its optional norms)."""

    def __init__(self, dim: int, num_heads: int, kdim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight, self.logit_scale, self.head_scale = None, None, None
        self.q_proj_weight = nn.Parameter(0.1 * torch.randn(dim, dim))
        self.k_proj_weight = nn.Parameter(0.1 * torch.randn(dim, kdim))
        self.v_proj_weight = nn.Parameter(0.1 * torch.randn(dim, kdim))
        self.in_proj_bias = nn.Parameter(torch.randn(3 * dim))
        self.ln_q, self.ln_k, self.ln_inner = nn.Identity(), nn.Identity(), nn.Identity()
        self.attn_drop, self.out_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.out_proj = nn.Linear(dim, dim)

    def forward(
        self, x: torch.Tensor, k_x: Any = None, v_x: Any = None, attn_mask: Any = None
    ) -> torch.Tensor:
        inputs = (x, x if k_x is None else k_x, x if v_x is None else v_x)
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        rows = map(F.linear, inputs, weights, self.in_proj_bias.chunk(3))
        q, k, v = (r.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for r in rows)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.out_drop(self.out_proj(self.ln_inner(out.transpose(1, 2).flatten(-2))))


class AttentionalPooler(nn.Module):
    """``n_queries`` learned queries read all tokens; ``old``: as older releases have it."""

    def __init__(
        self,
        d_model: int,
        context_dim: int,
        n_head: int = 8,
        n_queries: int = 256,
        old: bool = False,
    ) -> None:
        super().__init__()
        self.query, self.old = nn.Parameter(torch.randn(n_queries, d_model)), old
        self.attn: nn.Module = Attention(d_model, n_head, context_dim)
        if old:
            widths = {"kdim": context_dim, "vdim": context_dim}
            self.attn = nn.MultiheadAttention(d_model, n_head, batch_first=True, **widths)
        self.ln_q, self.ln_k = LayerNorm(d_model), LayerNorm(context_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.ln_k(x)
        q = self.ln_q(self.query).unsqueeze(0).expand(len(x), -1, -1)
        return self.attn(q, x, x, need_weights=False)[0] if self.old else self.attn(q, k_x=x, v_x=x)


class VisionTransformer(nn.Module):
    """``conv1``, class token, positions, norm, blocks, pooler, norm, projection."""

    def __init__(
        self, image_size: int, patch_size: int, width: int, layers: int, heads: int, mlp_ratio: float,
        attentional_pool: bool = True, attn_pooler_queries: int = 256, attn_pooler_heads: int = 8,
        output_dim: int = 512,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(
            torch.randn((image_size // patch_size) ** 2 + 1, width)
        )
        self.ln_pre, self.ln_post = LayerNorm(width), LayerNorm(output_dim)
        block = lambda: nn.TransformerEncoderLayer(
            width, heads, int(mlp_ratio * width), 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.transformer = nn.Sequential(*(block() for _ in range(layers)))
        self.attn_pool = AttentionalPooler(
            output_dim, width, attn_pooler_heads, attn_pooler_queries
        )
        self.proj = nn.Parameter(torch.randn(output_dim, output_dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        x = x.reshape(x.shape[0], x.shape[1], -1).permute(0, 2, 1)
        x = torch.cat([self.class_embedding.view(1, 1, -1).expand(x.shape[0], -1, -1), x], 1)
        x = self.transformer(self.ln_pre(x + self.positional_embedding))
        return self.ln_post(self.attn_pool(x))[:, 0] @ self.proj


def main() -> None:
    try:
        from open_clip.transformer import VisionTransformer as Theirs
    except ImportError:
        Theirs = VisionTransformer  # type: ignore[misc,assignment]
    torch.manual_seed(0)
    whole = Theirs(64, 16, 64, 1, 4, 2.0, output_dim=48, **ONE_HEAD)
    older = AttentionalPooler(48, 64, 4, 8, old=True)
    show(
        same_patched(whole, torch.randn(2, 3, 64, 64)), same_patched(older, torch.randn(2, 17, 64))
    )


if __name__ == "__main__":
    main()
