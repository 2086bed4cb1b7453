# SPDX-License-Identifier: Apache-2.0
"""Pages and who owns them."""

import threading
from collections import Counter, deque
from collections.abc import Iterable
from typing import Any, NoReturn

import torch


class OutOfPages(RuntimeError):
    """Fewer pages are free than a call needs; the call changed nothing."""

    def __init__(self, requested: int, free: int) -> None:
        super().__init__(f"{requested} pages requested, {free} are free")
        self.requested, self.free = requested, free


class Pages:
    """The owners of ``num_pages`` pages of ``page_size`` slots; subclasses hold what is in them.

    A page in use has one owner or more (``share``) and is free again when all have let go. A call that raises has
    changed nothing. Calls from several threads take turns. A pool is not copied: two would own each page.
    """

    key_cache: Any
    value_cache: Any
    device: torch.device

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.lock = threading.RLock()
        self._owners = [0] * num_pages
        self._free = list(reversed(range(num_pages)))
        self._left: deque[list[int]] = deque()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__}: cannot be copied or pickled; copy.deepcopy a PagedCache, "
            "or fork sequences (PagedKVCache.fork)"
        )

    @property
    def num_pages(self) -> int:
        return len(self._owners)

    @property
    def num_free(self) -> int:
        with self.lock:
            self._free_left()
            return len(self._free)

    def refcount(self, page: int) -> int:
        """How many own it; 0: it is free."""
        self._check_page("refcount", page)
        with self.lock:
            self._free_left()
            return self._owners[page]

    def reserve(self, n: int) -> None:
        """Sees that ``n`` pages are free; raises ``OutOfPages``."""
        if n > self.num_free:
            raise OutOfPages(n, self.num_free)

    def alloc(self, n: int) -> list[int]:
        """``n`` pages with one owner each; raises ``OutOfPages``."""
        if n < 0:
            raise ValueError(f"{type(self).__name__}.alloc: n must be at least 0, got {n}")
        with self.lock:
            self.reserve(n)
            pages = [self._free.pop() for _ in range(n)]
            for page in pages:
                self._owners[page] = 1
            return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more owner for each; a page named twice gets two."""
        pages = list(pages)
        with self.lock:
            for page in pages:
                self._check_used("share", page, 1)
            for page in pages:
                self._owners[page] += 1

    def free(self, pages: Iterable[int]) -> None:
        """One owner of each lets go. ValueError for more of them than a page has: nobody frees twice."""
        pages = list(pages)
        with self.lock:
            for page, times in Counter(pages).items():
                self._check_used("free", page, times)
            for page in pages:
                self._owners[page] -= 1
                if self._owners[page] == 0:
                    self._free.append(page)

    def leave(self, pages: list[int]) -> None:
        """As ``free``, at the next call: for a finalizer, which may run in the midst of any other."""
        self._left.append(pages)

    def _free_left(self) -> None:
        while self._left:
            self.free(self._left.popleft())

    def writable(self, page: int) -> int:
        """A page its one owner may write: itself or, of a shared one, a copy that takes this owner's place."""
        with self.lock:
            self._free_left()
            self._check_used("writable", page, 1)
            if self._owners[page] == 1:
                return page
            (new,) = self.alloc(1)
            self._copy(page, new)
            self._owners[page] -= 1
            return new

    def room(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer's pages for keys and for values such as these: of all pages, written under ``lock``."""
        return self.key_cache[layer], self.value_cache[layer]

    def _copy(self, page: int, new: int) -> None:
        """What is in ``page`` to ``new``, in all layers."""
        raise NotImplementedError

    def _check_page(self, call: str, page: int) -> None:
        if not 0 <= page < self.num_pages:
            raise ValueError(
                f"{type(self).__name__}.{call}: {page} is no page in [0, {self.num_pages})"
            )

    def _check_used(self, call: str, page: int, times: int) -> None:
        self._check_page(call, page)
        if self._owners[page] < times:
            raise ValueError(
                f"{type(self).__name__}.{call}: page {page} has {self._owners[page]} owners, named {times} times"
            )


class PagePool(Pages):
    """``num_pages`` pages of ``page_size`` slots; a page is the same one in all layers.

    ``key_cache`` and ``value_cache`` are ``[layers, pages, page_size, kv_heads, head_dim]``, not initialised: read used
    slots only. A page in use has one owner or more (``share``) and is free again when all have let go. A call that
    raises has changed nothing. Calls from several threads take turns. A pool is not copied: two would own each page.
    """

    key_cache: torch.Tensor
    value_cache: torch.Tensor

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
        super().__init__(num_pages, page_size)
        self.num_layers = num_layers
        self.key_cache = torch.empty(shape, dtype=dtype, device=device)
        self.value_cache = torch.empty(shape, dtype=dtype, device=device)
        self.device = self.key_cache.device

    def _copy(self, page: int, new: int) -> None:
        for cache in (self.key_cache, self.value_cache):
            cache[:, new] = cache[:, page]


class LayerwisePages(Pages):
    """Pages whose layers take shape, dtype and device of the keys and of the values they are first given.

    ``num_pages`` at most. None: a quarter more whenever there are too few, and each layer moves to larger memory when
    it is next written. ``key_cache[i]`` and ``value_cache[i]`` are ``[pages, page_size, kv_heads, head_dim]``, empty
    before layer i is written. Tables are made on the CPU.
    """

    key_cache: list[torch.Tensor]
    value_cache: list[torch.Tensor]

    def __init__(self, num_pages: int | None, page_size: int, num_layers: int) -> None:
        if min(num_layers, page_size, 1 if num_pages is None else num_pages) < 1:
            sizes = [num_pages, page_size, num_layers]
            raise ValueError(f"LayerwisePages: every size must be at least 1, got {sizes}")
        super().__init__(num_pages or 0, page_size)
        self.num_layers, self.grows = num_layers, num_pages is None
        self.key_cache = [torch.empty(0)] * num_layers
        self.value_cache = [torch.empty(0)] * num_layers
        self.device = torch.device("cpu")

    def reserve(self, n: int) -> None:
        """Sees that ``n`` pages are free; raises ``OutOfPages`` where no more are to be made."""
        with self.lock:
            missing = n - self.num_free
            if missing > 0 and self.grows:
                old = self.num_pages
                self._owners += [0] * max(missing, old // 4)
                self._free[:0] = reversed(range(old, self.num_pages))
            super().reserve(n)

    def room(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for caches, states in ((self.key_cache, key), (self.value_cache, value)):
            caches[layer] = self._with_room(caches[layer], states)
        return self.key_cache[layer], self.value_cache[layer]

    def _with_room(self, cache: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """All pages, of a dtype that holds what is there and ``[B, H, n, d]`` more."""
        there = cache.shape[0]
        dtype = torch.promote_types(cache.dtype, states.dtype) if there else states.dtype
        if cache.dim() == 4 and there == self.num_pages and cache.dtype == dtype:
            return cache
        shape = (self.num_pages, self.page_size, states.shape[1], states.shape[3])
        with torch.inference_mode(False):  # written in and out of inference mode
            larger = torch.empty(shape, dtype=dtype, device=states.device)
        if there:
            larger[:there] = cache
        return larger

    def _copy(self, page: int, new: int) -> None:
        for caches in (self.key_cache, self.value_cache):
            for i, cache in enumerate(caches):
                if cache.dim() == 4:
                    caches[i] = self._with_room(cache, cache[:0].transpose(1, 2))
                    caches[i][new] = caches[i][page]
