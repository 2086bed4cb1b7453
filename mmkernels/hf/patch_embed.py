# SPDX-License-Identifier: Apache-2.0
"""Rows of the table: convolutions that cut patches, and the embeddings around them."""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import nn

from mmkernels import patch_embed
from mmkernels.hf.row import Found, class_of, is_sharded

OVERLAPPING = 8  # from this patch on, overlapping patches of few channels are a spectrogram's, not a network's stem


def convolution(layer: nn.Module) -> Found | str | None:
    """A Conv2d or Conv3d without padding whose patches lie side by side: a GEMM."""
    if not isinstance(layer, nn.Conv2d | nn.Conv3d):
        return None
    kernel, stride = layer.kernel_size, layer.stride
    cuts = kernel == stride and math.prod(kernel) > 1
    overlapping = layer.in_channels <= 4 and min(kernel[-2:]) >= OVERLAPPING and all(
        0 < s <= k for s, k in zip(stride, kernel, strict=True)
    )  # fmt: skip
    if not cuts and not overlapping:
        return None
    if class_of(layer) not in (nn.Conv2d, nn.Conv3d):
        return f"is a {class_of(layer).__name__}, which may compute otherwise"
    if (
        layer.padding not in ("valid", (0,) * len(kernel))
        or layer.groups != 1
        or set(layer.dilation) != {1}
    ):
        return "pads, dilates or groups"
    return Found("patch_embed", _convolve, _pixels)


def _pixels(layer: nn.Module) -> tuple[Any, ...]:
    """Two images of 2 patches a side."""
    assert isinstance(layer, nn.Conv2d | nn.Conv3d)
    sides = [k + s for k, s in zip(layer.kernel_size, layer.stride, strict=True)]
    return (noise(layer, 2, layer.in_channels, *sides),)


def noise(module: nn.Module, *shape: int) -> torch.Tensor:
    device = next(module.parameters()).device
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(1), device=device)


def _convolve(layer: Any, original: Any, input: torch.Tensor) -> torch.Tensor:
    """``[B, C, …]`` → ``[B, D, …]``, a permuted view of tokens, which models flatten next."""
    kernel, stride = layer.kernel_size, layer.stride
    sides = input.shape[2:]
    if not input.is_floating_point() or input.dim() != len(kernel) + 2 or is_sharded(layer.weight):
        return original(input)
    if tuple(sides) == kernel:  # rows cut already (Qwen2-VL)
        tokens = patch_embed(input.flatten(1), layer.weight, layer.bias)
        return tokens.view(-1, layer.out_channels, *(1,) * len(kernel))
    if any(side < k for side, k in zip(sides, kernel, strict=True)):
        return original(input)
    grid = [(side - k) // s + 1 for side, k, s in zip(sides, kernel, stride, strict=True)]
    tokens = patch_embed(input, layer.weight, layer.bias, stride=stride, crop=True)
    return tokens.transpose(1, 2).unflatten(2, grid)


class Names(NamedTuple):
    """Where an embedding's parts are."""

    conv: str
    position: str | None
    tokens: tuple[str, ...]
    dropout: str | None


def embeddings(module: nn.Module) -> Found | str | None:
    """A convolution, at most one table of positions and a few prefix tokens, and nothing else: ViT's embeddings."""
    names = _names(module)
    if names is None:
        return None
    side = _side(module, names)
    if side is None:
        return "the image size is not to be told from its positions"
    layers = [names.conv]
    if names.position is not None and names.position.endswith(".weight"):
        layers.append(names.position.removesuffix(".weight"))
    run = functools.partial(_embed, names, side)
    probe = functools.partial(_image, names, side)
    return Found("patch_embed + positions + prefix", run, probe, tuple(layers))


def _names(module: nn.Module) -> Names | None:
    """None if the module has other parts."""
    convs = [n for n, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
    if len(convs) != 1 or convs[0] == "":
        return None
    conv: Any = module.get_submodule(convs[0])
    if not isinstance(conv, nn.Conv2d) or not isinstance(convolution(conv), Found):
        return None
    layers = {m for m in module.modules() if hasattr(m, "weight") and m is not conv}
    if not all(isinstance(m, nn.Embedding) for m in layers):
        return None  # a norm
    others = {n: p for n, p in module.named_parameters() if not n.startswith(convs[0] + ".")}
    if not others or any(p.shape[-1:] != (conv.out_channels,) for p in others.values()):
        return None
    tables = [n for n, p in others.items() if p.shape[:-1].numel() > 1 and "token" not in n]
    tokens = tuple(n for n in others if n not in tables and "mask" not in n)
    dropouts = [n for n, m in module.named_modules() if isinstance(m, nn.Dropout)]
    if len(tables) > 1 or len(dropouts) > 1 or not (tables or tokens):
        return None
    return Names(convs[0], next(iter(tables), None), tokens, next(iter(dropouts), None))


def _side(module: nn.Module, names: Names) -> tuple[int, ...] | None:
    """Pixels (h, w) that the table of positions is for; without one, any will do."""
    conv: Any = module.get_submodule(names.conv)
    if names.position is None:
        return (2 * conv.kernel_size[0], 3 * conv.kernel_size[1])
    rows = _rows(module, names.position, conv.out_channels).shape[0]
    prefixes = sum(len(_rows(module, n, conv.out_channels)) for n in names.tokens)
    for places in range(rows, rows - prefixes - 1, -1):
        side = math.isqrt(max(0, places))
        if side > 0 and side * side == places:
            return tuple(side * k for k in conv.kernel_size)
    return None


def _image(names: Names, side: tuple[int, ...], module: nn.Module) -> tuple[Any, ...]:
    conv: Any = module.get_submodule(names.conv)
    return (noise(module, 2, conv.in_channels, *side),)


def _embed(
    names: Names, side: tuple[int, ...], module: nn.Module, original: Any,
    pixel_values: torch.Tensor, *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    conv: Any = module.get_submodule(names.conv)
    asked = [v for v in (*args, *kwargs.values()) if v is not None and v is not False]
    # Under autocast only the convolution is cast: class token and positions stay, and the sum, in the model's dtype.
    asked += [True] * torch.is_autocast_enabled(pixel_values.device.type)
    fixed = names.position is None or tuple(pixel_values.shape[2:]) == side
    if asked or not fixed or pixel_values.dim() != 4:
        return original(pixel_values, *args, **kwargs)
    D = conv.out_channels
    tokens = [_rows(module, n, D) for n in names.tokens]
    out = patch_embed(
        pixel_values, conv.weight, conv.bias, crop=True, prefix_tokens=torch.cat(tokens) if tokens else None,
        position_embed=None if names.position is None else _rows(module, names.position, D),
    )  # fmt: skip
    return out if names.dropout is None else module.get_submodule(names.dropout)(out)


def _rows(module: nn.Module, name: str, width: int) -> torch.Tensor:
    """A parameter as ``[rows, width]``."""
    owner, _, last = name.rpartition(".")
    found: torch.Tensor = getattr(module.get_submodule(owner), last)
    return found.reshape(-1, width)
