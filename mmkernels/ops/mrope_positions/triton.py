# SPDX-License-Identifier: Apache-2.0
"""Multimodal positions on CUDA, of the families whose pictures are runs of token types: two launches, no sync.

A program takes a sample, block after block, and carries what its tokens have added up to. The first kernel counts each
sample's pictures; the second so knows where a sample's rows of the grid begin. Values are not checked, which would be a
sync: a grid that does not fit its tokens gives wrong positions, never a read out of range.

The other six (spans, units, a canvas, numbered pictures) go to the CPU kernel and back, which waits for the GPU.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from mmkernels.ops.mrope_positions import reference
from mmkernels.ops.mrope_positions.families import BLOCK, INDEX, RUNS, Family

_TOKENS = 1024  # a block's
_BEFORE = 64  # samples whose counts are added up at once


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _tokens(types, mask, at, begin, end, HAS_MASK: tl.constexpr):
    """Whether tokens are there and kept, and their types."""
    kept = (at >= begin) & (at < end)
    if HAS_MASK:
        kept = kept & (tl.load(mask + at, mask=kept, other=0) != 0)
    return kept, tl.load(types + at, mask=kept, other=0).to(tl.int64)


@triton.jit
def _starts(types, mask, at, begin, end, last, HAS_MASK: tl.constexpr):
    """Kept tokens, types, which begin a run, and place and type of the last kept one, as 4·place + type."""
    kept, kind = _tokens(types, mask, at, begin, end, HAS_MASK)
    there, before = _tokens(types, mask, at - 1, begin, end, HAS_MASK)
    seen = tl.where(there, (at - begin) * 4 + before, -1)
    seen = tl.maximum(tl.associative_scan(seen, 0, _larger), last)
    start = kept & ((seen < 0) | (kind != seen % 4))
    return kept, kind, start, tl.max(seen, 0)


@triton.jit
def _bounds(cu_seqlens, sample, L, PACKED: tl.constexpr):
    if PACKED:
        return tl.load(cu_seqlens + sample).to(tl.int64), tl.load(cu_seqlens + sample + 1).to(
            tl.int64
        )
    return sample * L, sample * L + L


@triton.jit
def _count_kernel(
    types, mask, cu_seqlens, counts, L,
    HAS_MASK: tl.constexpr, PACKED: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    begin, end = _bounds(cu_seqlens, sample, L, PACKED)
    images, videos, last = sample * 0, sample * 0, sample * 0 - 1
    for block in range(begin, end, TOKENS):
        at = block + tl.arange(0, TOKENS)
        _, kind, start, last = _starts(types, mask, at, begin, end, last, HAS_MASK)
        images += tl.sum((start & (kind == 1)).to(tl.int64), 0)
        videos += tl.sum((start & (kind == 2)).to(tl.int64), 0)
    tl.store(counts + 2 * sample, images)
    tl.store(counts + 2 * sample + 1, videos)


@triton.jit
def _row_of(ends, n, i, STEPS: tl.constexpr):
    """The first row whose end is beyond i."""
    low, high = i * 0, i * 0 + n
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        beyond = tl.load(ends + middle, mask=(low < high) & (middle < n), other=0) > i
        high = tl.where((low < high) & beyond, middle, high)
        low = tl.where((low < high) & ~beyond, middle + 1, low)
    return low


@triton.jit
def _side(grid, n, row, axis: tl.constexpr, wanted):
    """A side of the grid, 1 where there is none."""
    inside = wanted & (row >= 0) & (row < n)
    return tl.load(grid + 3 * row + axis, mask=inside, other=1).to(tl.int64)


@triton.jit
def _fill_kernel(
    types, mask, cu_seqlens, counts, image_grid, video_grid, frame_ends, seconds, out, deltas,
    N, L, images, videos, merge, newline, rate, pad,
    FRAMES: tl.constexpr, IN_BLOCKS: tl.constexpr, TEMPORAL: tl.constexpr, HAS_SECONDS: tl.constexpr,
    HAS_MASK: tl.constexpr, PACKED: tl.constexpr, STEPS: tl.constexpr, TOKENS: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    begin, end = _bounds(cu_seqlens, sample, L, PACKED)
    image, video = sample * 0, sample * 0  # pictures before this block
    for before in range(0, sample, BEFORE):
        s = before + tl.arange(0, BEFORE)
        image += tl.sum(tl.load(counts + 2 * s, mask=s < sample, other=0), 0)
        video += tl.sum(tl.load(counts + 2 * s + 1, mask=s < sample, other=0), 0)
    last, run_first, largest = sample * 0 - 1, sample * 0, sample * 0 - 1
    tokens, words, advance = sample * 0, sample * 0, sample * 0
    for block in range(begin, end, TOKENS):
        at = block + tl.arange(0, TOKENS)
        kept, kind, start, last = _starts(types, mask, at, begin, end, last, HAS_MASK)
        is_image, is_video, word = kept & (kind == 1), kept & (kind == 2), kept & (kind == 0)
        order = tokens + tl.cumsum(kept.to(tl.int64), 0) - 1
        begun = tl.where(start, order, -1)
        begun = tl.maximum(tl.associative_scan(begun, 0, _larger), run_first)
        image_at = image + tl.cumsum((start & is_image).to(tl.int64), 0) - 1
        video_at = video + tl.cumsum((start & is_video).to(tl.int64), 0) - 1
        row = _row_of(frame_ends, videos, video_at, STEPS) if FRAMES else video_at
        t = tl.where(is_video, _side(video_grid, videos, row, 0, is_video) // TEMPORAL, 1)
        t = tl.where(is_image, _side(image_grid, images, image_at, 0, is_image), t)
        h = _side(image_grid, images, image_at, 1, is_image)
        h = tl.where(is_video, _side(video_grid, videos, row, 1, is_video), h) // merge
        w = _side(image_grid, images, image_at, 2, is_image)
        w = tl.where(is_video, _side(video_grid, videos, row, 2, is_video), w) // merge + newline
        h, w = tl.maximum(h, 1), tl.maximum(w, 1)
        side = tl.maximum(h, w)
        step = tl.where(is_image | is_video, side * t if IN_BLOCKS else side, 0)
        passed = advance + tl.cumsum(tl.where(start, step, 0), 0)
        spoken = words + tl.cumsum(word.to(tl.int64), 0)
        base = passed - step + spoken - word.to(tl.int64)
        inside = order - begun  # place in the picture
        frame, y, x = inside // (h * w), inside % (h * w) // w, inside % w
        behind = frame * side if IN_BLOCKS else frame * 0
        time = frame
        if HAS_SECONDS:
            interval = tl.load(seconds + row, mask=is_video & (row < videos), other=1.0)
            time = tl.where(is_video, (frame.to(tl.float32) * interval).to(tl.int64), frame)
        else:
            time = tl.where(is_video, frame * rate, frame)
        if IN_BLOCKS:
            time = behind
        seen = is_image | is_video
        p0 = tl.where(seen, base + time, base)
        p1 = tl.where(seen, base + behind + y, base)
        p2 = tl.where(seen, base + behind + x, base)
        here = at < end
        rows = out
        if PACKED:
            tl.store(out + at, order, mask=here)
            rows = out + N
        tl.store(rows + at, tl.where(kept, p0, pad), mask=here)
        tl.store(rows + N + at, tl.where(kept, p1, pad), mask=here)
        tl.store(rows + 2 * N + at, tl.where(kept, p2, pad), mask=here)
        most = tl.where(kept, tl.maximum(p0, tl.maximum(p1, p2)), -1)
        largest = tl.maximum(largest, tl.max(most, 0))
        run_first = tl.max(begun, 0)
        tokens += tl.sum(kept.to(tl.int64), 0)
        words += tl.sum(word.to(tl.int64), 0)
        advance += tl.sum(tl.where(start, step, 0), 0)
        image += tl.sum((start & is_image).to(tl.int64), 0)
        video += tl.sum((start & is_video).to(tl.int64), 0)
    tl.store(deltas + sample, tl.where(tokens > 0, largest + 1 - tokens, 0))


def _types_of(
    input_ids: torch.Tensor,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    rule: Family,
) -> torch.Tensor:
    """Types by token id; between a video's two tokens an image token is a video's."""
    types = (input_ids == rule.image_token_id) + 2 * (input_ids == rule.video_token_id)
    if rule.video_start_id < 0:
        return types
    change = (input_ids == rule.video_start_id).long() - (input_ids == rule.video_end_id).long()
    change = change if mask is None else change * (mask != 0)
    inside = change.cumsum(-1)
    if cu_seqlens is not None:  # what was open before a sample began is not open in it
        flat, ends = inside.flatten(), cu_seqlens.long()
        sample = torch.searchsorted(
            ends[1:], torch.arange(len(flat), device=flat.device), right=True
        )
        before = torch.nn.functional.pad(flat, (1, 0))[ends[sample]]
        inside = (flat - before).view_as(inside)
    return torch.where((types == 1) & (inside > 0), 2, types)


def _through_cpu(args: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    device = args[0].device
    op = reference.mrope_positions if device.type == "cpu" else torch.ops.mmkernels.mrope_positions
    found = op(*(a.cpu() if isinstance(a, torch.Tensor) else a for a in args))
    return found[0].to(device), found[1].to(device)


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
    """As ``reference.mrope_positions``, in two launches."""
    rule = Family(*family)
    if rule.scan != RUNS or rule.advance == INDEX:
        return _through_cpu(
            (input_ids, mm_token_type_ids, attention_mask, cu_seqlens, image_grid, video_grid, seconds,
             audio_seqlens, images_per_sample, family)
        )  # fmt: skip
    packed, N, L = cu_seqlens is not None, input_ids.numel(), input_ids.shape[-1]
    samples = 1 if input_ids.dim() == 1 else input_ids.shape[0]
    samples = samples if cu_seqlens is None else cu_seqlens.shape[0] - 1
    out = input_ids.new_empty((3 + packed, *input_ids.shape), dtype=torch.int64)
    deltas = input_ids.new_empty((samples, 1), dtype=torch.int64)
    if mm_token_type_ids is None:
        mm_token_type_ids = _types_of(input_ids, attention_mask, cu_seqlens, rule)
    types, mask = mm_token_type_ids.contiguous(), attention_mask
    mask = None if mask is None else mask.to(torch.uint8).contiguous()
    images, videos = (0 if g is None else g.shape[0] for g in (image_grid, video_grid))
    ends = video_grid[:, 0].cumsum(0) if rule.frames and video_grid is not None else None
    counts = input_ids.new_empty((samples, 2), dtype=torch.int64)
    grids = [
        counts if g is None else g.contiguous() for g in (image_grid, video_grid)
    ]  # of 0 rows none is read
    meta = {"HAS_MASK": mask is not None, "PACKED": packed, "TOKENS": _TOKENS, "num_warps": 8}
    if samples:
        _count_kernel[(samples,)](types, mask, cu_seqlens, counts, L, **meta)
        _fill_kernel[(samples,)](
            types, mask, cu_seqlens, counts, *grids, ends, seconds, out, deltas, N, L, images, videos,
            rule.spatial_merge_size, rule.newline, max(rule.rate, 1), rule.pad,
            FRAMES=ends is not None, IN_BLOCKS=rule.advance == BLOCK, TEMPORAL=rule.temporal_merge,
            HAS_SECONDS=seconds is not None, STEPS=videos.bit_length() + 1, BEFORE=_BEFORE, **meta,
        )  # fmt: skip
    return out, deltas
