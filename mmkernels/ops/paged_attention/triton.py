# SPDX-License-Identifier: Apache-2.0
"""Attention over pages on CUDA: a program takes a tile of one sequence's (or one group's) query rows of one key head
and goes over a span of keys, a block of gathered slots at a time; parts of a row are merged by log-sum-exp in a second
launch.

Dimensions as in ``reference.py``; a row of a tile is token · G + head of the group. What rounds where: scores, softmax
and sums in fp32, fp32 products IEEE; of 16-bit dtypes the probabilities round to the dtype and are summed rounded. A
decode is always cut into spans of the same length, so a sequence has the same bits alone and in a batch. No atomics.
Lengths are clamped to their tables, and a page that does not exist is no key: nothing is read out of range.
"""

from typing import Any

import torch
import triton
import triton.language as tl

_SPAN = 1024  # keys of a part, in a decode and in its prefixes
_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _dot(a, b, acc, DTYPE: tl.constexpr):
    if DTYPE == tl.float32:
        return tl.dot(a, b, acc, input_precision="ieee")
    return tl.dot(a, b, acc)


@triton.jit
def _list_of(tile, starts, count, BLOCK_T: tl.constexpr):
    """Which list tile falls into: list b has the tiles from ``starts[b] // BLOCK_T + b`` on."""
    low, high = 0, count - 1
    while low < high:
        middle = (low + high + 1) // 2
        first = tl.load(starts + middle).to(tl.int64) // BLOCK_T + middle
        if first <= tile:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def _attend_kernel(
    q_THd, key, value, table, lens, starts, order, k_scale, v_scale, out_THd, parts_THPd, stats_THP2,
    lists, width, pages, H, parts, first_part, span, scale,
    k_stride_page, k_stride_slot, k_stride_head, v_stride_page, v_stride_slot, v_stride_head,
    G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, DTYPE: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_STARTS: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_SCALE: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Rows of a list of tokens against one span of the list's keys; ``WHOLE``: the only part, written finished."""
    BLOCK_T: tl.constexpr = BLOCK_R // G
    tile, h, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if HAS_STARTS:
        b = _list_of(tile, starts, lists, BLOCK_T)
        begin, end = tl.load(starts + b).to(tl.int64), tl.load(starts + b + 1).to(tl.int64)
        first = begin + (tile - (begin // BLOCK_T + b)) * BLOCK_T
    else:
        b = tile
        begin, end, first = tile.to(tl.int64), tile.to(tl.int64) + 1, tile.to(tl.int64)
    if (first < begin) | (first >= end):
        return
    b = b.to(tl.int64)
    n = tl.minimum(tl.load(lens + b).to(tl.int64), width * PAGE)
    row, c = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    place = first + row // G
    inside = (row < BLOCK_T * G) & (place < end)
    token = place
    if HAS_ORDER:
        token = tl.load(order + place, mask=inside, other=0)
    head = h * G + row % G
    row_at = (token * (H * G) + head) * D
    at = row_at[:, None] + c[None, :]
    q = tl.load(q_THd + at, mask=inside[:, None] & (c < D)[None, :], other=0)
    limit = n + row * 0
    if CAUSAL:
        limit = n - (end - begin) + (place - begin) + 1
    if HAS_SCALE:
        scale *= tl.load(k_scale + h)
    last = tl.minimum(n, (split + 1).to(tl.int64) * span)
    last = tl.minimum(last, tl.max(tl.where(inside, limit, 0), 0))
    top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for j0 in range(split.to(tl.int64) * span, last, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        page = tl.load(table + b * width + j // PAGE, mask=j < last, other=-1).to(tl.int64)
        found = (page >= 0) & (page < pages)
        slot = j % PAGE
        of_key = page * k_stride_page + slot * k_stride_slot + h * k_stride_head
        s = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        for c0 in range(0, BLOCK_D, BLOCK_C):
            k = c0 + tl.arange(0, BLOCK_C)
            keys = tl.load(
                key + of_key[None, :] + k[:, None], mask=found[None, :] & (k < D)[:, None], other=0
            )
            if HAS_SCALE:  # by way of fp32: the interpreter takes a byte for the bits of a bf16
                keys = keys.to(tl.float32).to(DTYPE)
            if BLOCK_C < BLOCK_D:
                part = tl.load(
                    q_THd + row_at[:, None] + k[None, :],
                    mask=inside[:, None] & (k < D)[None, :],
                    other=0,
                )
                s = _dot(part, keys, s, DTYPE)
            else:
                s = _dot(q, keys, s, DTYPE)
        s *= scale
        s = tl.where(found[None, :] & (j[None, :] < limit[:, None]), s, float("-inf"))
        high = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(high == float("-inf"), 0.0, high)
        p = tl.exp(s - shift[:, None]).to(DTYPE)
        before = tl.exp(top - shift)
        total = total * before + tl.sum(p.to(tl.float32), 1)
        of_value = page * v_stride_page + slot * v_stride_slot + h * v_stride_head
        values = tl.load(
            value + of_value[:, None] + c[None, :], mask=found[:, None] & (c < D)[None, :], other=0
        )
        if HAS_SCALE:
            values = values.to(tl.float32).to(DTYPE)
        acc = _dot(p, values, acc * before[:, None], DTYPE)
        top = high
    stored = inside[:, None] & (c < D)[None, :]
    if WHOLE:
        acc = acc / tl.where(total == 0, 1.0, total)[:, None]
        if HAS_SCALE:
            acc *= tl.load(v_scale + h)
        tl.store(out_THd + at, acc.to(out_THd.dtype.element_ty), mask=stored)
    else:
        of_part = (token * (H * G) + head) * parts + first_part + split
        tl.store(parts_THPd + of_part[:, None] * D + c[None, :], acc, mask=stored)
        tl.store(stats_THP2 + 2 * of_part, top, mask=inside)
        tl.store(stats_THP2 + 2 * of_part + 1, total, mask=inside)


@triton.jit
def _merge_kernel(
    parts_THPd, stats_THP2, v_scale, out_THd, H, parts,
    G: tl.constexpr, D: tl.constexpr, HAS_SCALE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A row from its parts, in order; a part whose sum is 0 has no key, or was never there."""
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    top = float("-inf")
    for i in range(0, parts):
        here = tl.load(stats_THP2 + 2 * (row * parts + i))
        total = tl.load(stats_THP2 + 2 * (row * parts + i) + 1)
        top = tl.maximum(top, tl.where(total == 0, float("-inf"), here))
    shift = tl.where(top == float("-inf"), 0.0, top)
    acc, sums = tl.zeros((BLOCK_D,), tl.float32), 0.0
    for i in range(0, parts):
        here = tl.load(stats_THP2 + 2 * (row * parts + i))
        total = tl.load(stats_THP2 + 2 * (row * parts + i) + 1)
        some = total != 0
        weight = tl.where(some, tl.exp(tl.where(some, here, shift) - shift), 0.0)
        part = tl.load(parts_THPd + (row * parts + i) * D + c, mask=c < D, other=0)
        acc += tl.where(some, weight * part, 0.0)  # one that was never there may hold NaN
        sums += weight * total
    acc = acc / tl.where(sums == 0, 1.0, sums)
    if HAS_SCALE:
        acc *= tl.load(v_scale + row % (H * G) // G)
    tl.store(out_THd + row * D + c, acc.to(out_THd.dtype.element_ty), mask=c < D)


def config(G: int, d: int, dtype: torch.dtype, decode: bool) -> dict[str, int]:
    """Rows: one token's heads in a decode, else as many as keep the accumulator in registers."""
    block_d = max(16, triton.next_power_of_2(d))
    fp32, large = dtype == torch.float32, block_d > 128
    rows = max(16 if decode or fp32 else 32 if large else 64, triton.next_power_of_2(G))
    return {
        "BLOCK_R": rows, "BLOCK_N": 16 if fp32 else 32 if large else 64, "BLOCK_D": block_d,
        "BLOCK_C": min(block_d, 32) if fp32 else block_d,  # IEEE products are unrolled over it
        "num_warps": 4 if decode or fp32 else 8, "num_stages": 2,  # pointers to slots fill registers
    }  # fmt: skip


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    group_of_seq: torch.Tensor | None,
    prefix_pages: torch.Tensor | None,
    prefix_lens: torch.Tensor | None,
    causal: bool,
    scale: float,
) -> torch.Tensor:
    """As ``reference.paged_attention``: a launch for own keys, one for prefixes, one to merge where there are parts."""
    query = query.contiguous()
    key_cache, value_cache = (_with_rows(t) for t in (key_cache, value_cache))
    (T, Hq, d), (pages, page_size, H, _) = query.shape, key_cache.shape
    out, decode = torch.empty_like(query), cu_seqlens_q is None
    if out.numel() == 0:
        return out
    own = _parts(block_table, page_size, decode)
    shared = 0 if prefix_pages is None else _parts(prefix_pages, page_size, decode)
    parts, whole = own + shared, own + shared == 1
    wide = {"dtype": torch.float32, "device": query.device}
    sums = torch.empty((0 if whole else T * Hq * parts, d), **wide)
    stats = torch.zeros((0 if whole else T * Hq * parts, 2), **wide)
    strides = (*key_cache.stride()[:3], *value_cache.stride()[:3])
    meta: dict[str, Any] = {
        "G": Hq // H, "D": d, "PAGE": page_size, "DTYPE": _DTYPES[query.dtype], "HAS_SCALE": k_scale is not None,
        "WHOLE": whole,
    }  # fmt: skip

    def attend(
        table: torch.Tensor, lens: torch.Tensor, starts: torch.Tensor | None, order: torch.Tensor | None,
        first: int, count: int,
    ) -> None:  # fmt: skip
        table, lists = table.contiguous(), len(lens)
        chosen = config(Hq // H, d, query.dtype, decode and order is None)
        tiles = T if starts is None else T // (chosen["BLOCK_R"] // (Hq // H)) + lists
        span = _SPAN if decode else max(1, table.shape[1] * page_size)
        _attend_kernel[(tiles, H, count)](
            query, key_cache, value_cache, table, lens.contiguous(), starts, order, k_scale, v_scale, out, sums, stats,
            lists, table.shape[1], pages, H, parts, first, span, scale, *strides,
            CAUSAL=causal and order is None, HAS_STARTS=starts is not None, HAS_ORDER=order is not None,
            **meta, **chosen,
        )  # fmt: skip

    if prefix_pages is not None and prefix_lens is not None and group_of_seq is not None:
        if len(prefix_lens):
            starts, order = _by_group(group_of_seq, cu_seqlens_q, T, len(prefix_lens))
            attend(prefix_pages, prefix_lens, starts, order, 0, shared)
    starts = None if cu_seqlens_q is None else cu_seqlens_q.contiguous()
    attend(block_table, seq_lens, starts, None, shared, own)
    if not whole:
        block = config(Hq // H, d, query.dtype, True)["BLOCK_D"]
        _merge_kernel[(T * Hq,)](
            sums, stats, v_scale, out, H, parts, G=Hq // H, D=d, HAS_SCALE=k_scale is not None,
            BLOCK_D=block, num_warps=1,
        )  # fmt: skip
    return out


def _with_rows(cache: torch.Tensor) -> torch.Tensor:
    return cache if cache.stride(3) == 1 else cache.contiguous()


def _parts(table: torch.Tensor, page_size: int, decode: bool) -> int:
    return max(1, triton.cdiv(table.shape[1] * page_size, _SPAN)) if decode else 1


def _by_group(
    group_of_seq: torch.Tensor, cu_seqlens_q: torch.Tensor | None, T: int, groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens in the order of their groups, and where each group begins; no sync."""
    of_token = group_of_seq
    if cu_seqlens_q is not None:
        at = torch.arange(T, dtype=cu_seqlens_q.dtype, device=group_of_seq.device)
        sequence = torch.searchsorted(cu_seqlens_q, at, right=True) - 1
        of_token = group_of_seq[sequence.clamp(0, max(len(group_of_seq) - 1, 0))]
    of_token, order = of_token.sort(stable=True)
    numbers = torch.arange(groups + 1, dtype=of_token.dtype, device=of_token.device)
    return torch.searchsorted(of_token.contiguous(), numbers), order
