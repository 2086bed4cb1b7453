# SPDX-License-Identifier: Apache-2.0
"""Positions of the omni models: a start token, pictures or audio, an end token; audio in video interleaved."""

import itertools
from collections.abc import Iterator

import torch

from mmkernels import checks
from mmkernels.ops.mrope_positions.families import OP, Family
from mmkernels.ops.mrope_positions.media import IMAGE, VIDEO, Media, Sample
from mmkernels.ops.mrope_positions.pieces import grid, ramp

AUDIO, BOTH = 3, 4


def units(sample: Sample, media: Media, rule: Family) -> Iterator[torch.Tensor]:
    """Text and units in turn. Each sum is one of transformers', so that float32 rounds alike."""
    at: int | torch.Tensor = 0
    ids, first, done = sample.ids, 0, 0
    while first < len(ids):
        kind = _kind(ids, first, rule)
        if not kind:
            _no_stray(sample, first, rule)
            first += 1
            continue
        yield ramp(at, first - done)
        at = at + (first - done)
        markers = 2 if kind == BOTH else 1
        yield from _markers(at, markers, rule)
        at = at + (1 if rule.twin_markers else markers)
        pieces, length = _content(kind, sample, first + markers, media, rule, at)
        yield from pieces
        at = pieces[-1].max() + 1
        yield from _markers(at, markers, rule)
        at = at + (markers - 1 if not rule.twin_markers else 0) + 1
        first = done = first + 2 * markers + length
        if first > len(ids):
            checks.fail(
                OP, sample.name, "its end", "an end token after every image, video and audio"
            )
    yield ramp(at, len(ids) - done)


def _kind(ids: list[int], first: int, rule: Family) -> int:
    """What begins at this token: IMAGE, VIDEO, AUDIO, BOTH (a video with its audio), or 0: text."""
    after = ids[first + 1] if first + 1 < len(ids) else -2
    if ids[first] == rule.start_id:
        kinds = {rule.image_token_id: IMAGE, rule.video_token_id: VIDEO, rule.audio_start_id: BOTH}
        return kinds.get(after, 0)
    return AUDIO if ids[first] == rule.audio_start_id and after == rule.audio_token_id else 0


def _no_stray(sample: Sample, at: int, rule: Family) -> None:
    if sample.ids[at] in (rule.image_token_id, rule.video_token_id, rule.audio_token_id):
        expected = "image, video and audio tokens only after their start token"
        checks.fail(OP, sample.name, f"token {sample.ids[at]} at {at}", expected)


def _markers(at: int | torch.Tensor, count: int, rule: Family) -> Iterator[torch.Tensor]:
    yield from [ramp(at, 1)] * count if rule.twin_markers else [ramp(at, count)]


def _content(
    kind: int, sample: Sample, first: int, media: Media, rule: Family, at: int | torch.Tensor
) -> tuple[list[torch.Tensor], int]:
    """The pieces between the markers, in token order, and how many tokens they are."""
    token = rule.image_token_id if kind == IMAGE else rule.video_token_id
    of_kind = {AUDIO: {rule.audio_token_id}, BOTH: {token, rule.audio_token_id}}.get(kind, {token})
    inside = list(itertools.takewhile(lambda i: i in of_kind, sample.ids[first:]))
    heard = inside.count(rule.audio_token_id)
    sounds = ramp(at, heard).expand(3, -1)
    if kind in (AUDIO, BOTH):
        media.next_audio(sample, heard)
    if kind == AUDIO:
        return [sounds], heard
    picture = media.next(IMAGE if kind == IMAGE else VIDEO, sample, len(inside) - heard)
    frames = grid(picture.time, picture.h, picture.w) + at
    if kind != BOTH:
        return [frames], len(inside)
    mixed = _by_chunk if rule.chunk_seconds else _by_position
    return mixed(frames, sounds, at, rule), len(inside)


def _by_position(
    frames: torch.Tensor, sounds: torch.Tensor, at: int | torch.Tensor, rule: Family
) -> list[torch.Tensor]:
    """Merged by position in time, video first where they are equal; the last piece is what is left of one."""
    v = a = 0
    found = []
    while v < frames.shape[1] and a < sounds.shape[1]:
        if frames[0, v] <= sounds[0, a]:
            found.append(frames[:, v : v + 1])
            v += 1
        else:
            found.append(sounds[:, a : a + 1])
            a += 1
    return [*found, *(rest for rest in (frames[:, v:], sounds[:, a:]) if rest.shape[1])]


def _by_chunk(
    frames: torch.Tensor, sounds: torch.Tensor, at: int | torch.Tensor, rule: Family
) -> list[torch.Tensor]:
    """A chunk of video, the same seconds of audio, and so on."""
    chunk = rule.rate * rule.chunk_seconds
    of_video, of_audio = (_chunks(x, int(at), chunk) for x in (frames, sounds))
    found: list[torch.Tensor] = []
    for i in range(max(len(of_video), len(of_audio))):
        found += of_video[i : i + 1] + of_audio[i : i + 1]
    return found


def _chunks(positions: torch.Tensor, at: int, chunk: int) -> list[torch.Tensor]:
    """A chunk ends before the first token past its time; a token ends at most one, as in transformers."""
    found: list[torch.Tensor] = []
    start = 0
    for i, time in enumerate((positions[0] - at).tolist()):
        if time >= (len(found) + 1) * chunk:
            found.append(positions[:, start:i])
            start = i
    return [*found, positions[:, start:]]
