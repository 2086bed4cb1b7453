# SPDX-License-Identifier: Apache-2.0
"""Rows of the table: pixel shuffles and mergers that put m×m neighbours side by side.

What a ``pixel_shuffle`` does is read off one call with numbered features: which neighbours, in which order.
"""

import functools
import inspect
import math
from typing import Any

import torch
from torch import nn

from mmkernels import patch_merge
from mmkernels.hf.patch_embed import noise
from mmkernels.hf.row import Found, class_of

METHODS = ("pixel_shuffle", "pixel_unshuffle")
FACTORS = (
    "scale_factor",
    "downsample_factor",
    "downsample_ratio",
    "factor",
    "pixel_shuffle_factor",
)
LAYOUTS = [(order, transposed) for order in ("kkc", "ckk") for transposed in (False, True)]


def pixel_shuffle(module: nn.Module) -> Found | str | None:
    """A method that shuffles ``[B, H, W, C]`` or ``[B, H·W, C]``, with a factor of its own or given."""
    name = next(
        (n for n in METHODS if inspect.isfunction(getattr(class_of(module), n, None))), None
    )
    if name is None:
        return None
    places = (module, getattr(module, "config", None))
    factor = next((getattr(p, n) for p in places for n in FACTORS if hasattr(p, n)), None)
    if not isinstance(factor, int | float) or factor <= 0:
        return "its factor is not to be found"
    m = round(max(factor, 1 / factor))
    shuffle = functools.partial(getattr(class_of(module), name), module)
    for grid in (True, False):
        for given in ((), (factor,)):
            if found := _learned(shuffle, m, grid, given):
                run = functools.partial(_shuffle, m, grid, given, *found)
                probe = functools.partial(_call, m, grid, given)
                return Found("patch_merge", run, probe, method=name, pure=True)
    return "what its shuffle does is none of our layouts"


def _call(m: int, grid: bool, given: tuple[Any, ...], _: nn.Module) -> tuple[Any, ...]:
    return (_numbers(m, grid), *given)


def _numbers(m: int, grid: bool) -> torch.Tensor:
    numbers = torch.arange(2 * (3 * m) ** 2 * 2.0).view(2, 3 * m, 3 * m, 2)
    return numbers if grid else numbers.flatten(1, 2)


def _learned(shuffle: Any, m: int, grid: bool, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Order, transposed, and whether the result keeps its rows and columns; None if no layout gives the same."""
    try:
        expected = shuffle(_numbers(m, grid), *given)
    except Exception:  # a shuffle that wants other arguments
        return None
    for order, transposed in LAYOUTS:
        got = patch_merge(_numbers(m, True), m, order=order, transposed=transposed)
        if isinstance(expected, torch.Tensor) and torch.equal(expected.reshape(got.shape), got):
            return order, transposed, expected.dim() == 4
    return None


def _shuffle(
    m: int, grid: bool, given: tuple[Any, ...], order: str, transposed: bool, keeps: bool,
    module: nn.Module, original: Any, features: torch.Tensor, *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    side = math.isqrt(features.shape[1])
    square = (
        features.dim() == 4 if grid else features.dim() == 3 and side * side == features.shape[1]
    )
    sides = (features.shape[1:3] if grid else (side, side)) if square else (1,)
    same = (*args, *kwargs.values()) == given
    if not square or not same or any(s % m for s in sides) or not features.is_floating_point():
        return original(features, *args, **kwargs)
    out = patch_merge(
        features.view(len(features), *sides, -1), m, order=order, transposed=transposed
    )
    rows, columns = (s // m for s in (reversed(sides) if transposed else sides))
    return out.unflatten(1, (rows, columns)) if keeps else out


def unfolded(module: nn.Module) -> Found | str | None:
    """``merging_layer`` after ``unfold``, a loop over images: Mistral 3."""
    names = ("merging_layer", "spatial_merge_size", "patch_size")
    if not all(hasattr(module, n) for n in names):
        return None
    return Found("patch_merge", _unfold, _two_images)


def _two_images(module: Any) -> tuple[Any, ...]:
    m, P = module.spatial_merge_size, module.patch_size
    sizes = [(2 * m * P, m * P), (m * P, 3 * m * P)]
    return noise(module, 5 * m * m, module.merging_layer.in_features // m**2), sizes


# Sizes are numbers of the host: one break, where the model's own loop has several.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _unfold(
    module: Any, original: Any, image_features: torch.Tensor, image_sizes: Any
) -> torch.Tensor:
    m, P = module.spatial_merge_size, module.patch_size
    sizes = image_sizes.tolist() if isinstance(image_sizes, torch.Tensor) else image_sizes
    grid = [[1, int(h) // P, int(w) // P] for h, w in sizes]
    if image_features.dim() != 2 or any(h % m or w % m for _, h, w in grid):
        return original(image_features, image_sizes)
    merged = patch_merge(image_features, m, grid_thw=torch.tensor(grid), order="ckk")
    out: torch.Tensor = module.merging_layer(merged)
    return out
