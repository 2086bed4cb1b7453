# SPDX-License-Identifier: Apache-2.0
"""Where every row of a packed batch comes from: ids, placeholders that expand to feature rows, labels, positions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mmkernels import checks
from mmkernels.ops.pack_embeddings.bins import pack_bins

OP = "plan_pack"
IGNORED = -100  # the label cross-entropy skips


@dataclass(frozen=True)
class PackPlan:
    """Samples behind one another in ``order``, T rows. On CPU, where it was made; ``to`` moves it."""

    input_ids: torch.Tensor  # [T] int64, a placeholder for every feature row
    row_source: (
        torch.Tensor
    )  # [T] int64: an id, or -1 - k for feature row k, counted through the modalities
    cu_seqlens: torch.Tensor  # [S + 1] int32
    max_seqlen: int
    position_ids: torch.Tensor  # [T] int64, from 0 in every sample
    labels: torch.Tensor | None  # [T] int64; -100 on features and on each sample's first row
    media_offsets: torch.Tensor  # [S + 1, M] int64: media of each modality before a sample
    order: tuple[int, ...]  # of the samples given
    bin_offsets: tuple[int, ...]  # samples before each bin, and all

    def to(self, device: torch.device | str) -> "PackPlan":
        """The same on another device, without waiting for it."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)


def plan_pack(
    input_ids: Sequence[torch.Tensor],
    *,
    feature_token_ids: Sequence[int] = (),
    feature_counts: Sequence[Sequence[int]] | None = None,
    labels: Sequence[torch.Tensor] | None = None,
    expand: bool = True,
    max_tokens: int | None = None,
) -> PackPlan:
    """Plans one sequence of many samples, without padding; ``pack_embeddings`` makes it.

    Args:
        input_ids: Samples, ``[L]`` int64 or int32 on CPU.
        feature_token_ids: The placeholder id of each modality.
        feature_counts: Rows of each medium (image, clip), for each modality, over the samples as given. A newline or
            separator row is one of a medium's rows, wherever the projector puts it.
        labels: As ``input_ids``; -100 is ignored.
        expand: One placeholder becomes all rows of its medium (LLaVA); else placeholders are there already, one a row
            (Qwen, and what transformers' processors give), and feature_counts, if given, are checked against them.
        max_tokens: Samples go to bins of at most so many rows (``pack_bins``), bins lie behind one another:
            ``bin_offsets``. Default: one bin, in the order given.

    Returns:
        ``PackPlan``. Labels never cross samples: a sample's first is -100, as the row before would predict it.

    Raises:
        ValueError, TypeError: Names sample, modality, got, expected.

    Numerics: integers.

    Source: ``LlavaMetaForCausalLM.prepare_inputs_labels_for_multimodal``; transformers'
        ``DataCollatorWithFlattening``.
    """
    samples = _checked(input_ids, labels, feature_token_ids)
    lengths = torch.tensor([len(s) for s in samples], dtype=torch.int64)
    ids = (
        torch.cat([*samples, samples[0].new_empty(0)])
        if samples
        else torch.empty(0, dtype=torch.int64)
    )
    sample = torch.repeat_interleave(torch.arange(len(samples)), lengths)
    repeats, first, media = _features(
        ids, sample, len(samples), feature_token_ids, feature_counts, expand
    )
    rows = torch.zeros(len(samples), dtype=torch.int64).index_add_(0, sample, repeats)
    bins = (
        [list(range(len(samples)))] if max_tokens is None else pack_bins(rows.tolist(), max_tokens)
    )
    order = [i for samples_of_bin in bins for i in samples_of_bin]

    cu_seqlens = _offsets(rows[order])
    token = _ranges(
        _offsets(lengths)[:-1][order], lengths[order]
    )  # tokens as given, in packed order
    source_token = torch.repeat_interleave(token, repeats[token])
    within = _ranges(torch.zeros_like(token), repeats[token])
    is_feature = first[source_token] >= 0
    packed_ids = ids[source_token]
    starts = torch.repeat_interleave(cu_seqlens[:-1], rows[order])
    at = torch.arange(len(packed_ids))
    return PackPlan(
        input_ids=packed_ids,
        row_source=torch.where(is_feature, -1 - first[source_token] - within, packed_ids),
        cu_seqlens=cu_seqlens.int(),
        max_seqlen=int(rows.max()) if len(rows) else 0,
        position_ids=at - starts,
        labels=_labels(labels, source_token, is_feature | (at == starts)),
        media_offsets=_offsets(media[order]),
        order=tuple(order),
        bin_offsets=tuple(_offsets(torch.tensor([len(b) for b in bins])).tolist()),
    )


def _checked(
    input_ids: Sequence[torch.Tensor],
    labels: Sequence[torch.Tensor] | None,
    feature_token_ids: Sequence[int],
) -> list[torch.Tensor]:
    for i, ids in enumerate(input_ids):
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{OP}: input_ids[{i}] must be int64 or int32, got {ids.dtype}")
        if ids.dim() != 1 or ids.device.type != "cpu":
            checks.fail(OP, f"input_ids[{i}]", f"{list(ids.shape)} on {ids.device}", "[L] on CPU")
    if len(set(feature_token_ids)) != len(feature_token_ids):
        checks.fail(OP, "feature_token_ids", list(feature_token_ids), "all different")
    if labels is not None:
        if len(labels) != len(input_ids):
            checks.fail(OP, "labels", f"{len(labels)} samples", f"{len(input_ids)} samples")
        for i, (label, ids) in enumerate(zip(labels, input_ids, strict=True)):
            checks.shape(OP, f"labels[{i}]", label, tuple(ids.shape), f"of input_ids[{i}]")
    return [ids.long() for ids in input_ids]


def _features(
    ids: torch.Tensor,
    sample: torch.Tensor,
    samples: int,
    feature_token_ids: Sequence[int],
    feature_counts: Sequence[Sequence[int]] | None,
    expand: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each token, how many rows it becomes and its first feature row (-1: text); media of a sample, [S, M]."""
    M = len(feature_token_ids)
    if feature_counts is None and expand and M:
        checks.fail(OP, "feature_counts", None, "given with expand=True")
    if feature_counts is not None and len(feature_counts) != M:
        checks.fail(
            OP, "feature_counts", f"{len(feature_counts)} lists", f"one for each of {M} modalities"
        )
    repeats, first = torch.ones_like(ids), torch.full_like(ids, -1)
    media = torch.zeros(samples, M, dtype=torch.int64)
    before = 0
    for m, token_id in enumerate(feature_token_ids):
        places = (ids == token_id).nonzero().squeeze(1)
        counts = (
            None if feature_counts is None else torch.tensor(feature_counts[m], dtype=torch.int64)
        )
        by_sample = torch.bincount(sample[places], minlength=samples)
        if expand and counts is not None:
            _check_media(m, token_id, counts, by_sample)
            repeats[places], first[places] = counts, before + _offsets(counts)[:-1]
            media[:, m], before = by_sample, before + int(counts.sum())
        else:
            first[places] = before + torch.arange(len(places))
            media[:, m] = by_sample if counts is None else _media_of(m, token_id, counts, by_sample)
            before += len(places)
    return repeats, first, media


def _check_media(m: int, token_id: int, counts: torch.Tensor, by_sample: torch.Tensor) -> None:
    if len(counts) != int(by_sample.sum()):
        got = f"{len(counts)} media, but the samples have {by_sample.tolist()} placeholders of token id {token_id}"
        checks.fail(OP, f"feature_counts[{m}]", got, "a number for each placeholder")
    _check_counts(m, counts)


def _check_counts(m: int, counts: torch.Tensor) -> None:
    bad = (counts < 0).nonzero().flatten()
    if len(bad):
        checks.fail(OP, f"feature_counts[{m}][{int(bad[0])}]", int(counts[bad[0]]), "at least 0")


def _media_of(m: int, token_id: int, counts: torch.Tensor, by_sample: torch.Tensor) -> torch.Tensor:
    """Media of each sample, whose placeholders are there already: no medium may lie across two samples."""
    _check_counts(m, counts)
    ends, samples_end = counts.cumsum(0), by_sample.cumsum(0)
    have = int(samples_end[-1]) if len(samples_end) else 0
    if int(counts.sum()) != have:
        got = f"{int(counts.sum())} rows, but the samples have {have} placeholders of token id {token_id}"
        checks.fail(OP, f"feature_counts[{m}]", got, "as many")
    upto = torch.searchsorted(ends, samples_end, right=True)
    reached = torch.where(upto > 0, ends[(upto - 1).clamp(min=0)], 0) if len(ends) else samples_end
    bad = (reached != samples_end).nonzero().flatten()
    if len(bad):
        b = int(bad[0])
        got = f"a medium across the end of sample {b}, which has {int(by_sample[b])} placeholders"
        checks.fail(OP, f"feature_counts[{m}]", got, "whole media in every sample")
    return upto.diff(prepend=upto.new_zeros(1))


def _labels(
    labels: Sequence[torch.Tensor] | None, source_token: torch.Tensor, ignored: torch.Tensor
) -> torch.Tensor | None:
    if labels is None:
        return None
    flat = torch.cat([label.long() for label in labels]) if labels else source_token
    return flat[source_token].masked_fill(ignored, IGNORED)


def _offsets(counts: torch.Tensor) -> torch.Tensor:
    """``[0, c₀, c₀ + c₁, …]`` along the first dimension."""
    return torch.cat([counts.new_zeros(1, *counts.shape[1:]), counts.cumsum(0)])


def _ranges(starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """``start, start + 1, …`` of each range, one behind the other."""
    ends = lengths.cumsum(0)
    of_range = torch.repeat_interleave(starts - (ends - lengths), lengths)
    return of_range + torch.arange(len(of_range))
