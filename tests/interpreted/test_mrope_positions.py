# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of ``mrope_positions`` against transformers: families, paddings, packed samples, blocks."""

import random
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1]))
from mrope_families import CLASSES, draw, draw_one, joined, media, packed, padded, row_of, theirs

from mmkernels import backends, mrope_positions
from mmkernels.ops.mrope_positions import triton
from mmkernels.ops.mrope_positions.families import INDEX, RUNS

NAMES = [n for n in CLASSES if row_of(n).scan == RUNS and row_of(n).advance != INDEX]
# One family for each rule; the others are rows with other token ids.
RULES = ("qwen2_vl", "qwen2_5_vl", "ernie4_5_vl_moe", "qwen3_vl", "glm4v", "hy_v4_vl")


def test_every_rule_is_there() -> None:
    ids = {"image_token_id": 0, "video_token_id": 0, "video_start_id": -1, "video_end_id": -1}
    rules = {row_of(n)._replace(**ids) for n in NAMES}
    assert rules == {row_of(n)._replace(**ids) for n in RULES}


@pytest.mark.parametrize("name", RULES)
def test_equal_to_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_BEFORE", 2)
    for seed, side in enumerate(("left", "right", "holes", "left")):
        monkeypatch.setattr(triton, "_TOKENS", 64 if seed else 1024)
        rng = random.Random(f"{name} {seed}")
        batch = joined([draw(rng, name), draw(rng, name)])
        tokens = padded(rng, batch, side)
        expected = theirs(name, tokens, batch)
        if seed == 3:
            tokens.pop("mm_token_type_ids")
        got = mrope_positions(**tokens, **media(batch), family=batch.row)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b), (seed, side, a, b)


@pytest.mark.parametrize("by_id", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_packed(name: str, by_id: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_TOKENS", 64)
    rng = random.Random(name)
    whole = joined([draw_one(rng, name) for _ in range(4)])
    tokens = packed(whole)
    if by_id:
        tokens.pop("mm_token_type_ids")
    got = mrope_positions(**tokens, **media(whole), family=whole.row)
    with backends.backend("reference"):
        expected = mrope_positions(**tokens, **media(whole), family=whole.row)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0,)])
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    ids = torch.zeros(shape, dtype=torch.int64)
    positions, deltas = mrope_positions(ids, ids, family="qwen2_vl")
    assert positions.shape == (3, *shape) and not deltas.any()


def test_a_grid_that_does_not_fit_reads_nothing_out_of_range() -> None:
    """No row, too few and too many rows: any positions, no crash."""
    rng = random.Random(0)
    batch = joined([draw(rng, "qwen3_vl") for _ in range(3)])
    tokens = padded(rng, batch, "left")
    for rows in (0, 1, 50):
        grid = torch.full((rows, 3), 4)
        mrope_positions(**tokens, image_grid_thw=grid, video_grid_thw=grid, family=batch.row)
    mrope_positions(**tokens, family=batch.row)
