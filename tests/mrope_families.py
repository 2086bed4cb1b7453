# SPDX-License-Identifier: Apache-2.0
"""Random multimodal batches of every M-RoPE family, and transformers' own ``get_rope_index`` of them."""

import functools
import importlib
import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from mmkernels.ops.mrope_positions import FAMILIES, Family
from mmkernels.ops.mrope_positions.families import CANVAS, INDEX, SPANS, UNITS
from mmkernels.ops.mrope_positions.media import audio_tokens

CLASSES = {
    "qwen2_vl": "Qwen2VLModel",
    "qwen2_5_vl": "Qwen2_5_VLModel",
    "paddleocr_vl": "PaddleOCRVLModel",
    "ernie4_5_vl_moe": "Ernie4_5_VLMoeModel",
    "qwen3_vl": "Qwen3VLModel",
    "qwen3_vl_moe": "Qwen3VLMoeModel",
    "qwen3_5": "Qwen3_5Model",
    "qwen3_5_moe": "Qwen3_5MoeModel",
    "qwen4_exp": "Qwen4ExpModel",
    "cosmos3_omni": "Cosmos3OmniModel",
    "cosmos3_edge": "Cosmos3EdgeModel",
    "cohere_compass": "CohereCompassModel",
    "glm4v": "Glm4vModel",
    "glm4v_moe": "Glm4vMoeModel",
    "glm46v": "Glm46VModel",
    "glm_ocr": "GlmOcrModel",
    "glm_image": "GlmImageModel",
    "hunyuan_vl": "HunYuanVLModel",
    "hy_v4_vl": "HYV4VLModel",
    "minicpmv4_7": "MiniCPMV4_7Model",
    "qwen2_5_omni": "Qwen2_5OmniThinkerForConditionalGeneration",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration",
    "qwen3_omni_moe_talker": "Qwen3OmniMoeTalkerForConditionalGeneration",
}
MARKERS = {
    "slice_start_id": 901,
    "slice_end_id": 902,
    "image_start_id": 903,
    "image_end_id": 904,
    "newline_id": 905,
}


@functools.cache
def model_of(name: str) -> Any:
    """transformers' class with its default config and no weights: all that ``get_rope_index`` asks for."""
    folder = name.removesuffix("_talker")
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    kind = getattr(module, CLASSES[name])
    model = kind.__new__(kind)
    config = kind.config_class()
    config = getattr(config, "thinker_config", config)
    if name == "minicpmv4_7":
        for key, value in {**MARKERS, "image_token_id": 906, "video_token_id": 907}.items():
            setattr(config, key, value)
    if name == "hunyuan_vl":
        rope = {**(config.text_config.rope_parameters or {}), "mrope_section": [16, 16, 16, 16]}
        config.text_config.rope_parameters = rope
    if "omni" in name and name != "cosmos3_omni":
        config.vision_start_token_id = 151652
        object.__setattr__(model, "spatial_merge_size", 2)
        if name.endswith("_talker"):  # transformers reads it, but the talker's config has none
            config.audio_config = SimpleNamespace(n_window=50)
    object.__setattr__(model, "config", config)
    return model


def row_of(name: str) -> Family:
    """The table's row; MiniCPM-V has no default token ids."""
    row = FAMILIES[name]
    if name != "minicpmv4_7":
        return row
    return row._replace(
        slice_start_id=901, slice_end_id=902, start_id=903, end_id=904, newline_id=905,
        image_token_id=906, video_token_id=907,
    )  # fmt: skip


@dataclass
class Batch:
    """Samples as lists of (token, type), and what they stand for."""

    row: Family
    samples: list[list[tuple[int, int]]] = field(default_factory=list)
    images: list[list[int]] = field(default_factory=list)
    videos: list[list[int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    audios: list[int] = field(default_factory=list)
    per_sample: list[int] = field(default_factory=list)
    audio_in_video: bool = False


def _text(rng: random.Random, at_least: int = 0, at_most: int = 6) -> list[tuple[int, int]]:
    return [(rng.randrange(3, 15), 0) for _ in range(rng.randint(at_least, at_most))]


def _sides(rng: random.Random) -> tuple[int, int]:
    return rng.randint(1, 5), rng.randint(1, 5)


def _run_image(rng: random.Random, batch: Batch) -> list[tuple[int, int]]:
    row, (h, w) = batch.row, _sides(rng)
    m = row.spatial_merge_size
    t = rng.choice((1, 1, 1, 2)) if row.advance != INDEX else 1
    batch.images.append([t, h * m, w * m])
    extra = rng.choice((0, 2)) if row.advance == INDEX else 0
    return [(row.image_token_id, 1)] * (t * h * (w + row.newline) + extra)


def _run_video(rng: random.Random, batch: Batch) -> list[tuple[int, int]]:
    row, (h, w) = batch.row, _sides(rng)
    m, t = row.spatial_merge_size, rng.randint(1, 4)
    batch.videos.append([t * row.temporal_merge, h * m, w * m])
    batch.seconds.append(rng.choice((0.04, 0.1, 0.5, 1.0, 1.7, 2.0, rng.random() * 3)))
    of_glm = row.video_start_id >= 0
    token = (row.image_token_id if of_glm else row.video_token_id, 2)
    if not row.frames:
        return [token] * (t * h * (w + row.newline))
    frames = [x for _ in range(t) for x in [*_text(rng, 1, 4), *[token] * (h * w)]]
    return [(row.video_start_id, 0), *frames, (row.video_end_id, 0)] if of_glm else frames


def _runs(rng: random.Random, batch: Batch) -> list[tuple[int, int]]:
    parts = [_text(rng)]
    for _ in range(rng.choice((0, 1, 2, 4))):
        draw = _run_image if rng.random() < 0.6 or batch.row.advance == INDEX else _run_video
        before = parts[-1][-1][1] if parts[-1] else 0
        piece = draw(rng, batch)
        parts += [_text(rng, 1), piece] if before else [piece]
        parts.append(_text(rng) if rng.random() < 0.7 else _text(rng, 1))
        if not parts[-1]:
            parts.pop()
    return [x for p in parts for x in p] or _text(rng, 1)


def _spans(rng: random.Random, batch: Batch) -> list[tuple[int, int]]:
    row, parts, count = batch.row, [*_text(rng)], rng.randint(0, 3)
    for _ in range(count):
        h, w = _sides(rng)
        batch.images.append([1, h, w])
        parts += [(row.start_id, 0), *[(167855, 1)] * (h * w), (row.end_id, 0), *_text(rng)]
    to_come = rng.randint(0, 2)
    batch.images += [[1, *_sides(rng)] for _ in range(to_come)]
    batch.per_sample.append(count + to_come)
    return [*parts, (row.start_id, 0)]


def _units(rng: random.Random, batch: Batch) -> list[tuple[int, int]]:
    row, parts = batch.row, _text(rng)
    end, bos, sound = (16, 0), (row.start_id, 0), (row.audio_start_id, 0)
    for _ in range(rng.choice((0, 1, 2, 3))):
        kind = rng.choice(("image", "audio", "both" if batch.audio_in_video else "video"))
        h, w = _sides(rng)
        if kind in ("audio", "both"):
            batch.audios.append(rng.randint(8, 400))
            heard = [(row.audio_token_id, 3)] * audio_tokens(batch.audios[-1], row.audio_window)
        if kind == "image":
            batch.images.append([1, 2 * h, 2 * w])
            parts += [bos, *[(row.image_token_id, 1)] * (h * w), end]
        elif kind == "audio":
            parts += [sound, *heard, end]
        else:
            t = rng.randint(1, 6)
            batch.videos.append([t, 2 * h, 2 * w])
            batch.seconds.append(rng.choice((0.5, 1.0, 2.0, 3.0, rng.random() * 5)))
            seen = [(row.video_token_id, 2)] * (t * h * w)
            if kind == "video":
                parts += [bos, *seen, end]
            else:  # a video's first token comes first, whatever the order of the others
                mixed = [*seen[1:], *heard]
                rng.shuffle(mixed)
                parts += [bos, sound, seen[0], *mixed, end, end]
        parts += _text(rng)
    return parts or _text(rng, 1)


def _canvas(rng: random.Random, batch: Batch) -> list[tuple[int, int]]:
    row, parts = batch.row, _text(rng)
    m = row.spatial_merge_size
    newline = (row.newline_id, 0)
    for _ in range(rng.randint(0, 3)):
        kind = rng.choice((1, 1, 2))
        token = (row.image_token_id if kind == 1 else row.video_token_id, kind)
        grids = batch.images if kind == 1 else batch.videos
        for _ in range(rng.randint(1, 3)):
            h, w = _sides(rng)
            grids.append([h * m, w * m])
            parts += [(row.start_id, 0), *[token] * (h * w), (row.end_id, 0)]
            rows, columns = (rng.randint(1, 3), rng.randint(1, 3)) if rng.random() < 0.5 else (0, 0)
            h, w = _sides(rng)
            for y in range(rows):
                for _ in range(columns):
                    high, wide = (h, w) if rng.random() < 0.8 else _sides(rng)
                    grids.append([high * m, wide * m])
                    parts += [
                        (row.slice_start_id, 0),
                        *[token] * (high * wide),
                        (row.slice_end_id, 0),
                    ]
                if y + 1 < rows:
                    parts.append(newline)
            parts += rng.choice(([], [newline], [newline] * 2))
        parts += _text(rng)
    return parts or _text(rng, 1)


def draw(rng: random.Random, name: str) -> Batch:
    """A batch of 1 to 4 samples: text only, images, videos, audio."""
    batch = Batch(row_of(name), audio_in_video=rng.random() < 0.5)  # of every video, or none
    for _ in range(rng.randint(1, 4)):
        scan = batch.row.scan
        make = {SPANS: _spans, CANVAS: _canvas}.get(scan, _runs)
        batch.samples.append(_units(rng, batch) if scan == UNITS else make(rng, batch))
    return batch


def draw_one(rng: random.Random, name: str) -> Batch:
    """A batch of one sample."""
    while len((batch := draw(rng, name)).samples) != 1:
        pass
    return batch


def joined(batches: list[Batch]) -> Batch:
    """The samples of several batches in one."""
    whole = Batch(batches[0].row)
    for batch in batches:
        for name in ("samples", "images", "videos", "seconds", "audios", "per_sample"):
            getattr(whole, name).extend(getattr(batch, name))
    return whole


def media(batch: Batch) -> dict[str, Any]:
    """Grids, seconds and lengths as arguments of ``mrope_positions``."""
    row, found = batch.row, {}
    for key, rows in (("image_grid_thw", batch.images), ("video_grid_thw", batch.videos)):
        found[key] = torch.tensor(rows) if rows else None
    if batch.videos and row.rate:
        found["second_per_grid_ts"] = torch.tensor(batch.seconds)
    if batch.audios:
        found["audio_seqlens"] = torch.tensor(batch.audios)
    if row.pictures_per_sample and batch.images:
        found["images_per_sample"] = torch.tensor(batch.per_sample)
    return found


def padded(rng: random.Random, batch: Batch, side: str) -> dict[str, torch.Tensor]:
    """``input_ids``, ``mm_token_type_ids``, ``attention_mask``: padding left, right or between ("holes")."""
    longest = max(map(len, batch.samples))
    rows = []
    for sample in batch.samples:
        row = [(*x, 1) for x in sample]
        padding = [(0, 0, 0)] * (longest - len(row) + (side == "holes"))
        if side == "holes":
            for x in padding:
                row.insert(rng.randint(0, len(row)), x)
        else:
            row = padding + row if side == "left" else row + padding
        rows.append(row)
    ids, types, mask = torch.tensor(rows).unbind(-1)
    return {"input_ids": ids, "mm_token_type_ids": types.int(), "attention_mask": mask}


def packed(batch: Batch) -> dict[str, torch.Tensor]:
    ids, types = torch.tensor([x for sample in batch.samples for x in sample]).unbind(-1)
    ends = torch.tensor([0, *(len(s) for s in batch.samples)], dtype=torch.int32).cumsum(0)
    return {"input_ids": ids, "mm_token_type_ids": types, "cu_seqlens": ends.int()}


def theirs(
    name: str, tokens: dict[str, torch.Tensor], batch: Batch
) -> tuple[torch.Tensor, torch.Tensor]:
    """What transformers says."""
    row, given, tokens = batch.row, media(batch), dict(tokens)
    if row.scan in (SPANS, UNITS):
        tokens.pop("mm_token_type_ids", None)
    if row.scan == UNITS:
        given["second_per_grids"] = given.pop("second_per_grid_ts", None)
        given["use_audio_in_video"] = batch.audio_in_video
    if row.scan == CANVAS:
        given = {
            "target_sizes": given["image_grid_thw"],
            "target_sizes_videos": given["video_grid_thw"],
        }
    if row.advance == INDEX:
        given.pop("video_grid_thw")
    return model_of(name).get_rope_index(**tokens, **given)
