# SPDX-License-Identifier: Apache-2.0
"""Merging token embeddings with features in plain PyTorch: the definition of correct.

Dimensions: T tokens (``input_ids`` flattened), V vocabulary rows, D width, M modalities; modality m
brings n_m feature rows. ``row_source [T]`` says where each token's row comes from: ``r >= 0`` is row r
of the embedding (token r of ``inputs_embeds``), ``r < 0`` is feature row ``-1 - r``, counted through
the modalities in order. It is found once and is all the backward needs.

Rows are copied bit by bit, features of another dtype cast; ``embed_scale`` multiplies looked-up rows only, in fp32,
rounded once. The embedding gradient sums in fp32 (fp64 for float64) and rounds once.
"""

import math
from typing import Any

import torch


def merge_embeddings(
    input_ids: torch.Tensor,
    embed_weight: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    features: list[torch.Tensor],
    feature_token_ids: list[int],
    feature_rows: list[torch.Tensor],
    feature_counts: list[int] | None,
    embed_scale: float | None,
    padding_idx: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(merged [..., D], row_source [T])``."""
    text = inputs_embeds if inputs_embeds is not None else embed_weight
    assert text is not None
    lengths = [f.shape[0] for f in features]
    vocab = 0 if embed_weight is None else embed_weight.shape[0]
    source = row_source(input_ids, vocab, lengths, feature_token_ids, feature_rows, feature_counts)
    rows = gather_rows(source, text.reshape(-1, text.shape[-1]), features, embed_scale)
    return rows.view(*input_ids.shape, text.shape[-1]), source


def gather_rows(
    source: torch.Tensor,
    table: torch.Tensor,
    features: list[torch.Tensor],
    embed_scale: float | None,
) -> torch.Tensor:
    """``[T, D]`` of a plan."""
    is_text = source >= 0
    rows = torch.zeros(len(source), table.shape[1], dtype=table.dtype, device=table.device)
    looked_up = table[source[is_text]]
    if embed_scale is not None:
        wide = torch.promote_types(table.dtype, torch.float32)
        looked_up = (looked_up.to(wide) * embed_scale).to(table.dtype)
    rows = rows.index_put((is_text.nonzero().squeeze(1),), looked_up)
    if features:
        placed = (~is_text).nonzero().squeeze(1)
        found = torch.cat([f.to(table.dtype) for f in features])
        rows = rows.index_put((placed,), found[-1 - source[~is_text]])
    return rows


def merge_embeddings_out(out: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """Into ``out`` [..., D]; arguments as above but padding_idx; returns row_source [T]."""
    merged, source = merge_embeddings(*(*arguments, None))
    out.copy_(merged)
    return source


def row_source(
    input_ids: torch.Tensor,
    vocab: int,
    feature_lengths: list[int],
    feature_token_ids: list[int],
    feature_rows: list[torch.Tensor],
    feature_counts: list[int] | None,
) -> torch.Tensor:
    """The checked plan. ``vocab`` 0 means ``inputs_embeds``: ids are only compared, never looked up."""
    ids = input_ids.reshape(-1).long()
    tokens = torch.arange(ids.shape[0], device=ids.device)
    source = ids.clone() if vocab else tokens.clone()
    placed = torch.zeros_like(ids, dtype=torch.bool)
    first = 0
    for m, length in enumerate(feature_lengths):
        if feature_rows:
            positions = feature_rows[m].long()
            _check_positions(m, positions, placed)
        else:
            positions = tokens[ids == feature_token_ids[m]]
            _check_counts(m, positions, input_ids, length, feature_token_ids[m], feature_counts)
        placed[positions] = True
        source[positions] = -1 - torch.arange(first, first + length, device=ids.device)
        first += length
    bad = (~placed & ((ids < 0) | (ids >= vocab))).nonzero() if vocab else ids[:0]
    if bad.numel():
        t = int(bad[0])
        raise ValueError(
            f"merge_embeddings: input_ids[{_place(t, input_ids.shape)}] is {int(ids[t])}, "
            f"expected an id in [0, {vocab}) or a feature token id"
        )
    return source


def _check_positions(m: int, positions: torch.Tensor, placed: torch.Tensor) -> None:
    T = placed.shape[0]
    seen: set[int] = set()
    for k, position in enumerate(positions.tolist()):
        if not 0 <= position < T:
            raise ValueError(
                f"merge_embeddings: feature_rows[{m}][{k}] is {position}, expected a token index in [0, {T})"
            )
        if position in seen or placed[position]:
            raise ValueError(
                f"merge_embeddings: feature_rows[{m}][{k}] is {position}, a token that already has a feature"
            )
        seen.add(position)


def _check_counts(
    m: int,
    positions: torch.Tensor,
    input_ids: torch.Tensor,
    length: int,
    token_id: int,
    feature_counts: list[int] | None,
) -> None:
    L = input_ids.shape[-1]
    samples = math.prod(input_ids.shape[:-1])
    got = torch.bincount(positions // max(L, 1), minlength=samples).tolist()
    expected = (
        feature_counts[m * samples : (m + 1) * samples] if feature_counts is not None else got
    )
    for b, (want, have) in enumerate(zip(expected, got, strict=True)):
        if want != have:
            raise ValueError(
                f"merge_embeddings: sample {b} has {have} placeholders of features[{m}] "
                f"(token id {token_id}), expected {want}"
            )
    if positions.numel() != length:
        raise ValueError(
            f"merge_embeddings: features[{m}] has {length} rows, but input_ids has "
            f"{positions.numel()} placeholders of token id {token_id} (by sample: {_brief(got)})"
        )


def _brief(counts: list[int]) -> str:
    shown = ", ".join(map(str, counts[:8]))
    return shown + (", ..." if len(counts) > 8 else "")


def _place(t: int, shape: torch.Size) -> str:
    L = shape[-1]
    return str(t) if len(shape) == 1 else f"{t // L}, {t % L}"


def merge_embeddings_backward(
    grad: torch.Tensor,
    row_source: torch.Tensor,
    vocab: int,
    feature_lengths: list[int],
    embed_scale: float | None,
    padding_idx: int | None,
    needs: list[bool],
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Gradients of the text table (``[V, D]``, or ``[T, D]`` when vocab is 0) and of each feature.

    ``needs[0]`` asks for the text's, ``needs[1 + m]`` for feature m's; what is not needed is empty.
    """
    D = grad.shape[-1]
    rows = grad.reshape(-1, D)
    acc = torch.float64 if grad.dtype == torch.float64 else torch.float32
    d_text = grad.new_empty(0)
    if needs[0]:
        is_text = row_source >= 0
        if padding_idx is not None and vocab:
            is_text = is_text & (row_source != padding_idx)
        wide = torch.zeros(vocab or rows.shape[0], D, dtype=acc, device=grad.device)
        wide.index_add_(0, row_source[is_text], rows[is_text].to(acc))
        d_text = (wide if embed_scale is None else wide * embed_scale).to(grad.dtype)
    d_features, first = [], 0
    is_feature = row_source < 0
    by_feature = torch.zeros(sum(feature_lengths), D, dtype=grad.dtype, device=grad.device)
    by_feature[-1 - row_source[is_feature]] = rows[is_feature]
    for length, need in zip(feature_lengths, needs[1:], strict=True):
        part = by_feature[first : first + length]
        d_features.append(part.clone() if need else grad.new_empty(0))
        first += length
    return d_text, d_features
