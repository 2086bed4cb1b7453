# SPDX-License-Identifier: Apache-2.0
"""Vision encoder: uint8 pixels to one feature per patch.

Dimensions: C channels, H×W pixels, P patch side, t×h×w patches of an image or clip, D width, A heads, T tokens in all.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

import mmkernels
from mmkernels.models.attention import Packed
from mmkernels.models.config import VisionConfig
from mmkernels.models.features import Features

IMAGE_MEAN = (0.5, 0.5, 0.5)
IMAGE_STD = (0.5, 0.5, 0.5)


class VisionEncoder(nn.Module):
    """A pre-norm ViT over images of any sizes, packed; normalisation, patches, class token and positions are one op.

    Attention stays within a frame. Positions are resampled where an image is not ``image_size``.
    Source: ViT (Dosovitskiy et al. 2021); tubelets as in ViViT (Arnab et al. 2021); packing as in NaViT (Dehghani et
    al. 2023).
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config, D, P = config, config.hidden_size, config.patch_size
        side, t = config.image_size // P, config.temporal_patch_size
        if t > 1 and config.class_token:
            raise ValueError("vision: class_token goes with temporal_patch_size 1")
        filters = _smooth_filters(D, P)
        if t > 1:
            filters = filters[:, :, None].repeat(1, 1, t, 1, 1) / t
        self.weight, self.bias = nn.Parameter(filters), nn.Parameter(torch.zeros(D))
        self.class_token = nn.Parameter(0.02 * torch.randn(D)) if config.class_token else None
        self.position_embed = nn.Parameter(0.3 * patch_positions(side, D))
        biased = side if config.offset_bias else 0
        self.layers = nn.ModuleList(
            EncoderBlock(D, config.num_heads, config.intermediate_size, biased)
            for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(D)
        self.width = D

    def forward(self, items: Sequence[torch.Tensor]) -> Features:
        """Images ``[3, H, W]`` and clips ``[T, 3, H, W]``, uint8 → their features ``[T, D]``.

        Raises:
            ValueError: A size that the patches do not divide or, with ``offset_bias``, that is not ``image_size``.
        """
        patches = self._patches(items)
        prefix = int(self.class_token is not None)
        features = Features(patches.tokens, _grids(items, patches.grid_thw.tolist()), prefix)
        self._check(features)
        lengths = torch.tensor([0, *features.frames]).cumsum(0)
        frames = Packed(lengths.int(), max(features.frames, default=0), causal=False)
        hidden_states = patches.tokens
        for layer in self.layers:
            hidden_states = layer(hidden_states, frames)
        return features._replace(tokens=self.norm(hidden_states))

    def _patches(self, items: Sequence[torch.Tensor]) -> mmkernels.PackedPatches:
        side = self.config.image_size // self.config.patch_size
        if self.config.temporal_patch_size == 1:
            images = [
                frame for item in items for frame in (item if item.dim() == 4 else item[None])
            ]
        else:
            images = [item.transpose(0, 1) if item.dim() == 4 else item for item in items]
        return mmkernels.patch_embed_packed(
            images, self.weight, self.bias, rescale_factor=1 / 255, image_mean=IMAGE_MEAN, image_std=IMAGE_STD,
            prefix_tokens=self.class_token, position_table=self.position_embed.view(side, side, -1),
        )  # fmt: skip

    def _check(self, features: Features) -> None:
        side = self.config.image_size // self.config.patch_size
        bad = [g for g in features.grids if self.config.offset_bias and g[1:] != (side, side)]
        if bad:
            raise ValueError(
                f"vision: with offset_bias images must be {side}×{side} patches, got {bad[0][1]}×{bad[0][2]}"
            )


def _grids(
    items: Sequence[torch.Tensor], embedded: list[list[int]]
) -> tuple[tuple[int, int, int], ...]:
    """A grid an item, where the op may have seen each frame as an image of its own."""
    if len(embedded) == len(items):
        grids = [tuple(g) for g in embedded]
        return tuple((t, h, w) for t, h, w in grids)
    found, at = [], 0
    for item in items:
        frames = item.shape[0] if item.dim() == 4 else 1
        found.append((frames, embedded[at][1], embedded[at][2]))
        at += frames
    return tuple(found)


class EncoderBlock(nn.Module):
    """Self-attention and MLP, each on a normalised copy of the residual stream.

    With a ``side`` each head has a learned bias for every offset between two patches, and starts by looking at one
    neighbour: what a convolution is given, a small data set need not teach.
    Source: bias as in BEiT (Bao et al. 2021), its start as in ConViT (d'Ascoli et al. 2021).
    """

    def __init__(self, D: int, num_heads: int, intermediate_size: int, side: int = 0) -> None:
        super().__init__()
        self.num_heads, self.side = num_heads, side
        if side:
            self.offset_bias = nn.Parameter(_neighbour_bias(num_heads, side))
        self.norm1 = nn.LayerNorm(D)
        self.qkv = nn.Linear(D, 3 * D)
        self.proj = nn.Linear(D, D)
        self.norm2 = nn.LayerNorm(D)
        self.fc1 = nn.Linear(D, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, D)

    def forward(self, hidden_states: torch.Tensor, frames: Packed) -> torch.Tensor:
        qkv = self.qkv(self.norm1(hidden_states)).unflatten(-1, (3, self.num_heads, -1))
        bias = self._pair_bias(frames.max_seqlen) if self.side else None
        query, key, value = qkv.unbind(1)
        mixed = frames.attend(query, key, value, bias)
        hidden_states = hidden_states + self.proj(mixed.flatten(1))
        inner = F.gelu(self.fc1(self.norm2(hidden_states)), approximate="tanh")
        output: torch.Tensor = hidden_states + self.fc2(inner)
        return output

    def _pair_bias(self, L: int) -> torch.Tensor:
        """``offset_bias`` for every pair of tokens ``[A, L, L]``; none for a class token."""
        at = torch.arange(self.side, device=self.offset_bias.device)
        step = at[None] - at[:, None] + self.side - 1
        bias = self.offset_bias[:, step[:, None, :, None], step[None, :, None, :]]
        prefix = L - self.side**2
        return F.pad(bias.flatten(3).flatten(1, 2), (prefix, 0, prefix, 0))


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


def patch_positions(rows: int, D: int, columns: int | None = None) -> torch.Tensor:
    """``sincos`` of every patch in raster order, ``[rows·columns, D]``."""
    columns = rows if columns is None else columns
    y, x = torch.arange(rows), torch.arange(columns)
    return sincos(y.repeat_interleave(columns), x.repeat(rows), D)


def _smooth_filters(D: int, P: int, frequencies: int = 6) -> torch.Tensor:
    """Starting filters ``[D, 3, P, P]``: random mixtures of low frequencies, nearly blind to brightness and hue."""
    k, x = torch.arange(frequencies), (torch.arange(P) + 0.5) * math.pi / P
    cosines = (k[:, None] * x).cos() * (2 / P) ** 0.5
    waves = torch.einsum("ky,lx->klyx", cosines, cosines)
    mixture = 0.3 * torch.randn(D, frequencies, frequencies)
    mixture[:, 0, 0] *= 0.1
    grey = torch.einsum("dkl,klyx->dyx", mixture, waves)
    return (grey / 3)[:, None].repeat(1, 3, 1, 1)
