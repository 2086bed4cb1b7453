# SPDX-License-Identifier: Apache-2.0
"""Rotary positions in plain PyTorch: the definition of correct.

Dimensions: A axes of positions, B batch, L tokens, H heads of d channels, r ≤ d of them rotary.

Channel c turns by ``angle = float(position_ids[axis[c]]) · inv_freq[c]``, a product in fp32 as transformers' modules
make it, whatever the dtype. What rounds where: cos and sin of that angle, times ``attention_scaling``, in fp32; the
rotation in fp32, rounded once. (Eager models round cos, sin, both products and their sum to the dtype.) fp64 inputs:
all but the angle in fp64. Channels from r on are copied.
"""

import torch


def mrope(
    query: torch.Tensor,
    key: torch.Tensor,
    position_ids: torch.Tensor,
    inv_freq: torch.Tensor,
    axis: torch.Tensor | None,
    pairing: str,
    attention_scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both ``[B, L, heads, d]``; ``position_ids`` ``[A, B, L]``, ``inv_freq`` and ``axis`` ``[r]``."""
    cos, sin = rotation("mrope", query.dtype, position_ids, inv_freq, axis, attention_scaling)
    return tuple(  # type: ignore[return-value]
        rotated(x, cos, sin, pairing).to(x.dtype).contiguous() for x in (query, key)
    )


def mrope_backward(
    grad_query: torch.Tensor,
    grad_key: torch.Tensor,
    position_ids: torch.Tensor,
    inv_freq: torch.Tensor,
    axis: torch.Tensor | None,
    pairing: str,
    attention_scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The transpose: with channels of a pair on one axis, the rotation back. (Hunyuan's are not.)"""
    cos, sin = rotation("mrope", grad_query.dtype, position_ids, inv_freq, axis, attention_scaling)
    sin = -partners(sin, pairing)
    return tuple(  # type: ignore[return-value]
        rotated(g, cos, sin, pairing).to(g.dtype).contiguous() for g in (grad_query, grad_key)
    )


def rotation(
    op: str,
    dtype: torch.dtype,
    position_ids: torch.Tensor,
    inv_freq: torch.Tensor,
    axis: torch.Tensor | None,
    attention_scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin ``[..., r]`` in at least fp32."""
    if axis is None:
        positions = position_ids[0, ..., None]
    else:
        check_axis(op, axis, position_ids.shape[0])
        positions = position_ids[axis].movedim(0, -1)
    angle = (positions.float() * inv_freq).to(torch.promote_types(dtype, torch.float32))
    return angle.cos() * attention_scaling, angle.sin() * attention_scaling


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, pairing: str) -> torch.Tensor:
    """Heads ``[..., H, d]`` by the rotation of their token ``[..., r]``, unrounded."""
    cos, sin, r = cos[..., None, :], sin[..., None, :], cos.shape[-1]
    wide = x.to(cos.dtype)
    turned, passed = wide[..., :r], wide[..., r:]
    first = torch.arange(r, device=x.device) < r // 2 if pairing == "half" else _even(r, x.device)
    other = partners(turned, pairing)
    return torch.cat([turned * cos + torch.where(first, -other, other) * sin, passed], -1)


def partners(x: torch.Tensor, pairing: str) -> torch.Tensor:
    """The other channel of each pair."""
    r = x.shape[-1]
    if pairing == "half":
        return x.roll(r // 2, -1)
    return x.unflatten(-1, (r // 2, 2)).flip(-1).flatten(-2)


def _even(r: int, device: torch.device) -> torch.Tensor:
    return torch.arange(r, device=device) % 2 == 0


def check_axis(op: str, axis: torch.Tensor, A: int) -> None:
    """On CPU: an axis is a row of the positions."""
    if axis.device.type != "cpu":
        return
    bad = ((axis < 0) | (axis >= A)).nonzero()
    if bad.numel():
        c = int(bad[0])
        raise ValueError(
            f"{op}: axis[{c}] is {int(axis[c])}, expected a row of position_ids in [0, {A})"
        )
