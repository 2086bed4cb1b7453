# SPDX-License-Identifier: Apache-2.0
"""The public ``compact_kv``: what it does, and its checks."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from mmkernels import checks, transforms
from mmkernels.ops.compact_kv.op import FORWARD
from mmkernels.ops.compact_kv.reference import OP

Caches = torch.Tensor | Sequence[torch.Tensor]


class CompactedKV(NamedTuple):
    """Keys each sequence has left, the position of its next token, and its pages (−1 past its length)."""

    seq_lens: torch.Tensor
    next_positions: torch.Tensor
    block_table: torch.Tensor


def compact_kv(
    key_cache: Caches,
    value_cache: Caches,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    keep: torch.Tensor,
    *,
    next_positions: torch.Tensor | None = None,
    target_table: torch.Tensor | None = None,
) -> CompactedKV:
    """Drops tokens from the pages of every layer, in place; the others move up, in order.

    The i-th token of sequence b that ``keep`` names goes to slot ``i % page_size`` of page ``target_table[b,
    i // page_size]``. Keys keep the rotation of the position they were written at, so the next token's position is
    ``next_positions``, not the new length.

    Args:
        key_cache, value_cache: ``[layers, pages, page_size, H, d]``, any dtype; or a list of ``[pages, page_size, H,
            d]``, one a layer. Written in place.
        block_table: ``[B, P]`` int32 or int64, pages of each sequence.
        seq_lens: ``[B]`` int32 or int64, tokens of each.
        keep: ``[B, L]`` bool; what lies past a length counts for nothing.
        next_positions: ``[B]``, positions the next tokens would have; default ``seq_lens``, right unless tokens were
            dropped before.
        target_table: ``[B, P']``, where the kept tokens go; default ``block_table``. A page that is written must be in
            use nowhere else, so a shared page is replaced here by a new one. Who owns what only a pool knows:
            ``PagedKVCache.compact`` makes this table, and raises ``OutOfPages`` before anything changes.

    Returns:
        ``CompactedKV(seq_lens, next_positions, block_table)``, int64.

    Raises:
        ValueError, TypeError: Names argument, got, expected. On CPU lengths, pages and owners are checked before
            anything is written; on CUDA they are not read.

    Numerics: bytes are moved.

    Source: FastV and VisionZip drop visual tokens so, by gathering every layer's cache.
    """
    keys, values = _layers("key_cache", key_cache), _layers("value_cache", value_cache)
    target = block_table if target_table is None else target_table
    _check_caches(keys, values)
    B, device = seq_lens.shape[0] if seq_lens.dim() else 0, keys[0].device
    for name, index, dims in (
        ("seq_lens", seq_lens, 1), ("block_table", block_table, 2), ("target_table", target, 2), ("keep", keep, 2),
    ):  # fmt: skip
        _check_index(name, index, dims, B, device)
    if next_positions is not None:
        _check_index("next_positions", next_positions, 1, B, device)
    try:
        for key, value in zip(keys, values, strict=True):
            lens: torch.Tensor = FORWARD(key, value, block_table, target, seq_lens, keep)
    except RuntimeError as error:
        # The stable ABI can only throw RuntimeError; a wrong value is a ValueError, as elsewhere.
        if str(error).startswith(OP):
            raise ValueError(str(error).splitlines()[0]) from None
        raise
    page_size = keys[0].shape[2]
    first = torch.arange(target.shape[1], device=device) * page_size
    table = torch.where(first < lens.unsqueeze(1), target.long(), -1)
    positions = seq_lens if next_positions is None else next_positions
    return CompactedKV(lens, positions.long().clone(), table)


def _layers(name: str, cache: Caches) -> list[torch.Tensor]:
    if isinstance(cache, torch.Tensor):
        if cache.dim() != 5:
            checks.fail(OP, name, list(cache.shape), "[layers, pages, page_size, H, d], or a list")
        return [cache]
    if not cache or any(layer.dim() != 4 for layer in cache):
        expected = "a list of [pages, page_size, H, d], one a layer, or one 5-D tensor"
        checks.fail(OP, name, [list(layer.shape) for layer in cache], expected)
    return [layer[None] for layer in cache]


def _check_caches(keys: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    if len(values) != len(keys):
        checks.fail(OP, "value_cache", f"{len(values)} layers", f"the {len(keys)} of key_cache")
    for name, caches in (("key_cache", keys), ("value_cache", values)):
        for cache in caches:
            if cache.shape[1:] != keys[0].shape[1:] or len(cache) != len(keys[0]):
                expected = f"of one shape in K and V, {list(keys[0].shape)}"
                checks.fail(OP, name, list(cache.shape), expected)
            if cache.dtype != keys[0].dtype or cache.device != keys[0].device:
                got = f"{cache.dtype} on {cache.device}"
                expected = f"of one dtype and device, {keys[0].dtype} on {keys[0].device}"
                checks.fail(OP, name, got, expected)
            if torch.is_grad_enabled() and cache.requires_grad:
                expected = "without gradient: it is written in place"
                checks.fail(OP, name, "requires_grad", expected)
            transforms.refuse_tangents(OP, **{name: cache})
    if min(keys[0].shape[2:]) < 1:
        checks.fail(OP, "key_cache", list(keys[0].shape), "pages of at least one slot")


def _check_index(name: str, index: torch.Tensor, dims: int, B: int, device: torch.device) -> None:
    if name == "keep" and index.dtype != torch.bool:
        raise TypeError(f"{OP}: keep must be bool, got {index.dtype}")
    if name != "keep" and index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{OP}: {name} must be int32 or int64, got {index.dtype}")
    if index.dim() != dims or index.shape[0] != B:
        letters = "[B]" if dims == 1 else "[B, L]" if name == "keep" else "[B, P]"
        checks.fail(OP, name, list(index.shape), f"{letters} with B = {B}, as seq_lens")
    if index.device != device:
        checks.fail(OP, name, index.device, f"on the device of the caches, {device}")
