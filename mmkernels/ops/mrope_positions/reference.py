# SPDX-License-Identifier: Apache-2.0
"""Multimodal positions in plain PyTorch: the definition of correct.

Sample after sample, a list of pieces ``[axes, tokens]``. Integers; with ``Family.fractional`` every sum is one of
float32, in the order of transformers. Time is a product in the dtype of ``seconds``, cut to an integer or fractional.
"""

import itertools
from collections.abc import Iterator

import torch

from mmkernels import checks
from mmkernels.ops.mrope_positions.canvas import canvas
from mmkernels.ops.mrope_positions.families import BLOCK, INDEX, OP, UNITS, Family
from mmkernels.ops.mrope_positions.media import (
    IMAGE,
    TEXT,
    VIDEO,
    Media,
    Picture,
    Sample,
    kept_tokens,
    types_of,
)  # fmt: skip
from mmkernels.ops.mrope_positions.pieces import grid, ramp
from mmkernels.ops.mrope_positions.units import units


def mrope_positions(
    input_ids: torch.Tensor,
    mm_token_type_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    image_grid: torch.Tensor | None,
    video_grid: torch.Tensor | None,
    seconds: torch.Tensor | None,
    audio_seqlens: torch.Tensor | None,
    images_per_sample: torch.Tensor | None,
    family: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[axes (and before them text, when packed), *input_ids.shape]`` and ``[samples, 1]``."""
    rule, packed = Family(*family), cu_seqlens is not None
    kept = list(kept_tokens(input_ids, attention_mask, cu_seqlens))
    media = Media(
        rule, len(kept), image_grid, video_grid, seconds, audio_seqlens, images_per_sample
    )
    bare = (
        rule.scan == UNITS and media.empty
    )  # transformers then counts the mask, whose padding it sets to 1
    dtype = torch.float32 if rule.fractional else torch.int64
    shape = (rule.axes + packed, input_ids.numel())
    out = torch.full(shape, 1 if bare else rule.pad, dtype=dtype)
    deltas = []
    for b, places in enumerate(kept):
        sample = _sample(b, input_ids, mm_token_type_ids, places, rule)
        media.begin(sample, packed)
        n = len(places)
        pieces = [ramp(0, n)] if bare or n == 0 else list(_SCANS[rule.scan](sample, media, rule))
        positions = torch.cat([p.expand(rule.axes, -1) for p in pieces], 1).to(dtype)
        out[packed:, places] = positions
        if packed:
            out[0, places] = torch.arange(n).to(dtype)
        padded = bare and attention_mask is not None and n < input_ids.shape[-1]
        largest = torch.cat([positions.flatten(), torch.ones(int(padded), dtype=dtype)])
        deltas.append(largest.max() + 1 - n if len(largest) else torch.zeros((), dtype=dtype))
    media.end()
    found = torch.stack(deltas).view(-1, 1) if deltas else torch.zeros(0, 1, dtype=dtype)
    found = torch.zeros_like(found) if rule.pictures_per_sample else found
    device = input_ids.device
    return out.view(rule.axes + packed, *input_ids.shape).to(device), found.to(device)


def _sample(
    b: int,
    input_ids: torch.Tensor,
    mm_token_type_ids: torch.Tensor | None,
    places: torch.Tensor,
    rule: Family,
) -> Sample:
    ids = input_ids.flatten().cpu()[places].tolist()
    if mm_token_type_ids is None:
        return Sample(b, ids, types_of(ids, rule))
    types = mm_token_type_ids.flatten().cpu()[places].tolist()
    for kind in types:
        if kind not in (TEXT, IMAGE, VIDEO):
            checks.fail(
                OP, f"mm_token_type_ids of sample {b}", kind, "0 (text), 1 (image) or 2 (video)"
            )
    return Sample(b, ids, types)


def runs(sample: Sample, media: Media, rule: Family) -> Iterator[torch.Tensor]:
    """Runs of equal types: text counts on, each other run is a picture."""
    at = first = 0
    for kind, run in itertools.groupby(sample.types):
        n = len(list(run))
        if rule.advance == INDEX:
            yield from _indexed(kind, n, first, sample, media, rule)
        elif kind == TEXT:
            yield ramp(at, n)
            at += n
        else:
            picture = media.next(kind, sample, n)
            yield _picture(picture, rule) + at
            at += max(picture.h, picture.w) * (picture.t if rule.advance == BLOCK else 1)
        first += n


def _picture(picture: Picture, rule: Family) -> torch.Tensor:
    if rule.advance != BLOCK:
        return grid(picture.time, picture.h, picture.w)
    frames = torch.arange(picture.t) * max(picture.h, picture.w)
    positions = grid(frames, picture.h, picture.w)
    positions[1:] += positions[0]
    return positions


def _indexed(
    kind: int, n: int, first: int, sample: Sample, media: Media, rule: Family
) -> Iterator[torch.Tensor]:
    """A run whose tokens all count; a picture's last three axes are column, row and its number."""
    positions = ramp(first, n).expand(rule.axes, -1).clone()
    if kind == IMAGE and media.has(IMAGE):
        picture = media.next(kind, sample, n, markers=2)
        _, rows, columns = grid(picture.time[:1], picture.h, picture.w)
        inside = slice(
            (n - len(rows)) // 2, n - (n - len(rows)) // 2
        )  # without a start and an end token
        positions[-3, inside], positions[-2, inside] = columns, rows
        positions[-1, inside] = picture.number
    yield positions


def spans(sample: Sample, media: Media, rule: Family) -> Iterator[torch.Tensor]:
    """Pictures between a start and an end token; without a grid all is text."""
    starts = [i + 1 for i, token in enumerate(sample.ids) if token == rule.start_id]
    ends = [i for i, token in enumerate(sample.ids) if token == rule.end_id]
    at = done = 0
    for start, end in zip(starts, ends, strict=False) if media.has(IMAGE) else ():
        if not done <= start <= end:
            checks.fail(
                OP,
                sample.name,
                f"tokens {start - 1} and {end}",
                "images' start and end tokens in turn",
            )
        yield ramp(at, start - done)
        at += start - done
        picture = media.next(IMAGE, sample, end - start)
        yield grid(picture.time, picture.h, picture.w) + at
        at, done = at + max(picture.h, picture.w), end
    yield ramp(at, len(sample.ids) - done)


_SCANS = (runs, spans, units, canvas)
