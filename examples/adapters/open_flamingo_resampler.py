# SPDX-License-Identifier: Apache-2.0
"""open_flamingo's ``PerceiverResampler``: its attention is found by ``mmkernels.patch`` and replaced.

The structure is that of ``open_flamingo/src/helpers.py`` (after lucidrains' flamingo-pytorch).
"""

import torch
from compare import same_patched
from torch import nn


class PerceiverAttention(nn.Module):
    """Latents read the media and themselves."""

    def __init__(self, dim: int, dim_head: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.scale, self.heads = dim_head**-0.5, heads
        self.norm_media, self.norm_latents = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim_head * heads, bias=False)
        self.to_kv = nn.Linear(dim, dim_head * heads * 2, bias=False)
        self.to_out = nn.Linear(dim_head * heads, dim, bias=False)

    def forward(self, x: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        x, latents = self.norm_media(x), self.norm_latents(latents)
        q = self.to_q(latents)
        k, v = self.to_kv(torch.cat((x, latents), dim=-2)).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).movedim(-2, 1) for t in (q, k, v))
        sim = torch.einsum("... i d, ... j d -> ... i j", q * self.scale, k)
        attn = (sim - sim.amax(dim=-1, keepdim=True).detach()).softmax(dim=-1)
        return self.to_out(
            torch.einsum("... i j, ... j d -> ... i d", attn, v).movedim(1, -2).flatten(-2)
        )


class PerceiverResampler(nn.Module):
    """``[B, T, n, D]`` → ``[B, T, latents, D]``."""

    def __init__(self, dim: int = 64, depth: int = 2, num_latents: int = 8) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        feed = lambda: nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim, bias=False), nn.GELU(),
                                     nn.Linear(4 * dim, dim, bias=False))  # fmt: skip
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(dim), feed()]) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        latents = self.latents.expand(*x.shape[:2], -1, -1)
        for attention, feed in self.layers:
            latents = attention(x, latents) + latents
            latents = feed(latents) + latents
        return self.norm(latents)


torch.manual_seed(0)
same_patched(PerceiverResampler(), torch.randn(2, 2, 20, 64))
