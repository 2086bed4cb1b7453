# SPDX-License-Identifier: Apache-2.0
"""open_flamingo's ``PerceiverResampler``: its attention is found by ``mmkernels.patch`` and replaced.

With open_flamingo installed its own class is taken. Otherwise what is below, which has the structure and the names of
its ``open_flamingo/src/helpers.py`` (after lucidrains' flamingo-pytorch), without einops.
"""

import torch
from compare import same_patched, show
from torch import nn


class PerceiverAttention(nn.Module):
    """Latents read the media and themselves."""

    def __init__(self, *, dim: int, dim_head: int = 64, heads: int = 8) -> None:
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
        out = torch.einsum("... i j, ... j d -> ... i d", attn, v)
        return self.to_out(out.movedim(1, -2).flatten(-2))


def FeedForward(dim: int, mult: int = 4) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, dim * mult, bias=False), nn.GELU(), nn.Linear(dim * mult, dim, bias=False)
    )  # fmt: skip


class PerceiverResampler(nn.Module):
    """``[b, T, F, v, D]``, F frames of v features each, → ``[b, T, latents, D]``."""

    def __init__(
        self, *, dim: int, depth: int = 6, dim_head: int = 64, heads: int = 8, num_latents: int = 64,
        max_num_media: int | None = None, max_num_frames: int | None = None, ff_mult: int = 4,
    ) -> None:  # fmt: skip
        super().__init__()
        table = lambda *shape: None if shape[0] is None else nn.Parameter(torch.randn(*shape))
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.frame_embs = table(max_num_frames, dim)
        self.media_time_embs = table(max_num_media, 1, dim)
        attention = lambda: PerceiverAttention(dim=dim, dim_head=dim_head, heads=heads)
        layers = (nn.ModuleList([attention(), FeedForward(dim, ff_mult)]) for _ in range(depth))
        self.layers, self.norm = nn.ModuleList(layers), nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        T, frames = x.shape[1:3]
        if self.frame_embs is not None:
            x = x + self.frame_embs[:frames, None]
        x = x.flatten(2, 3)
        if self.media_time_embs is not None:
            x = x + self.media_time_embs[:T]
        latents = self.latents.expand(*x.shape[:2], -1, -1)
        for attn, ff in self.layers:
            latents = attn(x, latents) + latents
            latents = ff(latents) + latents
        return self.norm(latents)


def main() -> None:
    try:
        from open_flamingo.src.helpers import PerceiverResampler as Resampler
    except ImportError:
        Resampler = PerceiverResampler  # type: ignore[misc,assignment]
    torch.manual_seed(0)
    sizes = {"dim": 64, "depth": 2, "dim_head": 16, "heads": 4, "num_latents": 8}
    pictures, films = Resampler(**sizes), Resampler(**sizes, max_num_media=3, max_num_frames=4)
    show(
        same_patched(pictures, torch.randn(2, 3, 1, 20, 64)),
        same_patched(films, torch.randn(2, 2, 4, 20, 64)),
    )


if __name__ == "__main__":
    main()
