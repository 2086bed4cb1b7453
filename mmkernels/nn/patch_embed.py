# SPDX-License-Identifier: Apache-2.0
"""Patch embedding as a module: takes the place of processor arithmetic, ``Conv2d``, concat and add."""

from collections.abc import Sequence

import torch
from torch import nn

import mmkernels


class PatchEmbed(nn.Module):
    """Embeds the patches of uint8 or float images; ``weight`` and ``bias`` are those of ``nn.Conv2d``.

    Args:
        in_channels, embed_dim, patch_size: The convolution's channels, width and stride, in pixels.
        bias: Whether there is one.
        rescale_factor, image_mean, image_std: The image processor's; pixels are normalised by the op.
    Source: ``ViTPatchEmbeddings`` and its processor in transformers.
    """

    def __init__(
        self,
        in_channels: int,
        embed_dim: int,
        patch_size: int | tuple[int, int],
        *,
        bias: bool = True,
        rescale_factor: float | None = None,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        conv = nn.Conv2d(in_channels, embed_dim, patch_size, patch_size, bias=bias)
        self.weight = conv.weight
        self.bias = conv.bias
        self.rescale_factor = rescale_factor
        self.image_mean = image_mean
        self.image_std = image_std

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        *,
        rescale_factor: float | None = None,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> "PatchEmbed":
        """Shares the parameters of a stride = kernel convolution."""
        patch = (conv.kernel_size[0], conv.kernel_size[1])
        plain = conv.stride == patch and conv.groups == 1 and set(conv.dilation) == {1}
        if not plain or conv.padding not in ((0, 0), "valid"):
            raise ValueError(
                f"from_conv: conv must have stride = kernel, no padding, dilation or groups, got {conv}"
            )
        with torch.device("meta"):  # the conv's own parameters follow
            module = cls(
                conv.in_channels, conv.out_channels, patch, bias=conv.bias is not None,
                rescale_factor=rescale_factor, image_mean=image_mean, image_std=image_std,
            )  # fmt: skip
        module.weight, module.bias = conv.weight, conv.bias
        return module

    def forward(
        self,
        pixel_values: torch.Tensor,
        position_embed: torch.Tensor | None = None,
        prefix_tokens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``[B, C, H, W]`` → ``[B, R+N, D]``, prefix rows first."""
        return mmkernels.patch_embed(
            pixel_values,
            self.weight,
            self.bias,
            rescale_factor=self.rescale_factor,
            image_mean=self.image_mean,
            image_std=self.image_std,
            position_embed=position_embed,
            prefix_tokens=prefix_tokens,
        )
