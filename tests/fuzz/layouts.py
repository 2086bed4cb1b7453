# SPDX-License-Identifier: Apache-2.0
"""The same values laid out otherwise in memory; what lies between them is poison."""

import random
from collections.abc import Sequence

import torch

LAYOUTS = ("permuted", "transposed", "channels_last", "step", "expanded", "offset", "window")

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
Drawn = tuple[tuple[str, str, int], ...]


def drawn(
    r: random.Random, names: Sequence[str], share: float, of: Sequence[str] = LAYOUTS
) -> Drawn:
    """Which of the named tensors are laid out otherwise, how, and from which seed."""
    return tuple(
        (n, layout, r.randrange(1000))
        for n in names
        if r.random() < share and (layout := r.choice(of))
    )


def poison_of(dtype: torch.dtype) -> float:
    """What a kernel must never read."""
    return float("nan") if dtype.is_floating_point else 199


def laid_out(tensor: torch.Tensor, layout: str, seed: int) -> torch.Tensor:
    """As ``tensor``, but ``expanded``, which repeats its first slice along a dimension."""
    r = random.Random(seed)
    dims = tensor.dim()
    if (
        dims == 0
        or tensor.numel() == 0
        or not (tensor.is_floating_point() or tensor.dtype == torch.uint8)
    ):
        return tensor
    dim = r.randrange(dims)
    if layout == "expanded":
        return tensor.narrow(dim, 0, 1).expand(tensor.shape)
    if layout == "channels_last" and dims in (4, 5):
        form = torch.channels_last if dims == 4 else torch.channels_last_3d
        return tensor.contiguous(memory_format=form)
    shape = list(tensor.shape)
    if layout in ("transposed", "permuted", "channels_last"):
        order = list(range(dims))
        if layout == "transposed":
            order[0], order[-1] = order[-1], order[0]
        else:
            r.shuffle(order)
        inverse = [order.index(i) for i in range(dims)]
        return tensor.permute(order).contiguous().permute(inverse)
    if layout == "step":
        step = r.choice((2, 3))
        shape[dim] = shape[dim] * step
        place = [slice(None)] * dims
        place[dim] = slice(r.randrange(step), None, step)
    elif layout == "window":
        before, after = r.randint(0, 3), r.randint(0, 3)
        place = [slice(None)] * dims
        place[dim] = slice(before, before + shape[dim])
        shape[dim] += before + after
    else:
        assert layout == "offset", layout
        odd = r.choice((1, 3, 5, 7))
        base = tensor.new_full((tensor.numel() + odd,), poison_of(tensor.dtype))
        base[odd:] = tensor.flatten()
        return base[odd:].view(tensor.shape)
    wide = tensor.new_full(shape, poison_of(tensor.dtype))
    wide[tuple(place)] = tensor
    return wide[tuple(place)]
