# SPDX-License-Identifier: Apache-2.0
"""The public ``rope_write_kv``: what it computes, and the checks before it does."""

import torch

from mmkernels import checks, transforms
from mmkernels.ops.mrope.arguments import check_heads, check_table, positions_of
from mmkernels.ops.rope_write_kv.op import FORWARD

_OP = "rope_write_kv"
SCALED = (torch.int8, torch.float8_e4m3fn)  # cache dtypes that need a scale


def rope_write_kv(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    position_ids: torch.Tensor,
    inv_freq: torch.Tensor,
    axis: torch.Tensor | None = None,
    *,
    pairing: str = "half",
    attention_scaling: float = 1.0,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """QK-norm, RoPE or M-RoPE, and the write of key and value into a paged cache, in one pass.

    ``query, key = rotate(norm(query)), rotate(norm(key))`` (see ``mrope``), then, in place,
    ``key_cache[slot // page_size, slot % page_size] = key[t]`` and the same of value, ``slot = slot_mapping[t]``.

    Args:
        query: ``[T, heads, d]``. key, value: ``[T, kv_heads, d]``. Any strides, as views of one fused projection.
        key_cache, value_cache: ``[pages, page_size, kv_heads, d]``, written in place; any strides but of d, both
            of one shape and dtype: any float (as key or not), or int8 or float8_e4m3fn with scales.
        slot_mapping: int64 or int32 ``[T]``; −1 is not written (its query and key are still rotated).
        position_ids, inv_freq, axis, pairing, attention_scaling: As for ``mrope``, ``[T]`` or ``[A, T]``.
        q_norm, k_norm: Weights ``[d]`` of an RMSNorm of each head before the rotation (Qwen3), with ``eps``.
        k_scale, v_scale: fp32, of one element or ``[kv_heads]``, positive: the cache holds ``x / scale``.

    Returns:
        Query and key, normed and rotated, contiguous.

    Raises:
        ValueError, TypeError: Names argument, got, expected. On CPU a slot out of range and a slot named twice are
            found before anything is written. On CUDA a slot out of range is not written and is raised by the next
            ``poll_errors()``; of a slot named twice either token may win.

    Numerics: in fp32 from the first read to the one rounding of each output; int8 is off by scale / 2 at most where
        ``|x| ≤ 127 · scale`` (details in ``reference.py``). No gradient: train with ``mrope``.

    Source: ``reshape_and_cache_flash`` of vLLM; ``Qwen3Attention`` of transformers.
    """
    checks.floating(_OP, "query", query)
    if query.dim() != 3:
        checks.fail(_OP, "query", list(query.shape), "[T, heads, d]")
    check_heads(_OP, "key", key, query)
    checks.like(_OP, "value", value, query, "query")
    checks.shape(_OP, "value", value, tuple(key.shape), "[T, kv_heads, d] of key")
    caches = (
        ("key_cache", key_cache, "k_scale", k_scale),
        ("value_cache", value_cache, "v_scale", v_scale),
    )
    for name, cache, _, _ in caches:
        _check_cache(name, cache, key, key_cache)
    _check_slots(slot_mapping, query)
    _no_gradient(query=query, key=key, value=value, q_norm=q_norm, k_norm=k_norm)
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None:
            checks.like(_OP, name, weight, query, "query")
            checks.shape(_OP, name, weight, (query.shape[-1],), "[d]")
    if not eps >= 0:
        checks.fail(_OP, "eps", eps, "at least 0")
    scales = [_scale(name, scale, of, cache) for of, cache, name, scale in caches]
    inv_freq, axis = check_table(_OP, query, inv_freq, axis, pairing)
    position_ids, axis = positions_of(_OP, position_ids, axis, query)
    try:
        turned: tuple[torch.Tensor, torch.Tensor] = FORWARD(
            query, key, value, key_cache, value_cache, slot_mapping, position_ids, inv_freq, axis,
            pairing, float(attention_scaling), q_norm, k_norm, float(eps), *scales,
        )  # fmt: skip
    except RuntimeError as error:
        raise checks.as_value_error(_OP, error) from None
    return turned


def _check_cache(
    name: str, cache: torch.Tensor, key: torch.Tensor, key_cache: torch.Tensor
) -> None:
    heads, d = key.shape[1:]
    if cache.dim() != 4 or cache.shape[2:] != (heads, d) or cache.shape[1] == 0:
        expected = f"[pages, page_size, {heads}, {d}] with page_size > 0"
        checks.fail(_OP, name, list(cache.shape), expected)
    if cache.dtype != key_cache.dtype:
        checks.fail(_OP, name, cache.dtype, f"of the dtype of key_cache, {key_cache.dtype}")
    if cache.shape != key_cache.shape:
        checks.fail(
            _OP, name, list(cache.shape), f"of the shape of key_cache, {list(key_cache.shape)}"
        )
    if cache.device != key.device:
        checks.fail(_OP, name, cache.device, f"on the device of key, {key.device}")
    if cache.dtype not in checks.FLOATS and cache.dtype not in SCALED:
        raise TypeError(
            f"{_OP}: {name} must be a float, int8 or float8_e4m3fn tensor, got {cache.dtype}"
        )
    if d > 1 and cache.stride(3) != 1:
        strides = f"strides {list(cache.stride())}"
        checks.fail(_OP, name, strides, "with its last dimension contiguous")
    if 0 in cache.stride() and any(
        n > 1 for n, s in zip(cache.shape, cache.stride(), strict=True) if s == 0
    ):
        checks.fail(_OP, name, f"strides {list(cache.stride())}", "without overlap")


def _check_slots(slot_mapping: torch.Tensor, query: torch.Tensor) -> None:
    if slot_mapping.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{_OP}: slot_mapping must be int64 or int32, got {slot_mapping.dtype}")
    checks.shape(_OP, "slot_mapping", slot_mapping, (query.shape[0],), "[T]")
    if slot_mapping.device != query.device:
        checks.fail(
            _OP, "slot_mapping", slot_mapping.device, f"on the device of query, {query.device}"
        )


def _scale(
    name: str, scale: torch.Tensor | None, of: str, cache: torch.Tensor
) -> torch.Tensor | None:
    """``[kv_heads]``."""
    if (scale is not None) != (cache.dtype in SCALED):
        expected = "a scale" if scale is None else "None"
        checks.fail(
            _OP,
            name,
            "None" if scale is None else "a scale",
            f"{expected} with {of} in {cache.dtype}",
        )
    if scale is None:
        return None
    heads = cache.shape[2]
    if scale.dtype != torch.float32 or scale.device != cache.device:
        checks.fail(_OP, name, f"{scale.dtype} on {scale.device}", f"float32 on {cache.device}")
    if scale.numel() != 1 and tuple(scale.shape) != (heads,):
        checks.fail(_OP, name, list(scale.shape), f"one element or [kv_heads] = [{heads}]")
    return scale.reshape(-1).expand(heads)


def _no_gradient(**tensors: torch.Tensor | None) -> None:
    transforms.refuse_tangents(_OP, **tensors)
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            expected = "without a gradient (train with mrope; generate under torch.no_grad())"
            checks.fail(_OP, name, "requires_grad", expected)
