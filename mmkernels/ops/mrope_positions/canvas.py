# SPDX-License-Identifier: Apache-2.0
"""Positions of MiniCPM-V 4.7: a thumbnail and its slices lie on one canvas, their markers at its corners.

Frames with nothing but markers between them are a group. A crop is a run of equal token types; after a slice's start
token it is a slice of the frame before it, else the thumbnail of a new frame.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from mmkernels import checks
from mmkernels.ops.mrope_positions.families import OP, Family
from mmkernels.ops.mrope_positions.media import TEXT, Media, Picture, Sample
from mmkernels.ops.mrope_positions.pieces import ramp

Span = tuple[int, int]


class Frame(NamedTuple):
    """A thumbnail, the slices that tile it, and whether it begins a group."""

    kind: int
    thumb: Span
    slices: list[Span]
    begins: bool


def canvas(sample: Sample, media: Media, rule: Family) -> Iterator[torch.Tensor]:
    """One piece: all tokens of the sample."""
    n = len(sample.ids)
    positions = ramp(0, n).expand(3, -1).clone()
    at = done = 0
    for frame in _frames(sample, rule):
        start = frame.thumb[0] - 1
        if start > done:
            positions[:, done:start] = ramp(at, start - done)
            at += start - done + (not frame.begins)  # within a group, one step more
        done = _end(frame, sample, rule)
        at += _paint(positions, frame, done, at, sample, media)
    positions[:, done:] = ramp(at, n - done)
    yield positions


def _markers(rule: Family) -> set[int]:
    return {rule.slice_start_id, rule.slice_end_id, rule.start_id, rule.end_id, rule.newline_id}


def _frames(sample: Sample, rule: Family) -> list[Frame]:
    found: list[Frame] = []
    done = first = 0
    for kind, run in itertools.groupby(sample.types):
        start, first = first, first + len(list(run))
        if kind == TEXT:
            continue
        if start == 0:
            checks.fail(OP, sample.name, "an image token first", "a start token before an image")
        if found and sample.ids[start - 1] == rule.slice_start_id:
            found[-1].slices.append((start, first))
        else:
            apart = not found or not _markers(rule).issuperset(sample.ids[done : start - 1])
            found.append(Frame(kind, (start, first), [], apart))
        done = first
    return found


def _end(frame: Frame, sample: Sample, rule: Family) -> int:
    """Behind the markers that follow the frame."""
    end = (frame.slices or [frame.thumb])[-1][1]
    while end < len(sample.ids) and sample.ids[end] in _markers(rule):
        end += 1
    return end


def _paint(
    positions: torch.Tensor, frame: Frame, end: int, at: int, sample: Sample, media: Media
) -> int:
    """Fills in the frame's tokens and says how far text goes on."""
    (start, stop), slices = frame.thumb, frame.slices
    thumb = media.next(frame.kind, sample, stop - start)
    crops = [media.next(frame.kind, sample, b - a) for a, b in slices]
    columns = _columns(slices)
    high, wide = thumb.h, thumb.w
    if crops:
        high, wide = len(crops) // columns * crops[0].h, columns * crops[0].w
    positions[:, start - 1 : end] = at
    positions[1:, start - 1] = max(at - 1, 0)
    if stop < end:
        positions[1:, stop] = torch.tensor([at + high, at + wide])
    positions[1:, start:stop] = at + _spread(thumb, high, wide)
    for k, ((a, b), crop) in enumerate(zip(slices, crops, strict=True)):
        corner = torch.tensor([k // columns * crops[0].h, k % columns * crops[0].w]) + at
        positions[1:, a - 1] = corner
        positions[1:, a:b] = corner[:, None] + _spread(crop, crop.h, crop.w)
        if b < end:
            positions[1:, b] = corner + torch.tensor([crop.h - 1, crop.w - 1])
        if (
            k + 1 < len(slices) and slices[k + 1][0] - b > 2
        ):  # the newline that ends a row of slices
            edge = [at + (k // columns + 1) * crops[0].h - 1, at + columns * crops[0].w]
            positions[1:, b + 1 : slices[k + 1][0] - 1] = torch.tensor(edge)[:, None]
    return max(high, wide) + 1


def _columns(slices: list[Span]) -> int:
    """Slices in a row: up to the first gap wider than an end and a start token; one row if that does not divide."""
    for k in range(len(slices) - 1):
        if slices[k + 1][0] - slices[k][1] > 2:
            return k + 1 if len(slices) % (k + 1) == 0 else len(slices)
    return len(slices)


def _spread(crop: Picture, high: int, wide: int) -> torch.Tensor:
    """``[2, h·w]``: row and column of a crop's tokens, spread over so many places, rounded half to even."""
    rows, columns = (
        torch.linspace(0, n - 1, k).round().long() for n, k in ((high, crop.h), (wide, crop.w))
    )
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij")).flatten(1)
