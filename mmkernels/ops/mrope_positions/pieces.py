# SPDX-License-Identifier: Apache-2.0
"""Pieces the reference puts together: ``[1 or axes, tokens]``."""

import torch


def ramp(start: int | torch.Tensor, count: int) -> torch.Tensor:
    """Text: one more each token, the same on every axis."""
    return (torch.arange(count) + start)[None]


def grid(time: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """``[3, len(time)·h·w]``: time, row and column of every token, in raster order."""
    sides = (torch.arange(n, dtype=time.dtype) for n in (h, w))
    return torch.stack(torch.meshgrid(time, *sides, indexing="ij")).flatten(1)
