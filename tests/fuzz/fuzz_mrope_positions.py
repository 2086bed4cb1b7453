# SPDX-License-Identifier: Apache-2.0
"""Random calls of ``mrope_positions``: every family, padded anywhere or packed. The reference is transformers' equal
(tests/test_mrope_positions.py). Letters: see ``draw``."""

import random
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import mrope_families as families

from mmkernels.ops.mrope_positions import cases
from mmkernels.ops.mrope_positions.families import CANVAS, RUNS, SPANS, UNITS
from mmkernels.testing.case import Inputs

OP, CASES = "mrope_positions", cases
KINDS = ("runs", "spans", "units", "canvas")
SIMPLEST: dict[str, Any] = {"batch": 0, "side": "right", "by_id": False, "threads": 1}
KNOWN: dict[str, Any] = {}
VARIED = ("model", "batch", "by_id", "side", "threads")
LAYOUTS = ("step", "transposed")
SPOILED = ("family", "longer", "row more", "row less", "taller", "zero")
_TENSORS = ("input_ids", "mm_token_type_ids", "attention_mask", "image_grid_thw", "video_grid_thw")
_SCANS = {"runs": RUNS, "spans": SPANS, "units": UNITS, "canvas": CANVAS}


def draw(rng: random.Random, kind: str) -> dict[str, Any]:
    """``batch``: seed of the samples; ``side`` of the padding, or "packed"; ``by_id``: without token types."""
    names = [n for n in families.CLASSES if families.row_of(n).scan == _SCANS[kind]]
    return {
        "model": rng.choice(names), "batch": rng.randrange(10**6), "by_id": rng.random() < 0.3,
        "side": rng.choice(("left", "right", "holes", "packed")), "threads": rng.randint(1, 5),
        "layouts": ((rng.choice(_TENSORS), rng.choice(LAYOUTS), 0),) if rng.random() < 0.5 else (),
    }  # fmt: skip


def build(letters: dict[str, Any]) -> tuple[Inputs, Inputs]:
    rng = random.Random(f"{letters['model']} {letters['batch']}")
    batch = families.draw(rng, letters["model"])
    packed = letters["side"] == "packed"
    tokens = families.packed(batch) if packed else families.padded(rng, batch, letters["side"])
    if letters["by_id"]:
        tokens.pop("mm_token_type_ids")
    given = {k: v for k, v in families.media(batch).items() if v is not None}
    inputs = {**tokens, **given, "family": batch.row}
    moved = {
        key: _laid_out(inputs[key], layout)
        for key, layout, _ in letters["layouts"]
        if key in inputs
    }
    return {**inputs, **moved}, inputs


def _laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values elsewhere in memory, wrong ones between them."""
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), 199)
    wide[..., ::2] = tensor
    return wide[..., ::2]


def spoil(rng: random.Random, inputs: Inputs, letters: dict[str, Any]) -> tuple[str, Inputs]:
    """What no kernel may accept."""
    row, grids = inputs["family"], [k for k in inputs if k.endswith("grid_thw")]
    way = rng.choice(SPOILED if grids else SPOILED[:2])
    if way == "family":
        return way, {**inputs, "family": "qwen"}
    if way == "longer":
        names = ("mm_token_type_ids", "attention_mask", "cu_seqlens")
        key = rng.choice([k for k in names if k in inputs])
        return way, {**inputs, key: torch.cat([inputs[key], inputs[key]], -1)}
    key = rng.choice(grids)
    grid = inputs[key].clone()
    if way == "row more":
        return way, {**inputs, key: torch.cat([grid, grid[:1]])}
    if way == "row less" or (
        way == "taller" and row.scan == SPANS
    ):  # pictures to come may be of any size
        return "row less", {**inputs, key: grid[:-1]}
    at = rng.randrange(len(grid))
    grid[at, -2] = 0 if way == "zero" else grid[at, -2] + 5 * row.spatial_merge_size
    return way, {**inputs, key: grid}
