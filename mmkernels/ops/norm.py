# SPDX-License-Identifier: Apache-2.0
"""A norm as an argument of an op."""

from typing import NamedTuple

import torch

from mmkernels import checks


class Norm(NamedTuple):
    """LayerNorm or RMSNorm over the last axis: ``y = (x − mean) / √(var + eps) · weight + bias``, or
    ``y = x / √(mean(x²) + eps) · weight``; without weight, 1; without bias, 0."""

    kind: str  # "layer" or "rms"
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    eps: float = 1e-6


def check_norm(
    op: str, name: str, norm: Norm | None, width: int, like: torch.Tensor, like_name: str
) -> None:
    """Its kind, and that its vectors are ``[width]`` of the dtype and device of ``like``."""
    if norm is None:
        return
    if norm.kind not in ("layer", "rms"):
        checks.fail(op, name, repr(norm.kind), '"layer" or "rms"')
    if norm.kind == "rms" and norm.bias is not None:
        checks.fail(op, name, "a bias", 'without a bias if "rms"')
    if not norm.eps >= 0:
        checks.fail(op, f"{name}.eps", norm.eps, "at least 0")
    for part, vector in (("weight", norm.weight), ("bias", norm.bias)):
        if vector is not None:
            checks.like(op, f"{name}.{part}", vector, like, like_name)
            checks.shape(op, f"{name}.{part}", vector, (width,), f"[{width}]")
