# SPDX-License-Identifier: Apache-2.0
"""Vision encoder: uint8 pixels to one feature per patch.

Dimensions: B images, C channels, H×W pixels, N=(H/P)·(W/P) patches plus one class token, D width, A heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from mmkernels.models.config import VisionConfig
from mmkernels.nn import PatchEmbed

IMAGE_MEAN = (0.5, 0.5, 0.5)
IMAGE_STD = (0.5, 0.5, 0.5)


class VisionEncoder(nn.Module):
    """A pre-norm ViT; normalisation, patches, class token and positions are one op.

    Source: ViT (Dosovitskiy et al. 2021).
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        D, side = config.hidden_size, config.image_size // config.patch_size
        self.patch_embed = PatchEmbed(
            3, D, config.patch_size,
            rescale_factor=1 / 255, image_mean=IMAGE_MEAN, image_std=IMAGE_STD,
        )  # fmt: skip
        with torch.no_grad():
            self.patch_embed.weight.copy_(_smooth_filters(D, config.patch_size))
        self.class_token = nn.Parameter(0.02 * torch.randn(D))
        self.position_embed = nn.Parameter(0.3 * patch_positions(side, D))
        self.layers = nn.ModuleList(
            Block(D, config.num_heads, config.intermediate_size, side)
            for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(D)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """``[B, 3, H, W]`` uint8 → ``[B, 1+N, D]``."""
        hidden_states = self.patch_embed(pixel_values, self.position_embed, self.class_token)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        image_embeds: torch.Tensor = self.norm(hidden_states)
        return image_embeds


class Block(nn.Module):
    """Self-attention and MLP, each on a normalised copy of the residual stream.

    Each head has a learned bias for every offset between two patches, and starts by looking at one
    neighbour: what a convolution is given, a small data set need not teach.
    Source: bias as in BEiT (Bao et al. 2021), its start as in ConViT (d'Ascoli et al. 2021).
    """

    def __init__(self, D: int, num_heads: int, intermediate_size: int, side: int) -> None:
        super().__init__()
        self.num_heads, self.side = num_heads, side
        self.offset_bias = nn.Parameter(_neighbour_bias(num_heads, side))
        self.norm1 = nn.LayerNorm(D)
        self.qkv = nn.Linear(D, 3 * D)
        self.proj = nn.Linear(D, D)
        self.norm2 = nn.LayerNorm(D)
        self.fc1 = nn.Linear(D, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, D)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.norm1(hidden_states)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        hidden_states = hidden_states + self.proj(self._attend(query, key, value))
        inner = F.gelu(self.fc1(self.norm2(hidden_states)), approximate="tanh")
        output: torch.Tensor = hidden_states + self.fc2(inner)
        return output

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        # Written out: the bias needs a gradient, which sends SDPA to this path on CPU anyway.
        scores = query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)
        scores = scores + self._pair_bias().to(scores.dtype)
        mixed: torch.Tensor = scores.softmax(-1) @ value
        return mixed.transpose(1, 2).flatten(2)

    def _pair_bias(self) -> torch.Tensor:
        """``offset_bias`` for every pair of patches ``[A, 1+N, 1+N]``; none for the class token."""
        at = torch.arange(self.side, device=self.offset_bias.device)
        step = at[None] - at[:, None] + self.side - 1
        bias = self.offset_bias[:, step[:, None, :, None], step[None, :, None, :]]
        return F.pad(bias.flatten(3).flatten(1, 2), (1, 0, 1, 0))


def _neighbour_bias(num_heads: int, side: int, sharpness: float = 1.5) -> torch.Tensor:
    """``[A, 2·side-1, 2·side-1]``: head h prefers the h-th of the eight neighbours."""
    around = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]
    centre = torch.tensor([around[h % 8] for h in range(num_heads)])
    at = torch.arange(1 - side, side)
    far = (at - centre[:, :1])[:, :, None] ** 2 + (at - centre[:, 1:])[:, None, :] ** 2
    return -sharpness * far.clamp(max=6).float()


def sincos(y: torch.Tensor, x: torch.Tensor, D: int) -> torch.Tensor:
    """2-D sine-cosine rows ``[n, D]`` for places in patch units, half for y and half for x."""
    frequency = 1.0 / 10 ** (torch.arange(D // 4) / (D // 4))
    phases = (axis[:, None] * frequency for axis in (y, x))
    return torch.cat([wave for phase in phases for wave in (phase.sin(), phase.cos())], dim=1)


def patch_positions(side: int, D: int) -> torch.Tensor:
    """``sincos`` of every patch in raster order after a zero row for the class token, ``[1+side², D]``."""
    at = torch.arange(side)
    return torch.cat((torch.zeros(1, D), sincos(at.repeat_interleave(side), at.repeat(side), D)))


def _smooth_filters(D: int, P: int, frequencies: int = 6) -> torch.Tensor:
    """Starting filters ``[D, 3, P, P]``: random mixtures of low frequencies, nearly blind to brightness and hue."""
    k, x = torch.arange(frequencies), (torch.arange(P) + 0.5) * math.pi / P
    cosines = (k[:, None] * x).cos() * (2 / P) ** 0.5
    waves = torch.einsum("ky,lx->klyx", cosines, cosines)
    mixture = 0.3 * torch.randn(D, frequencies, frequencies)
    mixture[:, 0, 0] *= 0.1
    grey = torch.einsum("dkl,klyx->dyx", mixture, waves)
    return (grey / 3)[:, None].repeat(1, 3, 1, 1)
