# SPDX-License-Identifier: Apache-2.0
"""Compaction of pages in plain PyTorch: the definition of correct.

Token j of sequence b lies in slot ``j % page_size`` of page ``block_table[b, j // page_size]`` of every layer. The i-th
token to keep goes to slot i of ``target_table``, bit by bit; every other slot stays as it is.
"""

import torch

OP = "compact_kv"


def compact_kv(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    target_table: torch.Tensor,
    seq_lens: torch.Tensor,
    keep: torch.Tensor,
) -> torch.Tensor:
    """Moves in place; returns the new lengths, ``[B]`` int64."""
    pages, page_size = key_cache.shape[1:3]
    kept = keep & (torch.arange(keep.shape[1], device=keep.device) < seq_lens[:, None])
    new_lens = kept.sum(1)
    check_rooms(page_size, block_table, target_table, seq_lens, new_lens, keep)
    check_pages(pages, page_size, "block_table", block_table, seq_lens)
    check_pages(pages, page_size, "target_table", target_table, new_lens)
    b, source = kept.nonzero().unbind(1)
    target = (kept.cumsum(1) - 1)[b, source]
    place = lambda table, j: (table[b, j // page_size].long(), j % page_size)
    (page, slot), (new_page, new_slot) = place(block_table, source), place(target_table, target)
    moved = (page != new_page) | (slot != new_slot)
    places = torch.stack([b, target // page_size], 1)[moved].unique(dim=0)
    written = {(int(row), int(i)) for row, i in places.tolist()}
    check_owners(page_size, block_table, target_table, seq_lens, new_lens, written)
    for cache in (key_cache, value_cache):
        cache[:, new_page[moved], new_slot[moved]] = cache[:, page[moved], slot[moved]]
    return new_lens


def check_rooms(
    page_size: int,
    block_table: torch.Tensor,
    target_table: torch.Tensor,
    seq_lens: torch.Tensor,
    new_lens: torch.Tensor,
    keep: torch.Tensor,
) -> None:
    """ValueError for more tokens than a table or ``keep`` can hold."""
    room, target_room = block_table.shape[1] * page_size, target_table.shape[1] * page_size
    for b, (n, new) in enumerate(zip(seq_lens.tolist(), new_lens.tolist(), strict=True)):
        if not 0 <= n <= min(room, keep.shape[1]):
            expected = f"in [0, {min(room, keep.shape[1])}], what block_table and keep can hold"
            _bad(f"seq_lens[{b}]", n, expected)
        if new > target_room:
            _bad(f"target_table[{b}]", f"room for {target_room}", f"room for {new} tokens")


def check_pages(
    pages: int, page_size: int, name: str, table: torch.Tensor, lens: torch.Tensor
) -> None:
    """ValueError for a page in use that does not exist."""
    for b, i, page in _used(page_size, table, lens):
        if not 0 <= page < pages:
            _bad(f"{name}[{b}, {i}]", page, f"a page in [0, {pages})")


def check_owners(
    page_size: int,
    block_table: torch.Tensor,
    target_table: torch.Tensor,
    seq_lens: torch.Tensor,
    new_lens: torch.Tensor,
    written: set[tuple[int, int]],
) -> None:
    """ValueError where a page is written that is also in use elsewhere."""
    uses: dict[int, set[tuple[int, int]]] = {}
    for table, lens in ((block_table, seq_lens), (target_table, new_lens)):
        for b, i, page in _used(page_size, table, lens):
            uses.setdefault(page, set()).add((b, i))
    for b, i in sorted(written):
        page = int(target_table[b, i])
        if uses[page] != {(b, i)}:
            other = min(uses[page] - {(b, i)})
            expected = "a page of its own (copy a shared one first, as PagedKVCache.compact does)"
            _bad(f"target_table[{b}, {i}]", f"{page}, also in row {other[0]}", expected)


def _used(page_size: int, table: torch.Tensor, lens: torch.Tensor) -> list[tuple[int, int, int]]:
    """Row, column and page of what a table's lengths cover."""
    rows = zip(table.tolist(), lens.tolist(), strict=True)
    return [
        (b, i, page) for b, (row, n) in enumerate(rows) for i, page in enumerate(row[: -(-n // page_size)])
    ]  # fmt: skip


def _bad(argument: str, got: object, expected: str) -> None:
    raise ValueError(f"{OP}: {argument} must be {expected}, got {got}")
