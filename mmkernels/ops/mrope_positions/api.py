# SPDX-License-Identifier: Apache-2.0
"""The public ``mrope_positions``: what it computes, and its checks."""

from collections.abc import Sequence

import torch

from mmkernels import checks
from mmkernels.ops.mrope_positions.families import CANVAS, OP, RUNS, Family, family_named
from mmkernels.ops.mrope_positions.op import FORWARD

_INTEGERS = (torch.int64, torch.int32)
Grid = torch.Tensor | Sequence[Sequence[int]]


def mrope_positions(
    input_ids: torch.Tensor,
    mm_token_type_ids: torch.Tensor | None = None,
    *,
    family: str | Family,
    image_token_id: int | None = None,
    video_token_id: int | None = None,
    image_grid_thw: Grid | None = None,
    video_grid_thw: Grid | None = None,
    second_per_grid_ts: torch.Tensor | Sequence[float] | None = None,
    audio_seqlens: torch.Tensor | None = None,
    images_per_sample: torch.Tensor | None = None,
    spatial_merge_size: int | None = None,
    attention_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions along time, height and width of every token of a multimodal batch: ``get_rope_index`` as one op.

    Text counts 0, 1, 2, … on every axis. A picture of t×h×w merged tokens that begins at position p has
    ``p + (time(k), y, x)`` at its frame k, row y, column x, and text goes on at ``p + max(h, w)``; families differ in
    time, in that step and in what a picture is (``families.py``, a row each).

    Args:
        input_ids: ``[B, L]``, or ``[T]`` or ``[1, T]`` with ``cu_seqlens``; int64 or int32.
        mm_token_type_ids: As input_ids, integers: 0 text, 1 image, 2 video. None: told by the family's token ids,
            by which GLM-Image and the omni models always go.
        family: transformers' ``model_type``, or a row of numbers, ``family_of(model.config)``, for a checkpoint whose
            token ids or rates are not its config class's defaults.
        image_token_id, video_token_id: Instead of the family's.
        image_grid_thw: ``[images, 3]`` (or lists) patches along t, h, w, not merged. MiniCPM-V: ``target_sizes``,
            ``[crops, 2]``.
        video_grid_thw: ``[videos, 3]`` (``[crops, 2]``).
        second_per_grid_ts: Seconds between merged frames of each video (Qwen2.5-VL, the omni models).
        audio_seqlens: Frames of each audio before the encoder (the omni models; audio in video is found by its tokens).
        images_per_sample: GLM-Image: rows of the grid of each sample, images to be generated among them.
        spatial_merge_size: Patches merged along a side. None: the family's, 2 but for GLM-Image (1) and MiniCPM-V (4).
        attention_mask: ``[B, L]``, 0 marks padding, on any side.
        cu_seqlens: ``[samples + 1]`` int32 or int64: samples follow each other without padding. Each starts at 0.

    Returns:
        ``position_ids`` ``[3, B, L]`` (4 axes: HunYuan-VL) and ``rope_deltas`` ``[samples, 1]``, what decoding adds to
        a sample's length to get the next position. int64; float32 for Qwen3-Omni, whose time has fractions. Packed:
        ``[1 + 3, *input_ids.shape]``, before the axes the text's row, 0, 1, 2, … in every sample: what transformers'
        flash attention finds the samples by. Padding: 0, where transformers says so 1.

    Raises:
        ValueError, TypeError: Names argument, sample, got, expected: tokens of a picture that are not its grid's,
            a missing or left-over row, a side that does not divide, an unknown family.

    Numerics: exactly those of transformers. In a batch HunYuan-VL numbers images through all samples, packed in each.

    Source: ``get_rope_index`` of transformers 5.24, 23 of them.
    """
    changed = {"image_token_id": image_token_id, "video_token_id": video_token_id}
    changed["spatial_merge_size"] = spatial_merge_size
    row = family_named(family)._replace(**{k: v for k, v in changed.items() if v is not None})
    if row.spatial_merge_size < 1:
        checks.fail(OP, "spatial_merge_size", row.spatial_merge_size, "at least 1")
    _check_tokens(input_ids, mm_token_type_ids, attention_mask, cu_seqlens)
    by_type = row.scan in (RUNS, CANVAS)  # the others go by token ids alone
    if row.scan == CANVAS and max(row.start_id, row.slice_start_id) < 0:
        checks.fail(
            OP, "family", "a row without them", "family_of(config), with the config's token ids"
        )
    if by_type and mm_token_type_ids is None and row.image_token_id < 0:
        checks.fail(
            OP, "mm_token_type_ids", None, "a tensor where the family has no image_token_id"
        )
    media = (
        _grid("image_grid_thw", image_grid_thw, row), _grid("video_grid_thw", video_grid_thw, row),
        _seconds(second_per_grid_ts, row), _counts("audio_seqlens", audio_seqlens),
        _counts("images_per_sample", images_per_sample),
    )  # fmt: skip
    try:
        found: tuple[torch.Tensor, torch.Tensor] = FORWARD(
            input_ids, _integers(mm_token_type_ids) if by_type else None, _integers(attention_mask),
            _on(input_ids, cu_seqlens), *(_on(input_ids, t) for t in media), list(row),
        )  # fmt: skip
    except RuntimeError as error:
        raise checks.as_value_error(OP, error) from None
    return found


def _on(tokens: torch.Tensor, tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Grids and numbers may come from a processor's CPU tensors."""
    return None if tensor is None else tensor.to(tokens.device)


def _integers(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """In a dtype the kernels read; of a mask of floats, where it is not 0."""
    if tensor is None or tensor.dtype in (*_INTEGERS, torch.uint8, torch.bool):
        return tensor
    return tensor != 0 if tensor.is_floating_point() else tensor.long()


def _counts(name: str, counts: torch.Tensor | None) -> torch.Tensor | None:
    if counts is not None and (counts.dim() != 1 or counts.dtype not in _INTEGERS):
        checks.fail(OP, name, _told(counts), "int64 or int32, one number each")
    return counts


def _told(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _check_tokens(
    input_ids: torch.Tensor,
    mm_token_type_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> None:
    if input_ids.dtype not in _INTEGERS:
        raise TypeError(f"{OP}: input_ids must be int64 or int32, got {input_ids.dtype}")
    if input_ids.dim() not in (1, 2):
        checks.fail(OP, "input_ids", list(input_ids.shape), "[B, L] or [T]")
    for name, tensor in (
        ("mm_token_type_ids", mm_token_type_ids),
        ("attention_mask", attention_mask),
    ):
        if tensor is None:
            continue
        checks.shape(OP, name, tensor, tuple(input_ids.shape), "that of input_ids")
        if tensor.device != input_ids.device:
            checks.fail(OP, name, tensor.device, f"on the device of input_ids, {input_ids.device}")
    if mm_token_type_ids is not None and mm_token_type_ids.is_floating_point():
        raise TypeError(f"{OP}: mm_token_type_ids must be integers, got {mm_token_type_ids.dtype}")
    if cu_seqlens is None:
        return
    if attention_mask is not None:
        checks.fail(OP, "attention_mask", "a tensor", "None with cu_seqlens")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in _INTEGERS or cu_seqlens.shape[0] < 1:
        checks.fail(OP, "cu_seqlens", _told(cu_seqlens), "int64 or int32 [samples + 1]")
    if input_ids.dim() == 2 and input_ids.shape[0] != 1:
        checks.fail(OP, "input_ids", list(input_ids.shape), "[T] or [1, T] with cu_seqlens")


def _grid(name: str, given: Grid | None, row: Family) -> torch.Tensor | None:
    if given is None:
        return None
    sides = 2 if row.scan == CANVAS else 3
    grid = checks.grid(OP, name, given)
    grid = grid[:, :sides] if grid.numel() == 0 and grid.dim() == 2 else grid
    if grid.dim() != 2 or grid.shape[1] != sides or grid.dtype not in _INTEGERS:
        checks.fail(OP, name, _told(grid), f"int64 or int32 [n, {sides}]")
    return torch.nn.functional.pad(grid, (1, 0), value=1) if sides == 2 else grid


def _seconds(seconds: torch.Tensor | Sequence[float] | None, row: Family) -> torch.Tensor | None:
    """A float tensor as it is, numbers as float32; for RUNS times the rate, rounded as transformers rounds it."""
    if seconds is None or not row.rate:
        return None
    scale = row.rate if row.scan == RUNS else 1
    if not isinstance(seconds, torch.Tensor):
        return torch.tensor([scale * float(s) for s in seconds], dtype=torch.float32)
    if seconds.dim() != 1:
        checks.fail(OP, "second_per_grid_ts", _told(seconds), "one number a video")
    if not seconds.is_floating_point():
        seconds = seconds.double()
    elif seconds.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{OP}: second_per_grid_ts must be float32, float64 or integers, got {seconds.dtype}"
        )
    return seconds * scale
