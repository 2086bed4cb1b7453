# SPDX-License-Identifier: Apache-2.0
"""Multimodal positions: batches of several families, baselines, invalid calls.

Letters: ``model`` a family; B samples, each of ``images`` (h×w merged tokens), ``videos`` (t×h×w) and ``audios`` (frames),
``gap`` text tokens between them; ``side`` of the padding, "" none; ``packed``; ``types``: with token types.
"""

import functools
import importlib
from types import SimpleNamespace
from typing import Any

import torch

from mmkernels import backends
from mmkernels.ops.mrope_positions.api import mrope_positions
from mmkernels.ops.mrope_positions.families import FAMILIES as ROWS
from mmkernels.ops.mrope_positions.families import UNITS, Family
from mmkernels.ops.mrope_positions.media import audio_tokens
from mmkernels.testing.case import Case, Inputs, Invalid, inference_only
from mmkernels.testing.yardstick import Comparison, Tensors, compare

FAMILIES = ("random",)
EXACT = True  # positions: equal, in a dtype of their own
DTYPES = ("int64",)
_TRANSFORMERS = {
    "qwen2_vl": "Qwen2VLModel",
    "qwen2_5_vl": "Qwen2_5_VLModel",
    "qwen3_vl": "Qwen3VLModel",
}


def _case(name: str, tags: str = "test", **sizes: Any) -> Case:
    default = {
        "model": name, "B": 2, "images": ((2, 3), (1, 4)), "videos": (), "audios": (), "gap": 3,
        "side": "left", "packed": False, "types": True,
    }  # fmt: skip
    return Case(name, {**default, **sizes}, frozenset(tags.split()))


CASES = [
    _case("qwen2_vl"),
    _case("qwen2_5_vl", videos=((3, 2, 2), (1, 3, 1)), side="right"),
    _case("qwen3_vl", videos=((3, 2, 2), (2, 1, 1)), B=3),
    _case("ernie4_5_vl_moe", videos=((2, 2, 3),), side="right"),
    _case("hy_v4_vl", videos=((2, 2, 2),)),
    _case("hunyuan_vl", side=""),
    _case("qwen2_5_omni", videos=((2, 2, 2),), audios=(50, 9), side="right", types=False),
    _case("qwen3_omni_moe", videos=((3, 1, 2),), audios=(120,), types=False),
    _case("packed", model="qwen2_vl", B=3, packed=True, videos=((2, 1, 1),)),
    _case("by_token_id", model="qwen3_vl", types=False, videos=((2, 2, 1),)),
    _case("text_only", model="qwen2_vl", images=(), gap=9),
    _case("empty_batch", "empty", model="qwen2_vl", B=0),
    _case("empty_length", "empty", model="qwen3_vl", images=(), gap=0),
    _case("qwen2_vl_64_images", "bench", model="qwen2_vl", B=4, images=((20, 22),) * 16, gap=44),
    _case("qwen2_5_vl_video", "bench", model="qwen2_5_vl", B=4, images=((20, 22),) * 4, videos=((30, 10, 19),), gap=24),
    _case("qwen3_vl_video", "bench", model="qwen3_vl", B=4, images=((20, 22),) * 4, videos=((30, 10, 19),), gap=6),
]  # fmt: skip


def _sample(case: Case, row: Family, g: torch.Generator) -> tuple[list[int], list[int]]:
    """Ids and types of a sample: text, then every picture and audio with text behind it."""
    ids: list[int] = []
    types: list[int] = []

    def put(token: int, count: int, kind: int = 0) -> None:
        ids.extend([token] * count)
        types.extend([kind] * count)

    def text() -> None:
        count = case.gap and case.gap + int(torch.randint(0, 2, (), generator=g))
        ids.extend(torch.randint(3, 15, (count,), generator=g).tolist())
        types.extend([0] * count)

    text()
    pictures = [(1, h, w, 1) for h, w in case.images] + [(*v, 2) for v in case.videos]
    for t, h, w, kind in pictures:
        for _ in range(t if kind == 2 and row.frames else 1):
            frames = 1 if row.frames else t
            if row.scan == UNITS:
                put(row.start_id, 1)
            put(
                row.image_token_id if kind == 1 else row.video_token_id,
                frames * h * (w + row.newline),
                kind,
            )
            text()
    for frames in case.audios:
        put(row.audio_start_id, 1)
        put(row.audio_token_id, audio_tokens(frames, row.audio_window), 3)
        text()
    return ids, types


def make_inputs(
    case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0, family: str = "random"
) -> Inputs:
    """Keyword arguments of ``mrope_positions``."""
    g = torch.Generator().manual_seed(seed)
    row, m = ROWS[case.model], ROWS[case.model].spatial_merge_size
    samples = [_sample(case, row, g) for _ in range(case.B)]
    inputs: Inputs = {"family": case.model}
    lengths = torch.tensor([len(ids) for ids, _ in samples], dtype=torch.int64)
    if case.packed:
        inputs["input_ids"], types = (
            torch.tensor([x for s in samples for x in s[i]])[None] for i in (0, 1)
        )
        inputs["cu_seqlens"] = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    else:
        inputs["input_ids"], types, mask = _padded(samples, case.side)
        inputs |= {"attention_mask": mask} if case.side else {}
    if case.types:
        inputs["mm_token_type_ids"] = types.int()
    images = [[1, h * m, w * m] for h, w in case.images] * case.B
    videos = [[t * row.temporal_merge, h * m, w * m] for t, h, w in case.videos] * case.B
    if case.images:
        inputs["image_grid_thw"] = torch.tensor(images, dtype=torch.int64).view(-1, 3)
    if case.videos:
        inputs["video_grid_thw"] = torch.tensor(videos, dtype=torch.int64).view(-1, 3)
        if row.rate:
            inputs["second_per_grid_ts"] = torch.rand(len(videos), generator=g) * 2
    if case.audios:
        inputs["audio_seqlens"] = torch.tensor(list(case.audios) * case.B)
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def _padded(
    samples: list[tuple[list[int], list[int]]], side: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    longest = max((len(ids) for ids, _ in samples), default=4)
    found = []
    for ids, types in samples:
        more = longest - len(ids)
        if not side:  # no padding: more text
            ids, types, more = ids + [3] * more, types + [0] * more, 0
        row = torch.tensor([ids, types, [1] * len(ids)], dtype=torch.int64).view(3, -1)
        found.append(torch.nn.functional.pad(row, (more, 0) if side == "left" else (0, more)))
    none = torch.zeros(3, 0, longest, dtype=torch.int64)
    rows = torch.stack(found, 1) if found else none
    return rows[0], rows[1], rows[2]


def _flat(found: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.flatten() for t in found])


@inference_only
def run(inputs: Inputs) -> torch.Tensor:
    """The public op: positions, then deltas."""
    return _flat(mrope_positions(**inputs))


@inference_only
def plain(inputs: Inputs) -> torch.Tensor:
    """The reference."""
    with backends.backend("reference"):
        return _flat(mrope_positions(**inputs))


@functools.cache
def transformers_model(name: str) -> Any:
    """What ``get_rope_index`` asks of a model."""
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    kind = getattr(module, _TRANSFORMERS[name])
    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=ROWS[name].rate)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    for method in ("get_rope_index", "get_vision_position_ids"):
        setattr(model, method, functools.partial(getattr(kind, method), model))
    return model


@inference_only
def eager(inputs: Inputs) -> torch.Tensor:
    """transformers' ``get_rope_index``."""
    given = {k: v for k, v in inputs.items() if k != "family"}
    return _flat(transformers_model(inputs["family"]).get_rope_index(**given))


library = eager


def check(
    inputs: Inputs, wide: Inputs, got: Tensors, reference: Tensors, grad: torch.Tensor
) -> list[Comparison]:
    """Equal to the reference of the inputs as they are: seconds in fp64 would give other positions."""
    expected = plain(inputs).double()
    return [compare("out", got["out"], expected, torch.zeros_like(expected))]


def traffic(inputs: Inputs) -> tuple[int, int]:
    """Bytes: types (or ids) and mask read, three positions written. FLOPs: none."""
    read = sum(inputs[k].nbytes for k in ("mm_token_type_ids", "attention_mask") if k in inputs)
    return read + 3 * 8 * inputs["input_ids"].numel(), 0


def _with(**changes: Any) -> Any:
    return lambda inputs: {**inputs, **changes}


def _grid(change: Any) -> Any:
    return lambda inputs: {**inputs, "image_grid_thw": change(inputs["image_grid_thw"])}


def _one_token_less(inputs: Inputs) -> Inputs:
    types = inputs["mm_token_type_ids"].clone()
    types[1, (types[1] == 1).nonzero()[5]] = 0  # the last token of the first image
    return {**inputs, "mm_token_type_ids": types}


def _packed(ends: list[int]) -> Any:
    def change(inputs: Inputs) -> Inputs:
        flat = {k: inputs[k].flatten() for k in ("input_ids", "mm_token_type_ids")}
        rest = {k: v for k, v in inputs.items() if k != "attention_mask"}
        return {**rest, **flat, "cu_seqlens": torch.tensor(ends)}

    return change


_ROW = torch.tensor([[1, 4, 6]])
INVALID = [
    Invalid("family", _with(family="qwen9"), r"family must be a Family or one of .*qwen2_vl.*got 'qwen9'"),
    Invalid("image_tokens", _one_token_less, r"input_ids of sample 1 must be 6 image tokens in a row \(image_grid_thw\[2\] = \[1, 4, 6\]\), got 5"),
    Invalid("no_grid", _with(image_grid_thw=None), r"image_grid_thw must be a row for every image \(sample 0 has one more\), got None"),
    Invalid("rows_missing", _grid(lambda g: g[:3]), r"image_grid_thw must be a row for every image \(sample 1 has one more\), got 3 rows"),
    Invalid("rows_left", _grid(lambda g: torch.cat([g, _ROW])), "image_grid_thw must be as many as input_ids has images, 4 rows, got 5"),
    Invalid("videos_left", _with(video_grid_thw=_ROW), "video_grid_thw must be as many as input_ids has videos, 0 rows, got 1"),
    Invalid("divisible", _grid(lambda g: g - torch.tensor([0, 1, 0])), r"image_grid_thw\[0\] must be t, h, w .* multiples of 2, .*got \[1, 3, 6\]"),
    Invalid("zero", _grid(lambda g: g * torch.tensor([0, 1, 1])), r"image_grid_thw\[0\] must be .* from 1 .*got \[0, 4, 6\]"),
    Invalid("vast", _grid(lambda g: g * 2**40), r"image_grid_thw\[0\] must be .* to 2\^20"),
    Invalid("grid_shape", _grid(lambda g: g[:, :2]), r"image_grid_thw must be int64 or int32 \[n, 3\], got int64 \[4, 2\]"),
    Invalid("grid_ragged", _with(image_grid_thw=[[1, 4, 6], [1]]), "image_grid_thw must be a tensor, or as many numbers"),
    Invalid("grid_of_two", _with(image_grid_thw=[[4, 6]]), r"image_grid_thw must be int64 or int32 \[n, 3\], got int64 \[1, 2\]"),
    Invalid("types", lambda i: {**i, "mm_token_type_ids": i["mm_token_type_ids"] + 3}, r"mm_token_type_ids of sample 0 must be 0 \(text\), 1 \(image\) or 2 \(video\), got"),
    Invalid("types_shape", lambda i: {**i, "mm_token_type_ids": i["mm_token_type_ids"][:1]}, "mm_token_type_ids must be that of input_ids"),
    Invalid("mask_shape", lambda i: {**i, "attention_mask": i["attention_mask"][:, 1:]}, "attention_mask must be that of input_ids"),
    Invalid("ids_dtype", lambda i: {**i, "input_ids": i["input_ids"].float()}, "input_ids must be int64 or int32", TypeError),
    Invalid("merge_size", _with(spatial_merge_size=0), "spatial_merge_size must be at least 1, got 0"),
    Invalid("cu_seqlens_end", _packed([0, 5]), r"cu_seqlens must be 0 first, .* tokens last, got \[0, 5\]"),
    Invalid("cu_seqlens_order", _packed([0, 9, 5]), r"cu_seqlens must be 0 first, .* got \[0, 9, 5\]"),
    Invalid("mask_of_packed", _with(cu_seqlens=torch.tensor([0])), "attention_mask must be None with cu_seqlens"),
]  # fmt: skip
