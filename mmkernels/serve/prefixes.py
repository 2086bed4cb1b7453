# SPDX-License-Identifier: Apache-2.0
"""Prefixes that requests with the same media in front go on from."""

from collections import OrderedDict
from dataclasses import dataclass

from mmkernels.cache import PagedKVCache


@dataclass(frozen=True)
class Kept:
    """A prefix others can go on from: its pages, its rows, the position after it."""

    sequence: int
    rows: int
    next_position: int


class Prefixes:
    """By content, as sequences of ``cache``; the one used longest ago is let go first."""

    def __init__(self, cache: PagedKVCache) -> None:
        self._cache = cache
        self._kept: OrderedDict[str, Kept] = OrderedDict()  # oldest use first

    def get(self, key: str | None) -> Kept | None:
        """What is kept under ``key``; no use of it yet."""
        return None if key is None else self._kept.get(key)

    def fork(self, key: str) -> int:
        """A new sequence that goes on from a kept one."""
        self._kept.move_to_end(key)
        return self._cache.fork(self._kept[key].sequence)

    def keep(self, key: str, sequence: int, rows: int, next_position: int) -> None:
        """Keeps the first ``rows`` of a sequence, which itself goes on."""
        kept = self._cache.fork(sequence)
        self._cache.truncate(kept, rows)
        self._kept[key] = Kept(kept, rows, next_position)

    def evict(self, spare: str | None = None) -> bool:
        """Lets go of the one that was used longest ago, but for ``spare``; False: there is none."""
        for key in self._kept:
            if key != spare:
                self._cache.free(self._kept.pop(key).sequence)
                return True
        return False
