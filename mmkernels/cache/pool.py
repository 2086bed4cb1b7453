# SPDX-License-Identifier: Apache-2.0
"""Pages and who owns them."""

import threading
from collections import Counter
from collections.abc import Iterable

import torch


class OutOfPages(RuntimeError):
    """Fewer pages are free than a call needs; the call changed nothing."""

    def __init__(self, requested: int, free: int) -> None:
        super().__init__(f"{requested} pages requested, {free} are free")
        self.requested, self.free = requested, free


class PagePool:
    """``num_pages`` pages of ``page_size`` slots; a page is the same one in all layers.

    ``key_cache`` and ``value_cache`` are ``[layers, pages, page_size, kv_heads, head_dim]``, not initialised: read used
    slots only. A page in use has one owner or more (``share``) and is free again when all have let go. A call that
    raises has changed nothing. Calls from several threads take turns.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (num_layers, num_pages, page_size, num_kv_heads, head_dim)
        if min(shape) < 1:
            raise ValueError(f"PagePool: every size must be at least 1, got {list(shape)}")
        self.key_cache = torch.empty(shape, dtype=dtype, device=device)
        self.value_cache = torch.empty(shape, dtype=dtype, device=device)
        self._owners = [0] * num_pages
        self._free = list(reversed(range(num_pages)))
        self._lock = threading.RLock()

    @property
    def num_pages(self) -> int:
        return len(self._owners)

    @property
    def page_size(self) -> int:
        return self.key_cache.shape[2]

    @property
    def num_layers(self) -> int:
        return self.key_cache.shape[0]

    @property
    def device(self) -> torch.device:
        return self.key_cache.device

    @property
    def num_free(self) -> int:
        return len(self._free)

    def refcount(self, page: int) -> int:
        """How many own it; 0: it is free."""
        self._check_page("refcount", page)
        return self._owners[page]

    def alloc(self, n: int) -> list[int]:
        """``n`` pages with one owner each; raises ``OutOfPages``."""
        if n < 0:
            raise ValueError(f"PagePool.alloc: n must be at least 0, got {n}")
        with self._lock:
            if n > len(self._free):
                raise OutOfPages(n, len(self._free))
            pages = [self._free.pop() for _ in range(n)]
            for page in pages:
                self._owners[page] = 1
            return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more owner for each; a page named twice gets two."""
        pages = list(pages)
        with self._lock:
            for page in pages:
                self._check_used("share", page, 1)
            for page in pages:
                self._owners[page] += 1

    def free(self, pages: Iterable[int]) -> None:
        """One owner of each lets go. ValueError for more of them than a page has: nobody frees twice."""
        pages = list(pages)
        with self._lock:
            for page, times in Counter(pages).items():
                self._check_used("free", page, times)
            for page in pages:
                self._owners[page] -= 1
                if self._owners[page] == 0:
                    self._free.append(page)

    def writable(self, page: int) -> int:
        """A page its one owner may write: itself or, of a shared one, a copy that takes this owner's place."""
        with self._lock:
            self._check_used("writable", page, 1)
            if self._owners[page] == 1:
                return page
            (new,) = self.alloc(1)
            for cache in (self.key_cache, self.value_cache):
                cache[:, new] = cache[:, page]
            self._owners[page] -= 1
            return new

    def _check_page(self, call: str, page: int) -> None:
        if not 0 <= page < self.num_pages:
            raise ValueError(f"PagePool.{call}: {page} is no page in [0, {self.num_pages})")

    def _check_used(self, call: str, page: int, times: int) -> None:
        self._check_page(call, page)
        if self._owners[page] < times:
            raise ValueError(
                f"PagePool.{call}: page {page} has {self._owners[page]} owners, named {times} times"
            )
