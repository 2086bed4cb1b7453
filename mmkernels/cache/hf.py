# SPDX-License-Identifier: Apache-2.0
"""Pages behind transformers' Cache: ``model.generate(..., cache=PagedCache.from_config(model.config))``.

``cache=`` is called ``past_key_values=`` before transformers 5.24. Not imported by ``mmkernels.cache``: it needs
transformers. Memory is that of the pages in use and a quarter more at most. Beams and copies (``copy.deepcopy``) share
their pages. Every attention implementation works: the layers hand out keys and values gathered from the pages. With
``model.set_attn_implementation("mmkernels_paged")`` before the cache is made, nothing is gathered where no mask is
needed (no padding; a prompt or one token): ``paged_attention`` reads the pages.
"""

from typing import Any

import torch
from torch.utils._pytree import tree_map
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mmkernels.cache.pool import LayerwisePages, PagePool
from mmkernels.cache.sequences import PagedKVCache
from mmkernels.ops.paged_attention import paged_attention

NAME = "mmkernels_paged"


class PagedCache(DynamicCache):
    """A ``DynamicCache`` whose sequences lie in pages of ``pool``; one table for all layers.

    A layer that is given other tokens than the rest (an image's keys, for cross-attention), or keys with a gradient,
    keeps them as a ``DynamicLayer`` does. ``copy.deepcopy`` forks the sequences: pages are shared until one of them is
    written. ``gather=False``: nothing is gathered before it is read, for a model whose attention is ours.
    """

    layers: Any  # of ``PagedLayer``

    def __init__(self, pool: PagePool | LayerwisePages, gather: bool = True) -> None:
        self._batch = _Batch(PagedKVCache(pool))
        layers: Any = [PagedLayer(self._batch, i, gather) for i in range(pool.num_layers)]
        Cache.__init__(self, layers=layers)

    @classmethod
    def from_config(
        cls, config: Any, num_pages: int | None = None, page_size: int = 16
    ) -> "PagedCache":
        """With pages of its own for a decoder of this config; None: as many as it comes to need."""
        text = config.get_text_config(decoder=True)
        layers = DynamicCache(config=text).layers
        if any(type(layer) is not DynamicLayer for layer in layers):
            kinds = sorted(set(getattr(text, "layer_types", None) or ["sliding_attention"]))
            raise ValueError(f"PagedCache: every layer must be full_attention, got {kinds}")
        pool = LayerwisePages(num_pages, page_size, len(layers))
        return cls(pool, gather=text._attn_implementation != NAME)

    @property
    def pages(self) -> PagedKVCache:
        return self._batch.pages

    @property
    def sequences(self) -> list[int]:
        """Their numbers in ``pages``."""
        return self._batch.sequences

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._select(beam_idx.tolist())
        for layer in self._unpaged():
            layer.reorder_cache(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(torch.arange(len(self.sequences))[indices.cpu()].tolist())
        for layer in self._unpaged():
            layer.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select([i for i in range(len(self.sequences)) for _ in range(repeats)])
        for layer in self._unpaged():
            layer.batch_repeat_interleave(repeats)

    def crop(self, tokens_to_remove: int) -> None:
        """Given a negative number, removes so many tokens; else what this transformers does."""
        for layer in self.layers:
            if layer.paged:
                layer.length = _cropped(layer.length, tokens_to_remove)
            else:
                layer.crop(tokens_to_remove)
        self._batch.truncate(_cropped(self._batch.length, tokens_to_remove))

    def reset(self) -> None:
        """Gives all pages back; they serve the next call."""
        self._batch.clear()
        for layer in self.layers:
            layer.reset()

    def _select(self, rows: list[int]) -> None:
        if self._batch.length and rows != list(range(len(self.sequences))):
            self._batch.select(rows)

    def _unpaged(self) -> list[Any]:
        return [layer for layer in self.layers if not layer.paged]


def _cropped(length: int, argument: int) -> int:
    """What ``DynamicLayer.crop`` leaves of a length: releases differ in positive numbers and in 0."""
    layer = DynamicLayer()
    layer.keys = layer.values = torch.empty(1, 1, length, 1, device="meta")
    layer.is_initialized = True
    layer.crop(argument)
    return int(layer.get_seq_length())


class _Batch:
    """The sequences of a cache, and the latest step: which tokens of which slots its layers are to write."""

    def __init__(self, pages: PagedKVCache) -> None:
        self.pages = pages
        self.sequences: list[int] = []
        self.before = (
            0  # length before the latest step; the length itself when no layer may still write it
        )
        self._rows: list[list[int]] = []
        self.first: int | None = None  # page of one sequence whose pages lie side by side
        self._slots: dict[torch.device, torch.Tensor] = {}
        self._tables: dict[torch.device, torch.Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Batch":
        copied = _Batch(self.pages.__deepcopy__(memo))
        copied.sequences = list(self.sequences)
        for batch in (self, copied):
            batch._changed()
        return copied

    @property
    def length(self) -> int:
        return self.pages.length(self.sequences[0]) if self.sequences else 0

    def append(self, count: int, new: int) -> None:
        """``new`` tokens to each of ``count`` sequences."""
        before = self.length
        sequences = self.sequences or [self.pages.add() for _ in range(count)]
        try:
            self.pages.extend(sequences, [new] * count)
        except Exception:
            for s in sequences if not self.sequences else ():
                self.pages.free(s)
            raise
        self.sequences = sequences
        self._changed()
        self.before = before

    def select(self, rows: list[int]) -> None:
        """Sequence i becomes what sequence ``rows[i]`` was."""
        new = [self.pages.fork(self.sequences[row]) for row in rows]
        for s in self.sequences:
            self.pages.free(s)
        self.sequences = new
        self._changed()

    def truncate(self, length: int) -> None:
        for s in self.sequences:
            self.pages.truncate(s, length)
        self._changed()

    def clear(self) -> None:
        for s in self.sequences:
            self.pages.free(s)
        self.sequences = []
        self._changed()

    def slots(self, device: torch.device) -> torch.Tensor:
        """Of the latest step, ``[B·new]``."""
        if device not in self._slots:
            size, at = self.pages.pool.page_size, range(self.before, self.length)
            slots = [row[i // size] * size + i % size for row in self._rows for i in at]
            self._slots[device] = torch.tensor(slots, dtype=torch.int64, device=device)
        return self._slots[device]

    def table(self, device: torch.device) -> torch.Tensor:
        """Pages of all sequences, ``[B, P]``."""
        if device not in self._tables:
            self._tables[device] = torch.tensor(self._rows, dtype=torch.int64, device=device)
        return self._tables[device]

    def _changed(self) -> None:
        self.before = self.length
        self._slots = {}
        rows = [self.pages.pages(s) for s in self.sequences]
        if rows != self._rows:
            self._rows, self._tables = rows, {}
            row = rows[0] if len(rows) == 1 else []
            side_by_side = row and row == list(range(row[0], row[0] + len(row)))
            self.first = row[0] if side_by_side else None


class PagedLayer(DynamicLayer):
    """A ``DynamicLayer`` whose keys and values lie in pages, until somebody sets them."""

    paged = False  # while the super class sets its own

    def __init__(self, batch: _Batch, index: int, gather: bool) -> None:
        super().__init__()
        self._batch, self.index, self.gather = batch, index, gather
        self.paged, self.length = True, 0

    @property
    def keys(self) -> torch.Tensor | None:
        """``[B, H, n, d]`` of all tokens, as they are now."""
        return self._snapshot("key_cache") if self._stored else self._keys

    @keys.setter
    def keys(self, keys: torch.Tensor | None) -> None:
        self._leave_pages()
        self._keys = keys

    @property
    def values(self) -> torch.Tensor | None:
        """``[B, H, n, d]`` of all tokens, as they are now."""
        return self._snapshot("value_cache") if self._stored else self._values

    @values.setter
    def values(self, values: torch.Tensor | None) -> None:
        self._leave_pages()
        self._values = values

    @property
    def _stored(self) -> bool:
        return self.paged and self.is_initialized and bool(self._batch.sequences)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        paged, self.paged = self.paged, False
        super().lazy_initialization(key_states, value_states)
        self.paged = paged

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``[B, H, new, d]`` into pages; returns all tokens, ``[B, H, n, d]``."""
        B, _, new, _ = key_states.shape
        if not self._takes_part(key_states, value_states):
            self._leave_pages()
            found: tuple[torch.Tensor, torch.Tensor] = super().update(
                key_states, value_states, *args, **kwargs
            )
            return found
        self._check(key_states, value_states)
        if self.length == self._batch.length:  # the first layer of a step
            self._batch.append(B, new)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before, self.length = self.length, self.length + new
        caches = self._write(before, key_states, value_states)
        if not self.gather:
            return InPages.of(self, key_states, 0), InPages.of(self, value_states, 1)
        if before == 0:
            return key_states, value_states
        key, value = map(self._tokens, caches)
        if key.dtype == key_states.dtype and value.dtype == value_states.dtype:
            return key, value
        return key.to(key_states.dtype), value.to(value_states.dtype)

    def _takes_part(self, key: torch.Tensor, value: torch.Tensor) -> bool:
        """Whether these are the tokens of the step, and pages can hold them."""
        batch = self._batch
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            return False
        if batch.sequences and key.shape[0] != len(batch.sequences) and not self.length:
            return False
        if not self.paged:
            return False
        first = self.length == batch.length
        return first or (self.length, self.length + key.shape[2]) == (batch.before, batch.length)

    def _check(self, key: torch.Tensor, value: torch.Tensor) -> None:
        held = len(self._batch.sequences)
        if held and key.shape[0] != held:
            raise ValueError(f"PagedCache: holds {held} sequences, got {key.shape[0]}")
        pool = self._batch.pages.pool
        for name, states in (("key_cache", key), ("value_cache", value)):
            there, got = getattr(pool, name)[self.index].shape[2:], states.shape[1::2]
            if there and there != got:
                raise ValueError(
                    f"PagedCache: {name}[{self.index}] holds heads of {list(there)}, got {list(got)}"
                )

    def _leave_pages(self) -> None:
        """From here on keys and values are tensors of this layer's own."""
        if self.paged:
            self._keys, self._values, self.paged = self.keys, self.values, False

    def _write(self, before: int, *states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """New keys and values to the slots of the step; returns the pages of both."""
        pool, batch = self._batch.pages.pool, self._batch
        with pool.lock:  # while pages move to larger memory nobody writes to the old
            caches = pool.room(self.index, *states)
            for cache, new in zip(caches, states, strict=True):
                if batch.first is not None:
                    self._span(cache, batch.first, before).copy_(new)
                else:
                    one = new.shape[2] == 1
                    rows = new[:, :, 0] if one else new.transpose(1, 2).flatten(0, 1)
                    slots = batch.slots(new.device)
                    cache.flatten(0, 1).index_copy_(0, slots, rows.to(cache.dtype))
        return caches

    def _tokens(self, cache: torch.Tensor) -> torch.Tensor:
        """``[B, H, n, d]``: all of them."""
        batch = self._batch
        if batch.first is not None:
            return self._span(cache, batch.first, 0)
        used = -(-self.length // cache.shape[1])  # of a layer left out of some steps, fewer
        table = batch.table(cache.device)[:, :used]
        pages = cache.index_select(0, table.flatten())
        rows = pages.view(len(batch.sequences), used * cache.shape[1], *cache.shape[2:])
        return rows[:, : self.length].transpose(1, 2)

    def _span(self, cache: torch.Tensor, page: int, token: int) -> torch.Tensor:
        """``[1, H, n, d]``: tokens from ``token`` on, of pages that lie side by side from ``page`` on."""
        _, size, H, d = cache.shape
        start = cache.storage_offset() + (page * size + token) * H * d
        return cache.as_strided((1, H, self.length - token, d), (0, d, H * d, 1), start)

    def tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, ``[B, H, n, d]``."""
        pool = self._batch.pages.pool
        return self._tokens(pool.key_cache[self.index]), self._tokens(pool.value_cache[self.index])

    def _snapshot(self, name: str) -> torch.Tensor:
        """As ``_tokens``, in memory of its own."""
        return self._tokens(getattr(self._batch.pages.pool, name)[self.index]).clone()

    def attend(self, query: torch.Tensor, scale: float | None, causal: bool) -> torch.Tensor:
        """``[B, m, Hq, d]`` of the last m tokens."""
        B, Hq, m, d = query.shape
        pool, table = self._batch.pages.pool, self._batch.table(query.device)
        out = paged_attention(
            query.transpose(1, 2).reshape(B * m, Hq, d), pool.key_cache[self.index],
            pool.value_cache[self.index], table, table.new_full((B,), self.length),
            cu_seqlens_q=torch.arange(B + 1, device=table.device) * m if m > 1 else None,
            causal=causal, scale=scale,
        )  # fmt: skip
        return out.view(B, m, Hq, d)

    @property
    def attends(self) -> bool:
        """Whether ``attend`` takes the pages: keys and values alike."""
        pool = self._batch.pages.pool
        key, value = pool.key_cache[self.index], pool.value_cache[self.index]
        return key.shape == value.shape and key.dtype == value.dtype

    def reset(self) -> None:
        self._keys = self._values = None
        self.paged, self.length, self.is_initialized = True, 0, False

    def get_seq_length(self, *args: Any) -> int:
        return self.length if self.paged else int(super().get_seq_length(*args))


class InPages(torch.Tensor):
    """Keys (0) or values (1) of a layer, gathered when anything but ``attention`` reads them."""

    layer: PagedLayer
    which: int

    @classmethod
    def of(cls, layer: PagedLayer, states: torch.Tensor, which: int) -> "InPages":
        made: InPages = torch.Tensor._make_subclass(cls, states)
        made.layer, made.which = layer, which
        return made

    def gathered(self) -> torch.Tensor:
        return self.layer.tokens()[self.which]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def read(x: Any) -> Any:
            return x.gathered() if isinstance(x, InPages) else x

        args, kwargs = tree_map(read, (args, kwargs or {}))
        return func(*args, **kwargs)


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
    if isinstance(key, InPages):
        layer = key.layer
        if attention_mask is None and layer.attends:
            causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
            return layer.attend(query, scaling, causal), None
        key, value = layer.tokens()
    options = {"scaling": scaling, "is_causal": is_causal, **kwargs}
    found: tuple[torch.Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, **options
    )
    return found


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
