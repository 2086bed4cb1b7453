# SPDX-License-Identifier: Apache-2.0
"""Pages behind transformers' Cache: ``model.generate(..., cache=PagedCache.from_config(model.config, 256))``.

``cache=`` is called ``past_key_values=`` before transformers 5.24. Not imported by ``mmkernels.cache``: it needs
transformers. Memory is that of the pages in use, beams share theirs, and
after ``reset`` the pages serve the next call. Every attention implementation works: the layers hand out keys and values
gathered from the pages. With ``model.set_attn_implementation("mmkernels_paged")`` before the cache is made, nothing is
gathered where no mask is needed (no padding; a prompt or one token): ``paged_attention`` reads the pages.
"""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mmkernels.cache.pool import PagePool
from mmkernels.cache.sequences import PagedKVCache
from mmkernels.ops.paged_attention import paged_attention

NAME = "mmkernels_paged"


class PagedCache(Cache):
    """A batch of sequences in pages of ``pool``; one table for all layers.

    ``gather=False``: the layers hand out only the new keys and values, for a model whose attention is ours.
    """

    def __init__(self, pool: PagePool, gather: bool = True) -> None:
        self.pages, self.gather = PagedKVCache(pool), gather
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
        pool = PagePool(
            num_pages, page_size, text.num_hidden_layers, heads, head_dim, dtype, device
        )
        return cls(pool, gather=text._attn_implementation != NAME)

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
        for cache, states in ((pool.key_cache, key_states), (pool.value_cache, value_states)):
            rows = states.transpose(1, 2).reshape(B * new, H, d)
            cache[self.index].view(-1, H, d)[slots] = rows.to(cache.dtype)  # under autocast
        if self.cache.gather:
            return self.gathered()
        key_states._mmkernels_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    def gathered(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all tokens, ``[B, H, n, d]``."""
        pool, table = self.cache.pages.pool, self.cache.table()
        key, value = (
            cache[self.index][table].flatten(1, 2)[:, : self.length].transpose(1, 2)
            for cache in (pool.key_cache, pool.value_cache)
        )
        return key, value

    def attend(self, query: torch.Tensor, scale: float | None, causal: bool) -> torch.Tensor:
        """``[B, m, Hq, d]`` of the last m tokens."""
        B, Hq, m, d = query.shape
        pool, table = self.cache.pages.pool, self.cache.table()
        out = paged_attention(
            query.transpose(1, 2).reshape(B * m, Hq, d), pool.key_cache[self.index],
            pool.value_cache[self.index], table, table.new_full((B,), self.length),
            cu_seqlens_q=torch.arange(B + 1, device=table.device) * m if m > 1 else None,
            causal=causal, scale=scale,
        )  # fmt: skip
        return out.view(B, m, Hq, d)

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        """Of so many new tokens, or of their positions, as transformers up to 5.3 tells it."""
        new = query_length if isinstance(query_length, int) else len(query_length)
        return self.length + new, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in earlier releases


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: pages where there are some and no mask, else SDPA."""
    layer: PagedLayer | None = getattr(key, "_mmkernels_layer", None)
    if layer is not None and attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        return layer.attend(query, scaling, causal), None
    if layer is not None:
        key, value = layer.gathered()
    options = {"scaling": scaling, "is_causal": is_causal, **kwargs}
    found: tuple[torch.Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, **options
    )
    return found


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
