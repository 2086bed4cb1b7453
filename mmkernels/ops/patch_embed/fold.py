# SPDX-License-Identifier: Apache-2.0
"""One frame under a temporal weight repeats: the weight is summed over time, half the work of two frames.

In 16 bits the sum rounds, which the repeated frame does not: it may take the place of the pixel's rounding, not
join it. So bytes to be normalised are taken as whole numbers about their mean, exact in 16 bits; their scale goes
into the summed weight before it rounds, the rest of the mean into the bias, in fp32. Others are not folded. As
``csrc/patch_embed/fold.h``.
"""

import math

import torch

Numbers = list[float] | None
_WIDE = (torch.float32, torch.float64)


def allowed(pixels: torch.dtype, weight: torch.dtype, scale: Numbers, padded: bool) -> bool:
    """Whether summing the weight adds no rounding; what is padded is no whole number."""
    return weight in _WIDE or (pixels == torch.uint8 and scale is not None and not padded)


def summed(weight: torch.Tensor) -> torch.Tensor:
    """``[D,C,P_t,P_h,P_w]`` → ``[D,C,1,P_h,P_w]``, rounded once."""
    if weight.shape[2] == 2:  # one addition rounds once, whatever it runs in
        return weight.sum(2, keepdim=True)
    return weight.sum(2, keepdim=True, dtype=torch.float64).to(weight.dtype)


def centred(scale: float, shift: float) -> tuple[float, float, float, float]:
    """``(step, offset, times, rest)``: pixel·scale + shift = (pixel·step + offset)·times + rest, and a byte's
    pixel·step + offset is exact in 16 bits: step is a power of two, so the weight keeps its range."""
    if scale == 0:
        return 1.0, 0.0, 0.0, shift
    step = 2.0 ** (math.frexp(scale)[1] - 1)
    centre = min(max(round(-shift / scale), 0), 255)
    return step, -centre * step, scale / step, scale * centre + shift


def folded(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: Numbers,
    shift: Numbers,
) -> tuple[torch.Tensor, torch.Tensor | None, Numbers, Numbers]:
    """Weight, bias (fp32 for bytes in 16 bits), scale and shift of the call without time."""
    if weight.dtype in _WIDE or scale is None or shift is None:
        return summed(weight), bias, scale, shift
    numbers = [centred(*both) for both in zip(scale, shift, strict=True)]
    sums = weight.sum(2, keepdim=True, dtype=torch.float32)
    of_channels = sums.sum((2, 3, 4))
    more = torch.zeros_like(of_channels[:, 0]) if bias is None else bias.float()
    for c, (_, _, times, rest) in enumerate(numbers):  # numbers, not a tensor: nothing to upload
        more = more + of_channels[:, c] * rest
        sums[:, c] *= times
    return sums.to(weight.dtype), more, [n[0] for n in numbers], [n[1] for n in numbers]
