# SPDX-License-Identifier: Apache-2.0
"""Patch embedding as modules: take the place of processor arithmetic, convolution, concat and add."""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn

import mmkernels
from mmkernels.ops import PackedPatches

Layer = nn.Conv2d | nn.Conv3d | nn.Linear
Module = TypeVar("Module", bound="_Patches")


class _Patches(nn.Module):
    """``weight`` and ``bias`` of the layer replaced, and the op's arguments that a model fixes."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        in_channels: int,
        embed_dim: int,
        patch_size: int | Sequence[int],
        *,
        bias: bool = True,
        stride: int | Sequence[int] | None = None,
        rescale_factor: float | None = None,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        prefix: str = "first",
        patch_order: str = "cpp",
        merge_size: int = 1,
        pad: bool = False,
        crop: bool = False,
        norm: nn.Module | None = None,
        pre_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        affine = {
            "rescale_factor": rescale_factor,
            "image_mean": image_mean,
            "image_std": image_std,
        }
        if pre_norm is not None and any(v is not None for v in affine.values()):
            raise ValueError(
                f"pre_norm comes before the op, which would rescale and normalise after it: got {affine}"
            )
        patch = (patch_size,) * 2 if isinstance(patch_size, int) else tuple(patch_size)
        layer = _layer(in_channels, embed_dim, patch, patch_order, bias)
        self.weight, self.bias = layer.weight, layer.bias
        self.norm, self.pre_norm = norm, pre_norm
        if stride is None and patch_order == "ppc":
            stride = patch  # a Linear's weight does not tell its patch
        self.options: dict[str, Any] = {
            **affine, "stride": stride, "prefix": prefix, "patch_order": patch_order,
            "merge_size": merge_size, "pad": pad, "crop": crop,
        }  # fmt: skip

    @classmethod
    def from_conv(
        cls: type[Module],
        conv: Layer,
        *,
        stride: int | Sequence[int] | None = None,
        **options: Any,
    ) -> Module:
        """Shares the parameters of a ``Conv2d``, a ``Conv3d`` or a ``Linear`` on flattened patches.

        Args:
            conv: Without padding, dilation or groups; stride = kernel, unless ``stride`` repeats its own.
            stride: The convolution's, if patches overlap; the patch of a Linear, if it is not square.
            options: Those of the class.
        """
        kinds = (nn.Conv2d, nn.Conv3d, nn.Linear)
        if isinstance(conv, kinds) and type(conv).forward not in [k.forward for k in kinds]:
            raise ValueError(
                f"from_conv: conv must not override forward, which would be lost, got {type(conv)}"
            )
        if isinstance(conv, nn.Linear):
            C, D, patch = 1, conv.out_features, [1, conv.in_features]
        else:
            _check_conv(conv, stride)
            C, D, patch = conv.in_channels, conv.out_channels, list(conv.kernel_size)
        with torch.device("meta"):  # the layer's own parameters follow
            module = cls(C, D, patch, bias=conv.bias is not None, stride=stride, **options)
        module.options["stride"] = stride
        module.weight, module.bias = conv.weight, conv.bias
        return module

    def extra_repr(self) -> str:
        """The weight's shape and what differs from the op's defaults."""
        set_ = {k: v for k, v in self.options.items() if v not in (None, False, 1, "first", "cpp")}
        return ", ".join([str(list(self.weight.shape)), *(f"{k}={v}" for k, v in set_.items())])

    def _normed(self, rows: torch.Tensor) -> torch.Tensor:
        if self.pre_norm is None:
            return rows
        if rows.dim() > 3:
            raise ValueError(
                f"pre_norm: pixels must be rows [B, N, K] or [n, K], got {list(rows.shape)}"
            )
        normed: torch.Tensor = self.pre_norm(rows.to(self.weight.dtype))
        return normed

    def _refuse(self, **extras: object) -> None:
        """What cannot be ordered with tokens that are normalised after the op."""
        for name, value in extras.items():
            if value is not None:
                raise ValueError(
                    f"{name}: must be None with a norm between projection and positions"
                )


class PatchEmbed(_Patches):
    """Embeds the patches of images or clips; ``weight`` and ``bias`` are those of the layer replaced.

    ``out[b, R+n] = norm(weight · pre_norm(patch(b, n)) + bias) + position[n]``

    Args:
        in_channels, embed_dim: The convolution's channels and width.
        patch_size: In pixels, one number or (h, w): ``weight`` is a Conv2d's; (t, h, w): a Conv3d's. With
            ``patch_order="ppc"`` it is a Linear's, ``[D, K]``.
        bias: Whether there is one.
        stride, rescale_factor, image_mean, image_std, prefix, patch_order, merge_size, pad, crop: As in
            ``mmkernels.patch_embed``.
        norm: A module such as ``nn.RMSNorm`` between projection and positions (Ovis2, Pixtral). Prefix
            tokens, and positions with ``merge_size`` > 1, are then refused.
        pre_norm: A module on the flattened patches (Gemma 4 unified): pixels must be rows.
    Source: ``ViTPatchEmbeddings``, ``VivitTubeletEmbeddings`` and their processors in transformers.
    """

    def forward(
        self,
        pixel_values: torch.Tensor,
        position_embed: torch.Tensor | None = None,
        prefix_tokens: torch.Tensor | None = None,
        *,
        grid_thw: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``[B, C, H, W]``, ``[B, C, T, H, W]``, or rows: ``[B, R+N, D]``. Rows ``[n, K]``: ``[n, D]``.

        Rows ``[B, N, K]`` want the weight of a Linear: beside a convolution's they would be an image without a batch.
        """
        inputs, options = self._normed(pixel_values), {**self.options, "grid_thw": grid_thw}
        if self.norm is None:
            options |= {"position_embed": position_embed, "prefix_tokens": prefix_tokens}
            return mmkernels.patch_embed(inputs, self.weight, self.bias, **options)
        self._refuse(prefix_tokens=prefix_tokens)
        tokens: torch.Tensor = self.norm(
            mmkernels.patch_embed(inputs, self.weight, self.bias, **options)
        )
        if position_embed is None:
            return tokens
        self._refuse(position_embed=position_embed if options["merge_size"] > 1 else None)
        return tokens + position_embed


class PackedPatchEmbed(_Patches):
    """Embeds images of different sizes into one sequence; positions resampled from ``position_table``.

    Args:
        position_table: Becomes the parameter of that name (shared if it is one): ``[rows, columns, D]``,
            ``[2, n, D]`` with ``"factorised"``, ``[S+N, D]`` with ``"fixed"``.
        position_mode, align_corners, antialias: As in ``mmkernels.patch_embed_packed``.
        The others: As in ``PatchEmbed``; with a ``norm`` there are neither positions nor prefix tokens.
    Source: ``Qwen3VLVisionModel``, ``Siglip2VisionEmbeddings``, ``Idefics2VisionEmbeddings`` of transformers.
    """

    def __init__(
        self,
        in_channels: int,
        embed_dim: int,
        patch_size: int | Sequence[int],
        *,
        position_table: torch.Tensor | None = None,
        position_mode: str = "bilinear",
        align_corners: bool = False,
        antialias: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(in_channels, embed_dim, patch_size, **options)
        if position_table is not None and not isinstance(position_table, nn.Parameter):
            position_table = nn.Parameter(position_table)
        self.position_table = position_table
        self.options |= {
            "position_mode": position_mode, "align_corners": align_corners, "antialias": antialias,
        }  # fmt: skip

    def forward(
        self,
        images: Sequence[torch.Tensor] | torch.Tensor,
        grid_thw: torch.Tensor | None = None,
        *,
        position_table: torch.Tensor | Sequence[torch.Tensor] | None = None,
        prefix_tokens: torch.Tensor | None = None,
    ) -> PackedPatches:
        """A list of ``[C, H, W]`` and ``[C, T, H, W]``, or rows ``[n, K]`` and ``grid_thw`` → PackedPatches.

        ``position_table`` takes the place of the parameter: a table that lives elsewhere, in another shape.
        """
        table = self.position_table if position_table is None else position_table
        if isinstance(images, torch.Tensor):
            images = self._normed(images)
        elif self.pre_norm is not None:
            raise ValueError("pre_norm: images must be rows [n, K] with grid_thw, got a list")
        if self.norm is not None:
            self._refuse(position_table=table, prefix_tokens=prefix_tokens)
        packed = mmkernels.patch_embed_packed(
            images, self.weight, self.bias, grid_thw=grid_thw, position_table=table,
            prefix_tokens=prefix_tokens, **self.options,
        )  # fmt: skip
        return packed if self.norm is None else packed._replace(tokens=self.norm(packed.tokens))


class AudioPatchEmbed(PatchEmbed):
    """Embeds overlapping patches of a spectrogram, a rest of frames or bins left out.

    Args:
        embed_dim, patch_size: Width and side of the patches; ``weight`` is ``[D, 1, P, P]``.
        frequency_stride, time_stride: From patch to patch, in bins and frames.
        bias: Whether there is one.
        image_mean, image_std: The feature extractor's, one number each (AST divides by twice its ``std``).
    Source: AST (Gong et al. 2021); ``ASTEmbeddings`` of transformers.
    """

    def __init__(
        self,
        embed_dim: int,
        patch_size: int = 16,
        *,
        frequency_stride: int = 10,
        time_stride: int = 10,
        bias: bool = True,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(
            1, embed_dim, patch_size, bias=bias, stride=(frequency_stride, time_stride), crop=True,
            image_mean=image_mean, image_std=image_std,
        )  # fmt: skip

    @classmethod
    def from_conv(cls, conv: Layer, **options: Any) -> "AudioPatchEmbed":
        """Shares the parameters of a ``Conv2d(1, D, P, (frequency_stride, time_stride))``."""
        square = isinstance(conv, nn.Conv2d) and conv.kernel_size[0] == conv.kernel_size[1]
        if not isinstance(conv, nn.Conv2d) or not square or conv.in_channels != 1:
            raise ValueError(
                f"from_conv: conv must be a Conv2d(1, D, P) of square patches, got {conv}"
            )
        _check_conv(conv, conv.stride)
        frequency_stride, time_stride = conv.stride
        with torch.device("meta"):
            module = cls(
                conv.out_channels, conv.kernel_size[0], bias=conv.bias is not None,
                frequency_stride=frequency_stride, time_stride=time_stride, **options,
            )  # fmt: skip
        module.weight, module.bias = conv.weight, conv.bias
        return module

    def forward(  # type: ignore[override]  # a spectrogram has one layout
        self,
        input_values: torch.Tensor,
        position_embed: torch.Tensor | None = None,
        prefix_tokens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``[B, frames, mel]`` → ``[B, R+N, D]``, patches by frequency, then time."""
        if input_values.dim() != 3:
            raise ValueError(
                f"input_values must be [B, frames, mel], got {list(input_values.shape)}"
            )
        return super().forward(input_values.mT.unsqueeze(1), position_embed, prefix_tokens)


def _layer(
    in_channels: int, embed_dim: int, patch: Sequence[int], patch_order: str, bias: bool
) -> Layer:
    if patch_order == "ppc":
        return nn.Linear(in_channels * math.prod(patch), embed_dim, bias=bias)
    if len(patch) == 3:
        t, h, w = patch
        return nn.Conv3d(in_channels, embed_dim, (t, h, w), (t, h, w), bias=bias)
    h, w = patch
    return nn.Conv2d(in_channels, embed_dim, (h, w), (h, w), bias=bias)


def _check_conv(conv: nn.Conv2d | nn.Conv3d, stride: int | Sequence[int] | None) -> None:
    if not isinstance(conv, nn.Conv2d | nn.Conv3d):
        raise TypeError(f"from_conv: conv must be a Conv2d, a Conv3d or a Linear, got {conv}")
    axes = len(conv.kernel_size)
    chosen = (stride,) * axes if isinstance(stride, int) else tuple(stride or conv.kernel_size)
    plain = (
        conv.groups == 1 and set(conv.dilation) == {1} and conv.padding in ((0,) * axes, "valid")
    )
    if not plain or tuple(conv.stride) != chosen:
        raise ValueError(
            "from_conv: conv must have stride = kernel (or its stride passed as stride=), no padding,"
            f" dilation or groups, got {conv}"
        )
