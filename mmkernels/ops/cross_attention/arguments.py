# SPDX-License-Identifier: Apache-2.0
"""Arguments of ``cross_attention``, checked and in one form: groups of query heads as more queries, masks expanded.

Letters: B batch, Q queries, n context tokens, L latents, X context width, A heads (A_kv of keys), d head width.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from mmkernels import checks

OP = "cross_attention"
Position = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def check(
    query: torch.Tensor,
    context: torch.Tensor,
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
    num_heads: int,
    kv_heads: int,
    packed: bool,
) -> None:
    """Shapes and dtypes of the tensors every call has."""
    checks.floating(OP, "query", query)
    named = {"context": context, "key_weight": key_weight, "value_weight": value_weight}
    for name, tensor in named.items():
        checks.like(OP, name, tensor, query, "query")
    if context.dim() != (2 if packed else 3):
        expected = "[tokens, X] with cu_seqlens" if packed else "[B, n, X]"
        checks.fail(OP, "context", list(context.shape), expected)
    if query.dim() not in (2, 3):
        checks.fail(OP, "query", list(query.shape), "[B, Q, A·d] or [Q, A·d]")
    if query.dim() == 3 and not packed and query.shape[0] != context.shape[0]:
        expected = f"[{context.shape[0]}, Q, A·d] for this context"
        checks.fail(OP, "query", list(query.shape), expected)
    width, X = query.shape[-1], context.shape[-1]
    if num_heads <= 0 or width % num_heads or width == 0:
        checks.fail(OP, "num_heads", num_heads, f"a divisor of the query width {width}")
    if kv_heads <= 0 or num_heads % kv_heads:
        checks.fail(OP, "num_key_value_heads", kv_heads, f"a divisor of num_heads {num_heads}")
    kv_width = width // num_heads * kv_heads
    checks.shape(OP, "key_weight", key_weight, (kv_width, X), "[A·d, X]")
    checks.shape(OP, "value_weight", value_weight, (kv_width, X), "[A·d, X]")


def check_biases(
    key_bias: torch.Tensor | None, value_bias: torch.Tensor | None, key_weight: torch.Tensor
) -> None:
    """``[A·d]`` each."""
    for name, bias in (("key_bias", key_bias), ("value_bias", value_bias)):
        if bias is not None:
            checks.like(OP, name, bias, key_weight, "key_weight")
            checks.shape(OP, name, bias, (key_weight.shape[0],), "[A·d]")


def expanded_mask(
    attention_mask: torch.Tensor | None, B: int, A: int, Q: int, n: int, device: torch.device
) -> torch.Tensor | None:
    """``[B, A, Q, n]``, broadcast."""
    if attention_mask is None:
        return None
    if attention_mask.dtype != torch.bool:
        checks.floating(OP, "attention_mask (unless bool)", attention_mask)
    if attention_mask.device != device:
        checks.fail(OP, "attention_mask", attention_mask.device, f"on {device}")
    full, shape = (B, A, Q, n), attention_mask.shape
    padded = (1,) * (4 - len(shape)) + tuple(shape)
    if len(shape) > 4 or any(s not in (1, f) for s, f in zip(padded, full, strict=True)):
        expected = f"broadcastable to [B, A, Q, n] = {list(full)}"
        checks.fail(OP, "attention_mask", list(shape), expected)
    return attention_mask.expand(full)


def seen_keys(attention_mask: torch.Tensor) -> torch.Tensor:
    """``[B or 1, n or 1]``, bool: the keys that some query may attend to."""
    mask = attention_mask.detach()
    allowed = mask if mask.dtype == torch.bool else mask != -torch.inf
    return allowed.view((1,) * (4 - mask.dim()) + tuple(mask.shape)).any((1, 2))


def seen_rows(rows: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
    """``rows`` [..., n, X] with 0 in each that ``seen`` [..., n] is False for: P = 0 times NaN would be NaN."""
    if seen is None or _harmless(rows, seen):
        return rows
    return torch.where(seen[..., None], rows, 0)


def _harmless(rows: torch.Tensor, seen: torch.Tensor) -> bool:
    """Whether no hidden row could spoil a product, not by overflow either: then nothing need be copied.

    Looked up where that is cheap: in plain tensors on CPU, and not in a graph.
    """
    plain = type(rows) in (torch.Tensor, torch.nn.Parameter) and rows.device.type == "cpu"
    if not plain or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    hidden = rows.detach()[~seen.expand(rows.shape[:-1])]
    return bool((hidden.abs() <= 1e15).all())


def seen_positions(
    tables: tuple[torch.Tensor, ...], seen: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """The same of positions: a row is seen if one of its keys is, in any sample."""
    if seen is None or not tables:
        return tables
    counts = [len(t) for t in tables]
    of_keys = seen.any(0).expand(math.prod(counts)).view(counts)
    sides = [of_keys] if len(tables) == 1 else [of_keys.any(1), of_keys.any(0)]
    return tuple(seen_rows(t, side) for t, side in zip(tables, sides, strict=True))


def check_latents(latents: torch.Tensor | None, B: int, context: torch.Tensor) -> None:
    """``[B, L, X]``."""
    if latents is None:
        return
    checks.like(OP, "latents", latents, context, "context")
    if latents.dim() != 3 or latents.shape[0] != B or latents.shape[2] != context.shape[-1]:
        expected = f"[B, L, X] = [{B}, L, {context.shape[-1]}]"
        checks.fail(OP, "latents", list(latents.shape), expected)


def position_of(
    position: Position | None, n: int, context: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The tables: one ``[n, X]``, or rows and columns of a grid of n tokens; none."""
    if position is None:
        return ()
    tables = tuple(position) if isinstance(position, Sequence) else (position,)
    for table in tables:
        checks.like(OP, "key_position", table, context, "context")
    shapes = [list(t.shape) for t in tables]
    X = context.shape[-1]
    counts = [t.shape[0] for t in tables]
    fits = all(t.dim() == 2 and t.shape[1] == X for t in tables) and len(tables) in (1, 2)
    if not fits or (counts[0] if len(counts) == 1 else counts[0] * counts[1]) != n:
        expected = f"[n, X] = [{n}, {X}], or two of [rows, X], [columns, X] with rows·columns = {n}"
        checks.fail(OP, "key_position", shapes, expected)
    return tables


def over_latents(mask: torch.Tensor | None, latents: torch.Tensor | None) -> torch.Tensor | None:
    """``[…, n]`` → ``[…, n + L]``: every query sees all latents."""
    if mask is None or latents is None:
        return mask
    return F.pad(mask, (0, latents.shape[1]), value=True if mask.dtype == torch.bool else 0.0)


def grouped(query: torch.Tensor, num_heads: int, kv_heads: int) -> torch.Tensor:
    """Query heads that share a key head become queries of it: ``[..., Q, A·d]`` → ``[..., G·Q, A_kv·d]``."""
    if num_heads == kv_heads:
        return query
    heads = query.unflatten(-1, (kv_heads, num_heads // kv_heads, -1))  # [..., Q, A_kv, G, d]
    return heads.movedim(-2, -4).flatten(-2).flatten(-3, -2)


def ungrouped(out: torch.Tensor, num_heads: int, kv_heads: int) -> torch.Tensor:
    """The inverse of ``grouped``, ``[B, G·Q, A_kv·d]`` → ``[B, Q, A·d]``."""
    if num_heads == kv_heads:
        return out
    G = num_heads // kv_heads
    heads = out.unflatten(1, (G, -1)).unflatten(-1, (kv_heads, -1))  # [B, G, Q, A_kv, d]
    return heads.movedim(1, 3).flatten(2)


def grouped_mask(mask: torch.Tensor | None, kv_heads: int) -> torch.Tensor | None:
    """``[B, A, Q, n]`` → ``[B, A_kv, G·Q, n]``."""
    if mask is None or mask.shape[1] == kv_heads:
        return mask
    return mask.unflatten(1, (kv_heads, -1)).flatten(2, 3)


def longest_of(cu_seqlens: torch.Tensor, max_seqlen: int | None, total: int) -> int:
    """Checks the offsets of a packed context; max_seqlen, read from them on CPU."""
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1 or cu_seqlens.dtype not in _OFFSETS:
        got = f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        checks.fail(OP, "cu_seqlens", got, "int32 or int64 [B + 1]")
    if cu_seqlens.device.type == "cpu":
        lengths = cu_seqlens.diff()
        _check_offsets(cu_seqlens, lengths, max_seqlen, total)
        if max_seqlen is None:
            return int(lengths.max()) if len(lengths) else 0
    if max_seqlen is None:
        checks.fail(OP, "max_seqlen", None, "given with cu_seqlens on a GPU: reading it would wait")
    return max_seqlen


_OFFSETS = (torch.int32, torch.int64)


def _check_offsets(
    cu_seqlens: torch.Tensor, lengths: torch.Tensor, max_seqlen: int | None, total: int
) -> None:
    bad = (lengths < 0).nonzero()
    if cu_seqlens[0] != 0 or len(bad):
        where = int(bad[0]) + 1 if len(bad) else 0
        got = f"{int(cu_seqlens[where])} at {where}"
        checks.fail(OP, "cu_seqlens", got, "from 0 on and never falling")
    if cu_seqlens[-1] != total:
        checks.fail(OP, "cu_seqlens", f"{int(cu_seqlens[-1])} last", f"of {total} context tokens")
    if max_seqlen is not None and len(lengths) and int(lengths.max()) > max_seqlen:
        longest = f"at least {int(lengths.max())}, the longest sequence"
        checks.fail(OP, "max_seqlen", max_seqlen, longest)
