# SPDX-License-Identifier: Apache-2.0
"""Sequences over a pool of pages: which pages each has, how far they are filled, which of them several share."""

import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from mmkernels.cache.pool import Pages
from mmkernels.ops.compact_kv import compact_kv


class Appended(NamedTuple):
    """Where new tokens go: ``slot_mapping`` (page · page_size + offset) and positions, ``[T]`` int64, packed."""

    slot_mapping: torch.Tensor
    position_ids: torch.Tensor


class Tables(NamedTuple):
    """What ``paged_attention`` asks for; ``shared_prefix`` is None where no two sequences share enough."""

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    shared_prefix: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None


@dataclass
class _Sequence:
    pages: list[int] = field(default_factory=list)
    length: int = 0
    next_position: int = 0

    def copy(self) -> "_Sequence":
        return _Sequence(list(self.pages), self.length, self.next_position)


class PagedKVCache:
    """Sequences by number, each with its pages of ``pool``. A call that raises has changed nothing.

    A token's position and its slot part ways when tokens are dropped: ``next_position`` goes on where it was. A deep
    copy has forks of all sequences, under the same numbers. When the object goes, its pages are let go of.
    """

    def __init__(self, pool: Pages) -> None:
        self.pool = pool
        self._sequences: dict[int, _Sequence] = {}
        self._next = 0
        weakref.finalize(self, _leave, pool, self._sequences).atexit = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "PagedKVCache":
        copied = PagedKVCache(self.pool)
        copied._next = self._next
        for number, s in self._sequences.items():
            self.pool.share(s.pages)
            copied._sequences[number] = s.copy()
        return copied

    def __len__(self) -> int:
        return len(self._sequences)

    def add(self) -> int:
        """A new, empty sequence."""
        return self._insert(_Sequence())

    def fork(self, sequence: int) -> int:
        """A new sequence with the same tokens, in the same pages: whoever writes to one first gets a copy."""
        old = self._of(sequence)
        self.pool.share(old.pages)
        return self._insert(old.copy())

    def free(self, sequence: int) -> None:
        """Forgets it and lets go of its pages."""
        self.pool.free(self._of(sequence).pages)
        del self._sequences[sequence]

    def truncate(self, sequence: int, length: int) -> None:
        """Drops the tokens from ``length`` on; positions go back as far."""
        s = self._of(sequence)
        if not 0 <= length <= s.length:
            raise ValueError(
                f"PagedKVCache.truncate: length must be in [0, {s.length}], got {length}"
            )
        kept = -(-length // self.pool.page_size)
        self.pool.free(s.pages[kept:])
        del s.pages[kept:]
        s.next_position -= s.length - length
        s.length = length

    def length(self, sequence: int) -> int:
        """Tokens it holds."""
        return self._of(sequence).length

    def next_position(self, sequence: int) -> int:
        """The position of the next token."""
        return self._of(sequence).next_position

    def set_next_position(self, sequence: int, position: int) -> None:
        """For positions that are not counted one by one, as M-RoPE's after an image."""
        self._of(sequence).next_position = position

    def pages(self, sequence: int) -> list[int]:
        """Its pages, in order."""
        return list(self._of(sequence).pages)

    def append(self, sequences: Sequence[int], counts: Sequence[int]) -> Appended:
        """Room for ``counts[i]`` new tokens of ``sequences[i]``: new pages, a copy of a last page others own too."""
        self.extend(sequences, counts)
        found = self._distinct(sequences)
        size, device = self.pool.page_size, self.pool.device
        slots: list[int] = []
        positions: list[int] = []
        for s, count in zip(found, counts, strict=True):
            at = range(s.length - count, s.length)
            slots += [s.pages[i // size] * size + i % size for i in at]
            positions += range(s.next_position - count, s.next_position)
        return Appended(
            torch.tensor(slots, dtype=torch.int64, device=device),
            torch.tensor(positions, dtype=torch.int64, device=device),
        )

    def extend(self, sequences: Sequence[int], counts: Sequence[int]) -> None:
        """As ``append``, without the tensors."""
        found = self._distinct(sequences)
        if len(counts) != len(found) or min(counts, default=0) < 0:
            raise ValueError(
                f"PagedKVCache.append: counts must be {len(found)} numbers of at least 0, got {list(counts)}"
            )
        size = self.pool.page_size
        pages = [
            -(-(s.length + n) // size) - len(s.pages) for s, n in zip(found, counts, strict=True)
        ]
        with self.pool.lock:  # nobody takes the pages between the check and this
            self._check_room(found, counts, sum(pages))
            for s, count, more in zip(found, counts, pages, strict=True):
                if count and s.length % size:
                    s.pages[-1] = self.pool.writable(s.pages[-1])
                if more:
                    s.pages += self.pool.alloc(more)
                s.length += count
                s.next_position += count

    def _check_room(self, found: list[_Sequence], counts: Sequence[int], new: int) -> None:
        """Of several that own a page and all write to it, all but the last owner need a copy."""
        size = self.pool.page_size
        writers = Counter(
            s.pages[-1] for s, n in zip(found, counts, strict=True) if n and s.length % size
        )
        copies = sum(min(n, self.pool.refcount(page) - 1) for page, n in writers.items())
        self.pool.reserve(new + copies)

    def tables(self, sequences: Sequence[int], counts: Sequence[int] | None = None) -> Tables:
        """Tables for attention of the last ``counts[i]`` tokens of each (default 1).

        Pages full of earlier tokens that several sequences have at their front are the prefix of their group.
        """
        found = [self._of(s) for s in sequences]
        groups = _groups(found, counts or [1] * len(found), self.pool.page_size)
        group_of, front = [-1] * len(found), [0] * len(found)
        for g, (members, pages) in enumerate(groups.values()):
            for i in members:
                group_of[i], front[i] = g, len(pages)
        own = [s.pages[n:] for s, n in zip(found, front, strict=True)]
        size = self.pool.page_size
        lens = [s.length - n * size for s, n in zip(found, front, strict=True)]
        device = self.pool.device
        prefix = None
        if groups:
            shared = [pages for _, pages in groups.values()]
            prefix_lens = torch.tensor([len(p) * size for p in shared], device=device)
            prefix = (torch.tensor(group_of, device=device), _padded(shared, device), prefix_lens)
        return Tables(
            _padded(own, device), torch.tensor(lens, dtype=torch.int64, device=device), prefix
        )

    def compact(self, sequences: Sequence[int], keep: Sequence[torch.Tensor]) -> None:
        """Drops the tokens of ``sequences[i]`` that ``keep[i]`` (bool, one a token) does not name, in every layer.

        Pages before the first dropped token stay as they are, shared or not; of the others, those with several owners
        are left to them and replaced. Kept keys keep their rotation: ``next_position`` does not change.
        """
        found = self._distinct(sequences)
        _check_keep(found, keep)
        size = self.pool.page_size
        changed = [(s, k.cpu()) for s, k in zip(found, keep, strict=True) if not bool(k.all())]
        if not changed:
            return
        targets, replaced = [], []  # of each: where its pages go, which of them others keep
        for s, k in changed:
            first, count = int((~k).nonzero()[0]) // size, -(-int(k.sum()) // size)
            targets.append(list(s.pages[:count]))
            replaced.append([i for i in range(first, count) if self.pool.refcount(s.pages[i]) > 1])
        fresh = self.pool.alloc(sum(map(len, replaced)))
        unused = iter(fresh)
        for target, places in zip(targets, replaced, strict=True):
            for i in places:
                target[i] = next(unused)
        device = self.pool.device
        tables = [_padded(pages, device) for pages in ([s.pages for s, _ in changed], targets)]
        mask = torch.nn.utils.rnn.pad_sequence([k for _, k in changed], batch_first=True)
        lens = torch.tensor([s.length for s, _ in changed], device=device)
        try:
            compact_kv(
                self.pool.key_cache, self.pool.value_cache, tables[0], lens, mask.to(device), target_table=tables[1]
            )  # fmt: skip
        except Exception:
            self.pool.free(fresh)
            raise
        for (s, k), target, places in zip(changed, targets, replaced, strict=True):
            left = [s.pages[i] for i in places] + s.pages[len(target) :]
            s.pages, s.length = target, int(k.sum())
            self.pool.free(left)

    def _insert(self, sequence: _Sequence) -> int:
        number = self._next
        self._next += 1
        self._sequences[number] = sequence
        return number

    def _of(self, sequence: int) -> _Sequence:
        if sequence not in self._sequences:
            raise ValueError(f"PagedKVCache: there is no sequence {sequence}")
        return self._sequences[sequence]

    def _distinct(self, sequences: Sequence[int]) -> list[_Sequence]:
        if len(set(sequences)) < len(sequences):
            raise ValueError(f"PagedKVCache: sequences must differ, got {list(sequences)}")
        return [self._of(s) for s in sequences]


def _leave(pool: Pages, sequences: dict[int, _Sequence]) -> None:
    pool.leave([page for s in sequences.values() for page in s.pages])


_LEAST_SAVED = 256  # keys that are not read again: below, merging two parts of a row costs as much


def _groups(
    sequences: list[_Sequence], counts: Sequence[int], page_size: int
) -> dict[int, tuple[list[int], list[int]]]:
    """By first page: members and the full pages all of them begin with, where sharing saves something."""
    groups: dict[int, tuple[list[int], list[int]]] = {}
    for i, (s, count) in enumerate(zip(sequences, counts, strict=True)):
        full = s.pages[: (s.length - count) // page_size]
        if not full:
            continue
        members, pages = groups.setdefault(full[0], ([], full))
        members.append(i)
        same = 0
        while same < min(len(pages), len(full)) and pages[same] == full[same]:
            same += 1
        groups[full[0]] = members, pages[:same]
    return {
        first: (members, pages)
        for first, (members, pages) in groups.items()
        if (len(members) - 1) * len(pages) * page_size >= _LEAST_SAVED
    }


def _padded(rows: list[list[int]], device: torch.device) -> torch.Tensor:
    """``[B, P]`` int64, −1 past a row."""
    width = max(map(len, rows), default=0)
    padded = [[*row, *[-1] * (width - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.int64, device=device).view(len(rows), width)


def _check_keep(sequences: list[_Sequence], keep: Sequence[torch.Tensor]) -> None:
    shapes = [(s.length,) for s in sequences]
    got = [tuple(k.shape) for k in keep]
    if got != shapes or any(k.dtype != torch.bool for k in keep):
        raise ValueError(
            f"PagedKVCache.compact: keep must be bool tensors of shapes {shapes}, got {got}"
        )
