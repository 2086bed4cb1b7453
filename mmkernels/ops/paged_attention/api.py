# SPDX-License-Identifier: Apache-2.0
"""The public ``paged_attention``: what it computes, and its checks."""

import torch

from mmkernels import checks, transforms
from mmkernels.ops.paged_attention.op import FORWARD
from mmkernels.ops.paged_attention.reference import OP

Prefix = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    k_scale: torch.Tensor | float | None = None,
    v_scale: torch.Tensor | float | None = None,
    shared_prefix: Prefix | None = None,
) -> torch.Tensor:
    """Attention of new tokens to the keys and values a sequence has in its pages.

    ``out = softmax(scale · q·Kᵀ) · V``; key j of sequence b lies in slot ``j % page_size`` of page
    ``block_table[b, j // page_size]``.

    Args:
        query: ``[B, Hq, d]``, one token a sequence, or packed ``[T, Hq, d]`` with ``cu_seqlens_q``. Hq is a multiple of
            H; query head h reads key head h // (Hq/H).
        key_cache, value_cache: ``[pages, page_size, H, d]`` in the query's dtype, or int8 with scales. What lies past a
            sequence's length and in pages of nobody is never read.
        block_table: ``[B, P]`` int32 or int64, pages of each sequence in order; past its length anything.
        seq_lens: ``[B]`` int32 or int64, keys of each sequence, those of this call's tokens included.
        cu_seqlens_q: ``[B + 1]`` int32 or int64, where each sequence's queries begin; they are its last tokens.
        causal: Query i of m of a sequence of n keys sees keys up to n − m + i.
        scale: Default 1/√d.
        k_scale, v_scale: A number or ``[H]``: an int8 key is ``k_scale[h] · byte``.
        shared_prefix: ``(group_of_seq [B], pages [G, P'], lens [G])``: keys before a sequence's own, visible to all of
            its queries and read once for all sequences of a group; −1 is no group. ``block_table`` and ``seq_lens``
            then hold only what comes after.

    Returns:
        As query. A query without keys gives 0. Under autocast the query takes the caches' dtype.

    Gradients: none; inference only. A call that would have to record one raises.

    Raises:
        ValueError, TypeError: Names argument, got, expected. On CPU lengths, pages and groups are checked before
            anything is computed; on CUDA they are not read, and a page that does not exist is no key.

    Numerics: softmax and sums in fp32 (fp64), one rounding; in 16 bits the probabilities may round before they meet
        the values (CUDA; prefills in bf16 on CPUs that multiply it), and are summed rounded. Without a shared prefix a
        sequence has the same bits alone and in any batch.

    Source: ``paged_attention`` of vLLM, cascade attention of FlashInfer.
    """
    _check_caches(key_cache, value_cache)
    if torch.is_autocast_enabled(query.device.type) and key_cache.is_floating_point():
        query = query.to(key_cache.dtype)
    _check_query(query, key_cache, value_cache)
    B = query.shape[0]
    if cu_seqlens_q is not None:
        _check_index("cu_seqlens_q", cu_seqlens_q, (None,), "[B + 1]", query)
        B = cu_seqlens_q.shape[0] - 1
        if B < 0:
            checks.fail(OP, "cu_seqlens_q", "[0]", "[B + 1]")
    _check_index("block_table", block_table, (B, None), "[B, P]", query)
    _check_index("seq_lens", seq_lens, (B,), "[B]", query)
    group_of_seq, pages, lens = shared_prefix or (None, None, None)
    if group_of_seq is not None and pages is not None and lens is not None:
        _check_index("shared_prefix group_of_seq", group_of_seq, (B,), "[B]", query)
        _check_index("shared_prefix pages", pages, (None, None), "[G, P]", query)
        _check_index("shared_prefix lens", lens, (pages.shape[0],), "[G]", query)
    scales = [_scale(n, s, key_cache) for n, s in (("k_scale", k_scale), ("v_scale", v_scale))]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    try:
        out: torch.Tensor = FORWARD(
            query, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q, *scales, group_of_seq, pages, lens,
            causal, scale,
        )  # fmt: skip
    except RuntimeError as error:
        raise checks.as_value_error(OP, error) from None
    return out


def _check_caches(key_cache: torch.Tensor, value_cache: torch.Tensor) -> None:
    if key_cache.dim() != 4 or min(key_cache.shape[1:]) < 1:
        checks.fail(OP, "key_cache", list(key_cache.shape), "[pages, page_size, H, d]")
    if key_cache.dtype != torch.int8:
        checks.floating(OP, "key_cache", key_cache)
    checks.shape(OP, "value_cache", value_cache, tuple(key_cache.shape), "as key_cache")
    for what in ("dtype", "device"):
        got, expected = getattr(value_cache, what), getattr(key_cache, what)
        if got != expected:
            checks.fail(OP, "value_cache", got, f"of the {what} of key_cache, {expected}")


def _check_query(query: torch.Tensor, *caches: torch.Tensor) -> None:
    _, _, H, d = caches[0].shape
    checks.floating(OP, "query", query)
    if query.dim() != 3 or query.shape[2] != d or query.shape[1] % H or query.shape[1] == 0:
        expected = f"[B, Hq, {d}], or [T, Hq, {d}] with cu_seqlens_q, Hq a multiple of {H}"
        checks.fail(OP, "query", list(query.shape), expected)
    if caches[0].dtype != torch.int8 and caches[0].dtype != query.dtype:
        checks.fail(OP, "query", query.dtype, f"of the dtype of the caches, {caches[0].dtype}")
    if query.device != caches[0].device:
        checks.fail(OP, "query", query.device, f"on the device of the caches, {caches[0].device}")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, *caches)):
        checks.fail(OP, "query", "requires_grad", "called under torch.no_grad(): inference only")
    transforms.refuse_tangents(OP, query=query, key_cache=caches[0], value_cache=caches[1])


def _check_index(
    name: str,
    index: torch.Tensor,
    shape: tuple[int | None, ...],
    letters: str,
    query: torch.Tensor,
) -> None:
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{OP}: {name} must be int32 or int64, got {index.dtype}")
    fits = index.dim() == len(shape) and all(
        want is None or have == want for have, want in zip(index.shape, shape, strict=True)
    )
    if not fits:
        names = letters.strip("[]").split(", ")
        sizes = [n if size is None else str(size) for n, size in zip(names, shape, strict=True)]
        wanted = f"[{', '.join(sizes)}]"
        expected = letters if wanted == letters else f"{letters} = {wanted}"
        checks.fail(OP, name, list(index.shape), expected)
    if index.device != query.device:
        checks.fail(OP, name, index.device, f"on the device of query, {query.device}")


def _scale(
    name: str, scale: torch.Tensor | float | None, cache: torch.Tensor
) -> torch.Tensor | None:
    """``[H]`` fp32 beside an int8 cache, None beside a float one."""
    if (scale is None) != (cache.dtype != torch.int8):
        expected = "given with an int8 cache, None with a float one"
        checks.fail(OP, name, "None" if scale is None else "a scale", expected)
    if scale is None:
        return None
    scale = torch.as_tensor(scale, dtype=torch.float32, device=cache.device)
    H = cache.shape[2]
    if scale.dim() > 1 or scale.numel() not in (1, H):
        checks.fail(OP, name, list(scale.shape), f"one number or [H] = [{H}]")
    return scale.expand(H).contiguous()
