# SPDX-License-Identifier: Apache-2.0
"""Pages behind transformers' Cache: ``model.generate(..., past_key_values=PagedCache.from_config(model.config, 256))``.

Not imported by ``mmkernels.cache``: it needs transformers. Every attention implementation works, as the layers hand out
keys and values gathered from the pages; memory is that of the pages in use, beams share theirs, and after ``reset`` the
pages serve the next call.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from mmkernels.cache.pool import PagePool
from mmkernels.cache.sequences import PagedKVCache


class PagedCache(Cache):
    """A batch of sequences in pages of ``pool``; one table for all layers."""

    def __init__(self, pool: PagePool) -> None:
        self.pages = PagedKVCache(pool)
        self.sequences: list[int] = []
        self._table: torch.Tensor | None = None  # of all sequences, until one of them changes
        self._layers = [PagedLayer(self, i) for i in range(pool.num_layers)]
        super().__init__(layers=list(self._layers))

    @classmethod
    def from_config(
        cls,
        config: Any,
        num_pages: int,
        page_size: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "PagedCache":
        """With a pool of its own for a decoder of this config."""
        text = config.get_text_config(decoder=True)
        kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise ValueError(f"PagedCache: every layer must be full_attention, got {sorted(kinds)}")
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        layers = text.num_hidden_layers
        return cls(PagePool(num_pages, page_size, layers, heads, head_dim, dtype, device))

    def extend(self, batch: int, length: int) -> None:
        """Makes every sequence at least ``length`` tokens long: the first layer of a step does it for all."""
        if not self.sequences:
            self.sequences = [self.pages.add() for _ in range(batch)]
        if batch != len(self.sequences):
            raise ValueError(f"PagedCache: holds {len(self.sequences)} sequences, got {batch}")
        new = length - self.pages.length(self.sequences[0])
        if new > 0:
            self.pages.append(self.sequences, [new] * batch)
            self._table = None

    def table(self) -> torch.Tensor:
        """``[B, P]``."""
        if self._table is None:
            rows = [self.pages.pages(s) for s in self.sequences]
            self._table = torch.tensor(rows, device=self.pages.pool.device)
        return self._table

    def select(self, rows: list[int]) -> None:
        """Sequence i becomes what sequence ``rows[i]`` was; pages are shared until one of them is written."""
        new = [self.pages.fork(self.sequences[row]) for row in rows]
        for s in self.sequences:
            self.pages.free(s)
        self.sequences, self._table = new, None

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.select(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.select(torch.arange(len(self.sequences))[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select([i for i in range(len(self.sequences)) for _ in range(repeats)])

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(
                f"PagedCache: crop takes minus the tokens to remove, got {tokens_to_remove}"
            )
        for layer in self._layers:
            layer.length = max(0, layer.length + tokens_to_remove)
        for s in self.sequences:
            self.pages.truncate(s, max(0, self.pages.length(s) + tokens_to_remove))
        self._table = None

    def reset(self) -> None:
        """Gives all pages back."""
        for s in self.sequences:
            self.pages.free(s)
        for layer in self._layers:
            layer.length, layer.is_initialized = 0, False
        self.sequences, self._table = [], None


class PagedLayer(CacheLayerMixin):
    """One layer of a ``PagedCache``."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, cache: PagedCache, index: int) -> None:
        super().__init__()
        self.cache, self.index, self.length = cache, index, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``[B, H, new, d]`` into pages; returns all tokens, ``[B, H, n, d]``."""
        self.lazy_initialization(key_states, value_states)
        B, H, new, d = key_states.shape
        before, after = self.length, self.length + new
        self.cache.extend(B, after)
        self.length = after
        pool, table = self.cache.pages.pool, self.cache.table()
        at = torch.arange(before, self.length, device=table.device)
        slots = (table[:, at // pool.page_size] * pool.page_size + at % pool.page_size).flatten()
        found = []
        for cache, states in ((pool.key_cache, key_states), (pool.value_cache, value_states)):
            layer = cache[self.index]
            layer.view(-1, H, d)[slots] = states.transpose(1, 2).reshape(B * new, H, d)
            found.append(layer[table].flatten(1, 2)[:, : self.length].transpose(1, 2))
        return found[0], found[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1
