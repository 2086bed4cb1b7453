# SPDX-License-Identifier: Apache-2.0
"""What the reference reads: tokens by sample, and the pictures and audio they stand for, one after the other."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from mmkernels import checks
from mmkernels.ops.mrope_positions.families import INDEX, OP, SPANS, UNITS, Family

TEXT, IMAGE, VIDEO = range(3)
_NAMES = {IMAGE: ("image", "image_grid_thw"), VIDEO: ("video", "video_grid_thw")}


class Sample(NamedTuple):
    """The tokens of a sample that are not padding."""

    number: int
    ids: list[int]
    types: list[int]

    @property
    def name(self) -> str:
        return f"input_ids of sample {self.number}"


class Picture(NamedTuple):
    """An image, a video or a frame: merged tokens along time, height and width; ``time`` of each frame."""

    t: int
    h: int
    w: int
    time: torch.Tensor
    number: int


def kept_tokens(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> Iterator[torch.Tensor]:
    """Of each sample the places of its tokens in the flattened ids."""
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        if ends[:1] != [0] or ends[-1] != input_ids.numel() or sorted(ends) != ends:
            expected = f"0 first, then never smaller, {input_ids.numel()} tokens last"
            checks.fail(OP, "cu_seqlens", ends, expected)
        for i in range(len(ends) - 1):
            yield torch.arange(ends[i], ends[i + 1])
        return
    L, samples = input_ids.shape[-1], 1 if input_ids.dim() == 1 else input_ids.shape[0]
    for b in range(samples):
        row = torch.arange(b * L, (b + 1) * L)
        yield row if attention_mask is None else row[attention_mask.view(samples, L)[b].cpu() != 0]


def types_of(ids: list[int], rule: Family) -> list[int]:
    """As a processor's ``create_mm_token_type_ids``: by token id, or by the span of a video an image token is in."""
    found, inside = [], 0
    for token in ids:
        if rule.video_start_id >= 0:
            inside += (token == rule.video_start_id) - (token == rule.video_end_id)
        kind = VIDEO if token == rule.video_token_id else TEXT
        if token == rule.image_token_id:
            kind = VIDEO if inside > 0 else IMAGE
        found.append(kind)
    return found


class Media:
    """Cursors over the rows of the grids; each picture is checked against its tokens as it is taken."""

    def __init__(
        self,
        rule: Family,
        samples: int,
        image_grid: torch.Tensor | None,
        video_grid: torch.Tensor | None,
        seconds: torch.Tensor | None,
        audio_seqlens: torch.Tensor | None,
        images_per_sample: torch.Tensor | None,
    ) -> None:
        self.rule = rule
        grids = {IMAGE: image_grid, VIDEO: video_grid}
        self.empty = image_grid is None and video_grid is None
        self.grids = {kind: None if g is None else g.tolist() for kind, g in grids.items()}
        for kind, rows in self.grids.items():
            self._check(kind, rows or [])
        self.order = {kind: self._pictures(kind, rows or []) for kind, rows in self.grids.items()}
        self.seconds = None if seconds is None else seconds.cpu()
        self.audio = None if audio_seqlens is None else audio_seqlens.tolist()
        self.per_sample = None if images_per_sample is None else images_per_sample.tolist()
        self.at, self.audio_at, self.number = {IMAGE: 0, VIDEO: 0}, 0, 0
        self._check_numbers(samples)

    def _check_numbers(self, samples: int) -> None:
        images, videos = (len(rows or []) for rows in self.grids.values())
        if self.per_sample is not None and self.rule.scan == SPANS:
            for n in self.per_sample:
                if not 0 <= n <= images:
                    checks.fail(OP, "images_per_sample", n, f"numbers of at most {images}")
            got = (len(self.per_sample), sum(self.per_sample))
            if got != (samples, images):
                expected = f"{samples} numbers, {images} rows of image_grid_thw in all"
                checks.fail(OP, "images_per_sample", "{} numbers, {} in all".format(*got), expected)
        if self.seconds is None:
            return
        for s in self.seconds.tolist():
            if not abs(s) < 1e9:
                checks.fail(OP, "second_per_grid_ts", s, "finite numbers")
        if self.grids[VIDEO] is not None and len(self.seconds) != videos:
            checks.fail(
                OP, "second_per_grid_ts", len(self.seconds), f"{videos} numbers, one a video"
            )

    def _check(self, kind: int, rows: list[list[int]]) -> None:
        m = self.rule.spatial_merge_size
        every = self.rule.temporal_merge if kind == VIDEO else 1
        for i, (t, h, w) in enumerate(rows):
            if min(t, h, w) < 1 or max(t, h, w) > 2**20 or h % m or w % m or t % every:
                expected = f"t, h, w from 1 to 2^20, h and w multiples of {m}, t of {every}"
                checks.fail(OP, f"{_NAMES[kind][1]}[{i}]", [t, h, w], expected)

    def _pictures(self, kind: int, rows: list[list[int]]) -> list[tuple[int, int, int, int]]:
        """t, h, w in tokens and the row, of every picture that has a run of tokens of its own."""
        m, found = self.rule.spatial_merge_size, []
        for i, (t, h, w) in enumerate(rows):
            t = t // self.rule.temporal_merge if kind == VIDEO else t
            times = t if kind == VIDEO and self.rule.frames else 1
            t = 1 if self.rule.advance == INDEX or times > 1 else t
            found += [(t, h // m, w // m + self.rule.newline, i)] * times
        return found

    def begin(self, sample: Sample, packed: bool) -> None:
        """Before a sample: packed ones start their pictures' numbers anew."""
        self.number = 0 if packed else self.number
        if self.rule.scan == SPANS:
            self.at[IMAGE] = sum((self.per_sample or [])[: sample.number])

    def has(self, kind: int) -> bool:
        return self.grids[kind] is not None

    def next(self, kind: int, sample: Sample, tokens: int, markers: int = 0) -> Picture:
        """The next picture of this kind, of ``tokens`` tokens, or ``markers`` more."""
        name, argument = _NAMES[kind]
        at, pictures = self.at[kind], self.order[kind]
        limit = len(pictures)
        if self.rule.scan == SPANS and self.per_sample:
            limit = min(limit, sum(self.per_sample[: sample.number + 1]))
        if at >= limit:
            rows = "None" if self.grids[kind] is None else f"{len(self.grids[kind] or [])} rows"
            expected = f"a row for every {name} (sample {sample.number} has one more)"
            checks.fail(OP, argument, rows, expected)
        t, h, w, row = pictures[at]
        if tokens - t * h * w not in (0, markers):
            grid = (self.grids[kind] or [])[row]
            expected = f"{t * h * w} {name} tokens in a row ({argument}[{row}] = {grid})"
            checks.fail(OP, sample.name, tokens, expected)
        self.at[kind] += 1
        self.number += 1
        return Picture(t, h, w, self._time(kind, t, row), self.number - 1)

    def _time(self, kind: int, t: int, row: int) -> torch.Tensor:
        step, rate = torch.arange(t), self.rule.rate
        seconds = self.seconds
        if self.rule.scan == UNITS and kind == IMAGE:
            time = step * rate
        elif self.rule.scan == UNITS:
            if seconds is None:
                checks.fail(OP, "second_per_grid_ts", "None", "one number a video")
            time = step * seconds[row].float() * rate
        elif kind == VIDEO and rate:
            time = step * (rate if seconds is None else seconds[row])
        else:
            time = step
        return time.float() if self.rule.fractional else time.long()

    def next_audio(self, sample: Sample, tokens: int) -> int:
        """Checks the tokens of the next audio."""
        at = self.audio_at
        if self.audio is None or at >= len(self.audio):
            got = "None" if self.audio is None else f"{len(self.audio)} numbers"
            expected = f"a number for every audio (sample {sample.number} has one more)"
            checks.fail(OP, "audio_seqlens", got, expected)
        self.audio_at, length = at + 1, self.audio[at]
        count = audio_tokens(length, self.rule.audio_window)
        if not 0 <= length < 2**31 or count < 1:
            checks.fail(OP, f"audio_seqlens[{at}]", length, "long enough for a token, below 2^31")
        if tokens != count:
            told = f"{count} audio tokens in a row (audio_seqlens[{at}] = {length})"
            checks.fail(OP, sample.name, tokens, told)
        return tokens

    def end(self) -> None:
        """Every row was taken, but for those of images yet to be generated."""
        if self.rule.pictures_per_sample or (self.rule.scan == UNITS and self.empty):
            return
        for kind, (name, argument) in _NAMES.items():
            if self.at[kind] != len(self.order[kind]):
                expected = f"as many as input_ids has {name}s, {self._rows_taken(kind)} rows"
                checks.fail(OP, argument, f"{len(self.grids[kind] or [])}", expected)
        if self.rule.scan == UNITS and self.audio is not None and self.audio_at != len(self.audio):
            expected = f"as many as input_ids has audios, {self.audio_at} numbers"
            checks.fail(OP, "audio_seqlens", len(self.audio), expected)

    def _rows_taken(self, kind: int) -> int:
        taken = self.order[kind][: self.at[kind]]
        return len({row for *_, row in taken})


def audio_tokens(length: int, window: int) -> int:
    """What the encoder's convolutions leave of so many frames."""
    if not window:
        return ((length - 1) // 2 + 1 - 2) // 2 + 1
    whole, rest = divmod(length, window * 2)
    return ((((rest - 1) // 2 + 1) - 1) // 2 + 1 - 1) // 2 + 1 + whole * 13
