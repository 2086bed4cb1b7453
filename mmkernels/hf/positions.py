# SPDX-License-Identifier: Apache-2.0
"""``get_rope_index`` of the M-RoPE families as ``mrope_positions``."""

import functools
import inspect
from typing import Any

import torch
from torch import nn

from mmkernels import mrope_positions
from mmkernels.hf.row import Found
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
    method = inspect.getattr_static(type(module), METHOD, None)
    if method is None:
        return None
    kind = getattr(getattr(module, "config", None), "model_type", "")
    kind = kind if kind in FAMILIES else kind.removesuffix("_thinker").removesuffix("_talker")
    if kind not in FAMILIES:
        return f"model_type {kind!r} is not a family of mrope_positions"
    if getattr(method, "__module__", "") != f"transformers.models.{kind}.modeling_{kind}":
        return f"its {METHOD} is not that of transformers' {kind}"
    try:
        row = family_of(module.config)._replace()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return f"its config lacks what the family needs: {error}"
    probe = (
        functools.partial(_one_image, row) if row.scan == RUNS and row.image_token_id >= 0 else None
    )
    names = tuple(inspect.signature(method).parameters)[1:]
    run = functools.partial(_positions, row, names)
    return Found("mrope_positions", run, probe, method=METHOD, pure=True)


def _positions(
    row: Family, names: tuple[str, ...], module: nn.Module, original: Any, *args: Any, **kwargs: Any
) -> Any:  # fmt: skip
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    named = {RENAMED.get(k, k): v for k, v in given.items()}
    taken = {k: named[k] for k in TAKEN if named.get(k) is not None}
    if "input_ids" not in taken:
        return original(*args, **kwargs)
    return mrope_positions(**taken, family=row)


def _one_image(row: Family, module: nn.Module) -> tuple[Any, ...]:
    """Two samples, text and an image of 2×3 merged tokens each."""
    m = row.spatial_merge_size
    picture = 2 * (3 + row.newline) + (2 if row.newline else 0)
    types = torch.tensor([[0, 0, *[1] * picture, 0]] * 2)
    ids = torch.where(types == 1, row.image_token_id, 7)
    return ids, types, torch.tensor([[1, 2 * m, 3 * m]] * 2)
