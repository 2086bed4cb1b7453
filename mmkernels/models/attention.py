# SPDX-License-Identifier: Apache-2.0
"""What a token of a packed sequence sees: its own sample (training), or its pages (generation).

Both are called by a layer with query ``[T, A, K]``, key and value ``[T, G, K]`` of the tokens at hand, samples behind
one another, and turn query and key by their positions themselves.

Dimensions: T tokens, A heads, G key-value heads, K head width, r rotary channels.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

import mmkernels
from mmkernels.cache import PagedKVCache
from mmkernels.models.features import take_part

Norms = tuple[torch.Tensor, torch.Tensor, float]  # weights of query's and key's RMSNorm, eps
_WRITTEN_OUT = 384  # tokens: up to here SDPA's backward in 16 bits takes longer on CPU than GEMMs


class Rotary(NamedTuple):
    """``position_ids`` ``[T]`` or ``[axes, T]``, and one (frequency, axis) for each rotary channel."""

    position_ids: torch.Tensor
    inv_freq: torch.Tensor
    axis: torch.Tensor | None


class Packed:
    """Samples without padding, each causal in itself or, of an encoder, all of each; differentiable.

    flash-attn where it is installed, torch's varlen kernel on CUDA without it. On CPU samples of like lengths are one
    padded batch: about ``T·L`` scores, not ``T·T``.
    """

    def __init__(self, cu_seqlens: torch.Tensor, max_seqlen: int, causal: bool = True) -> None:
        self.cu_seqlens, self.max_seqlen, self.causal = cu_seqlens, max_seqlen, causal
        self._batches: list[tuple[torch.Tensor, torch.Tensor]] | None = None

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rotary: Rotary,
        norms: Norms | None,
    ) -> torch.Tensor:
        if norms is not None:
            query = rms_norm(query, norms[0], norms[2])
            key = rms_norm(key, norms[1], norms[2])
        query, key = mmkernels.mrope(query, key, *rotary)
        return self.attend(query, key, value)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``[T, A, K]``. A bias ``[A, L, L]`` is for samples that all have L tokens."""
        if query.is_cuda and bias is None:
            return self._varlen(query, key, value)
        if self._batches is None:
            self._batches = list(self._alike())
        if len(self._batches) == 1 and bool(self._batches[0][1].all()):
            q, k, v = (x.unflatten(0, self._batches[0][0].shape) for x in (query, key, value))
            return _attend(q, k, v, self.causal, bias).flatten(0, 1)
        if not self._batches:
            return take_part(query, key, value, *([] if bias is None else [bias]))
        outs, places = list[torch.Tensor](), list[torch.Tensor]()
        for rows, real in self._batches:
            mixed = _attend(query[rows], key[rows], value[rows], self.causal, bias)
            outs.append(mixed[real])
            places.append(rows[real])
        return torch.cat(outs)[torch.cat(places).argsort()]

    def _alike(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Rows ``[b, L]`` of samples of like lengths, in order, and which are real; causal attention needs no mask for
        padding behind, other attention gets none."""
        starts, lengths = self.cu_seqlens[:-1].tolist(), self.cu_seqlens.diff().tolist()
        classes: dict[int, list[int]] = {}
        for i, n in enumerate(lengths):
            if n:
                alike = (n - 1).bit_length() if self.causal and len(set(lengths)) > 1 else n
                classes.setdefault(alike, []).append(i)
        device = self.cu_seqlens.device
        for samples in classes.values():
            start, length = (
                torch.tensor([x[i] for i in samples], device=device)[:, None]
                for x in (starts, lengths)
            )
            at = torch.arange(max(lengths[i] for i in samples), device=device)
            yield start + at.minimum(length - 1), at < length

    def _varlen(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        cu_seqlens = self.cu_seqlens.to(query.device, torch.int32)
        ends = (cu_seqlens, cu_seqlens, self.max_seqlen, self.max_seqlen)
        try:
            from flash_attn import flash_attn_varlen_func
        except ImportError:
            from torch.nn.attention.varlen import varlen_attn

            window = (-1, 0) if self.causal else (-1, -1)
            out = varlen_attn(query, key, value, *ends, window_size=window, enable_gqa=True)
            assert isinstance(out, torch.Tensor)
            return out
        return flash_attn_varlen_func(query, key, value, *ends, causal=self.causal)


class Paged:
    """One step of generation: ``counts[i]`` new tokens of ``sequences[i]``, written to pages before they are read.

    Raises:
        OutOfPages: There is no room; nothing has changed.
    """

    def __init__(
        self, cache: PagedKVCache, sequences: Sequence[int], counts: Sequence[int]
    ) -> None:
        appended = cache.append(sequences, counts)
        self.pool, self.slot_mapping = cache.pool, appended.slot_mapping
        self.position_ids = appended.position_ids
        self.tables = cache.tables(sequences, counts)
        self.ends = torch.tensor([0, *counts], device=cache.pool.device).cumsum(0)

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rotary: Rotary,
        norms: Norms | None,
    ) -> torch.Tensor:
        caches = self.pool.key_cache[layer], self.pool.value_cache[layer]
        q_norm, k_norm, eps = norms or (None, None, 0.0)
        query, _ = mmkernels.rope_write_kv(
            query, key, value, *caches, self.slot_mapping, rotary.position_ids, rotary.inv_freq, rotary.axis,
            q_norm=q_norm, k_norm=k_norm, eps=eps,
        )  # fmt: skip
        return mmkernels.paged_attention(
            query, *caches, self.tables.block_table, self.tables.seq_lens, cu_seqlens_q=self.ends,
            shared_prefix=self.tables.shared_prefix,
        )  # fmt: skip


def rms_norm(states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / rms(x) · weight`` in x's dtype, also under autocast, where torch's own leaves its fused path."""
    weight = weight.to(states.dtype)
    return F.rms_norm(states, weight.shape, weight, eps)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    causal: bool,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """``[B, L, A, K]``; a token sees those before it, or all."""
    B, L, A, K = query.shape
    G = key.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    short = query.requires_grad and query.element_size() == 2 and L <= _WRITTEN_OUT
    if bias is None and not short:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=A != G)
        return out.transpose(1, 2)
    grouped = (query * K**-0.5).reshape(B, G, A // G * L, K)
    scores = (grouped @ key.mT).view(B, A, L, L)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if causal:
        later = torch.ones(L, L, dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    mixed = scores.softmax(-1).to(value.dtype).view(B, G, A // G * L, L) @ value
    return mixed.view(B, A, L, K).transpose(1, 2)
