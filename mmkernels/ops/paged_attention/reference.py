# SPDX-License-Identifier: Apache-2.0
"""Attention over pages in plain PyTorch: the definition of correct.

Dimensions: B sequences, T queries (row b of a decode, ``cu_seqlens_q[b] … cu_seqlens_q[b+1]`` of a packed call), Hq
query heads of which G share one of H key heads, d head width, n keys of a sequence.

A sequence's keys are those of its group's prefix, then its own; key j of either lies in slot ``j % page_size`` of page
``table[j // page_size]``. Query i of m sees the whole prefix and, ``causal``, own keys up to n − m + i. What rounds
where: everything in at least fp32, one rounding at the end; a query without keys gives 0.
"""

import torch

OP = "paged_attention"


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
    """``[T, Hq, d]``; ``k_scale`` and ``v_scale`` are ``[H]``, of int8 caches."""
    lens, starts, groups, prefixes = checked(
        query, key_cache, block_table, seq_lens, cu_seqlens_q, group_of_seq, prefix_pages, prefix_lens
    )  # fmt: skip
    acc = torch.promote_types(query.dtype, torch.float32)
    out = query.new_zeros(query.shape)
    for b, n in enumerate(lens):
        tokens = slice(starts[b], starts[b + 1])
        pages, shared = [(block_table[b], n)], 0
        if groups[b] >= 0 and prefix_pages is not None:
            shared = prefixes[groups[b]]
            pages.insert(0, (prefix_pages[groups[b]], shared))
        key = torch.cat([rows(key_cache, p, length, k_scale, acc) for p, length in pages])
        value = torch.cat([rows(value_cache, p, length, v_scale, acc) for p, length in pages])
        q = query[tokens].to(acc)
        m, G = len(q), q.shape[1] // key.shape[1]
        scores = torch.einsum("mhgd,nhd->hgmn", q.unflatten(1, (-1, G)), key) * scale
        if causal:
            i, j = torch.arange(m, device=q.device), torch.arange(len(key), device=q.device)
            hidden = (j >= shared) & (j - shared > n - m + i[:, None])
            scores = scores.masked_fill(hidden, -torch.inf)
        if len(key):
            nothing = scores.amax(-1, keepdim=True) == -torch.inf
            scores = torch.softmax(scores, -1).masked_fill(nothing, 0.0)
        out[tokens] = torch.einsum("hgmn,nhd->mhgd", scores, value).flatten(1, 2).to(query.dtype)
    return out


def rows(
    cache: torch.Tensor,
    table: torch.Tensor,
    length: int,
    scale: torch.Tensor | None,
    acc: torch.dtype,
) -> torch.Tensor:
    """``[length, H, d]``: keys or values of a table's first ``length`` slots."""
    page_size = cache.shape[1]
    found = cache[table[: -(-length // page_size)].long()].flatten(0, 1)[:length].to(acc)
    return found if scale is None else found * scale.to(acc)[:, None]


def checked(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    group_of_seq: torch.Tensor | None,
    prefix_pages: torch.Tensor | None,
    prefix_lens: torch.Tensor | None,
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Lengths, first queries, groups and prefix lengths as numbers; ValueError where one cannot be."""
    B, pages, page_size = len(seq_lens), key_cache.shape[0], key_cache.shape[1]
    starts = list(range(B + 1)) if cu_seqlens_q is None else cu_seqlens_q.tolist()
    if starts[0] != 0 or starts[-1] != len(query):
        _bad("cu_seqlens_q", f"{starts[0]} … {starts[-1]}", f"0 … {len(query)}, the queries given")
    for b in range(B):
        if starts[b + 1] < starts[b]:
            _bad(f"cu_seqlens_q[{b + 1}]", starts[b + 1], f"at least {starts[b]}, the one before")
    lens = _in_pages("seq_lens", "block_table", seq_lens, block_table, pages, page_size)
    if group_of_seq is None or prefix_pages is None or prefix_lens is None:
        return lens, starts, [-1] * B, []
    groups = group_of_seq.tolist()
    for b, group in enumerate(groups):
        if not -1 <= group < len(prefix_lens):
            _bad(f"shared_prefix group_of_seq[{b}]", group, f"in [-1, {len(prefix_lens)})")
    names = ("shared_prefix lens", "shared_prefix pages")
    return lens, starts, groups, _in_pages(*names, prefix_lens, prefix_pages, pages, page_size)


def _in_pages(
    lens_name: str,
    table_name: str,
    lens: torch.Tensor,
    table: torch.Tensor,
    pages: int,
    page_size: int,
) -> list[int]:
    """Lengths that fit their row of the table, whose pages in use exist."""
    found, capacity = lens.tolist(), table.shape[1] * page_size
    for b, n in enumerate(found):
        if not 0 <= n <= capacity:
            _bad(f"{lens_name}[{b}]", n, f"in [0, {capacity}], what {table_name} can hold")
        for i, page in enumerate(table[b, : -(-n // page_size)].tolist()):
            if not 0 <= page < pages:
                _bad(f"{table_name}[{b}, {i}]", page, f"a page in [0, {pages})")
    return found


def _bad(argument: str, got: object, expected: str) -> None:
    raise ValueError(f"{OP}: {argument} must be {expected}, got {got}")
