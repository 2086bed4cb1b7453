# SPDX-License-Identifier: Apache-2.0
"""Rotary positions and the paged write in plain PyTorch: the definition of correct.

Dimensions: T tokens, heads of d channels; caches ``[pages, page_size, kv_heads, d]``; slot = page · page_size + offset.

What rounds where: QK-norm (``x / √(mean x² + eps) · weight``) and rotation (see ``mrope``) in fp32 without a rounding
between; the result rounds once to the dtype of query and key and, from fp32 again, once to that of the cache. A float
cache of the key's dtype therefore holds the bits that are returned. int8: ``round(x / scale)``, ties to even, clamped
to −127…127; float8_e4m3fn: ``x / scale`` clamped to ±448, then rounded, ties to even. fp64: as fp32.
"""

import torch

from mmkernels.ops.mrope.reference import rotated, rotation

OP = "rope_write_kv"


def rope_write_kv(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    position_ids: torch.Tensor,
    inv_freq: torch.Tensor,
    axis: torch.Tensor | None,
    pairing: str,
    attention_scaling: float,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key rotated; key and value written. ``position_ids`` ``[A, T]``, scales ``[kv_heads]``."""
    pages, page_size = key_cache.shape[:2]
    check_slots(slot_mapping, pages * page_size)
    cos, sin = rotation(OP, query.dtype, position_ids, inv_freq, axis, attention_scaling)
    turned = [
        rotated(_normed(x, weight, eps, cos.dtype), cos, sin, pairing)
        for x, weight in ((query, q_norm), (key, k_norm))
    ]
    written = slot_mapping >= 0
    slots = slot_mapping[written].long()
    for cache, rows, scale in (
        (key_cache, turned[1], k_scale), (value_cache, value.to(cos.dtype), v_scale),
    ):  # fmt: skip
        _bits(cache)[slots // page_size, slots % page_size] = _bits(
            stored(rows[written], cache.dtype, scale)
        )
    return turned[0].to(query.dtype).contiguous(), turned[1].to(key.dtype).contiguous()


def _normed(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, acc: torch.dtype
) -> torch.Tensor:
    if weight is None:
        return x
    wide = x.to(acc)
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(acc)


def stored(rows: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None) -> torch.Tensor:
    """Rows ``[T, kv_heads, d]`` as the cache holds them."""
    if scale is None:
        return rows.to(dtype)
    rows = rows.float() / scale[:, None]
    if dtype == torch.int8:
        return rows.round().clamp(-127, 127).nan_to_num(0.0).to(dtype)
    return rows.clamp(-448, 448).to(dtype)


def _bits(t: torch.Tensor) -> torch.Tensor:
    """float8 as bytes: it can be stored, but not indexed."""
    return t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t


def check_slots(slot_mapping: torch.Tensor, slots: int) -> None:
    """On CPU: −1 or a slot, and no slot twice."""
    if slot_mapping.device.type != "cpu":
        return
    bad = ((slot_mapping < -1) | (slot_mapping >= slots)).nonzero()
    if bad.numel():
        t = int(bad[0])
        raise ValueError(
            f"{OP}: slot_mapping[{t}] is {int(slot_mapping[t])}, expected a slot in [0, {slots}) or -1 (skipped)"
        )
    seen: dict[int, int] = {}
    for t, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0 and seen.setdefault(slot, t) != t:
            raise ValueError(
                f"{OP}: slot_mapping[{t}] is {slot}, expected a slot of its own (slot_mapping[{seen[slot]}] has it)"
            )
