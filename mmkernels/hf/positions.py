# SPDX-License-Identifier: Apache-2.0
"""``get_rope_index`` of the M-RoPE families as ``mrope_positions``."""

import functools
import inspect
from typing import Any

import torch
from torch import nn

from mmkernels import mrope_positions
from mmkernels.hf.row import Found, class_of
from mmkernels.ops.mrope_positions import FAMILIES, Family, family_of
from mmkernels.ops.mrope_positions.families import RUNS

METHOD = "get_rope_index"
RENAMED = {
    "target_sizes": "image_grid_thw", "target_sizes_videos": "video_grid_thw", "second_per_grids": "second_per_grid_ts",
}  # fmt: skip
TAKEN = (
    "input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts", "audio_seqlens",
    "images_per_sample", "attention_mask",
)  # fmt: skip


def rope_index(module: nn.Module) -> Found | str | None:
    """The model's own, of a family in the table; one that a subclass changed is left alone."""
    method = inspect.getattr_static(class_of(module), METHOD, None)
    if method is None:
        return None
    kind = getattr(getattr(module, "config", None), "model_type", "")
    if kind not in FAMILIES:
        return f"model_type {kind!r} is not a family of mrope_positions"
    folder = kind.removesuffix("_thinker").removesuffix("_talker")
    if getattr(method, "__module__", "") != f"transformers.models.{folder}.modeling_{folder}":
        return f"its {METHOD} is not that of transformers' {folder}"
    try:
        row = family_of(module.config)._replace()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return f"its config lacks what the family needs: {error}"
    names = tuple(inspect.signature(method).parameters)[1:]
    run = functools.partial(_positions, row, names)
    by_type = row.scan == RUNS and row.image_token_id >= 0
    probe = functools.partial(_batch, row, names) if by_type else None
    return Found("mrope_positions", run, probe, method=METHOD, pure=True)


def _positions(
    row: Family, names: tuple[str, ...], module: nn.Module, original: Any, *args: Any, **kwargs: Any
) -> Any:  # fmt: skip
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    named = {RENAMED.get(k, k): v for k, v in given.items()}
    taken = {k: named[k] for k in TAKEN if named.get(k) is not None}
    seconds = taken.get("second_per_grid_ts")
    rounded = isinstance(seconds, torch.Tensor) and seconds.dtype in (torch.bfloat16, torch.float16)
    if (
        "input_ids" not in taken or rounded
    ):  # a processor's floats cast with the pixels: the model's own rounding
        return original(*args, **kwargs)
    try:
        return mrope_positions(**taken, family=row)
    except ValueError:  # the model's own takes rows too many, of an image that the mask hides
        return original(*args, **kwargs)


def _batch(row: Family, names: tuple[str, ...], module: nn.Module) -> tuple[Any, ...]:
    """Text, a picture, text and a film; and a padded sample with a picture: as arguments in the method's order."""
    m, image, text = row.spatial_merge_size, row.image_token_id, (7, 0)
    picture = [(image, 1)] * (2 * (3 + row.newline))
    film, of_glm = [], row.video_start_id >= 0
    if "video_grid_thw" in names:
        frame = [(image if of_glm else row.video_token_id, 2)] * 4
        film = [text, *frame, text, *frame] if row.frames else (frame + frame[:2] * row.newline) * 2
        film = [(row.video_start_id, 0), *film, (row.video_end_id, 0)] if of_glm else film
    first = [text, text, *picture, text, *film, text]
    second = [text, *picture, text]
    padding = [(0, 0)] * (len(first) - len(second))
    tokens = torch.tensor([first, [*padding, *second]])
    mask = torch.ones_like(tokens[..., 0])
    mask[1, : len(padding)] = 0
    values = {
        "input_ids": tokens[..., 0], "mm_token_type_ids": tokens[..., 1].int(), "attention_mask": mask,
        "image_grid_thw": torch.tensor([[1, 2 * m, 3 * m]] * 2),
        "video_grid_thw": torch.tensor([[2 * row.temporal_merge, 2 * m, 2 * m]]) if film else None,
        "second_per_grid_ts": torch.tensor([1.5]) if film else None,
    }  # fmt: skip
    return tuple(values.get(name) for name in names if name in values)
