# SPDX-License-Identifier: Apache-2.0
"""Invalid calls raise the stated error, name argument and value, and leave the inputs as they were."""

import importlib
import re
from types import ModuleType
from typing import Any

import pytest
import torch

import mmkernels
from mmkernels import OPS, backends
from mmkernels.testing import Invalid
from mmkernels.testing.case import map_tensors

ROWS = [
    pytest.param(cases, invalid, id=f"{op}-{invalid.name}")
    for op in OPS
    for cases in [importlib.import_module(f"mmkernels.ops.{op}.cases")]
    for invalid in cases.INVALID
]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("cases", "invalid"), ROWS)
def test_invalid_calls(cases: ModuleType, invalid: Invalid, backend: str) -> None:
    inputs = invalid.change(cases.make_inputs(cases.CASES[0], torch.float32))
    before = map_tensors(inputs, torch.clone)
    with backends.backend(backend), pytest.raises(invalid.error) as raised:
        cases.run(inputs)
    text = str(raised.value)
    op = cases.__name__.split(".")[-2]
    assert re.search(invalid.message, text), text
    assert text.startswith(f"{op}: ") and "\n" not in text
    _same(inputs, before)


def _same(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        for key in a:
            _same(a[key], b[key])
    elif isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            _same(x, y)
    elif isinstance(a, torch.Tensor) and a.device.type != "meta":
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))  # unused memory holds NaN


@pytest.mark.parametrize("op", OPS)
def test_every_invalid_case_starts_from_a_valid_one(op: str) -> None:
    cases = importlib.import_module(f"mmkernels.ops.{op}.cases")
    cases.run(cases.make_inputs(cases.CASES[0], torch.float32))


def test_the_op_itself_refuses_what_would_leave_its_memory() -> None:
    """Callers of torch.ops skip the Python checks; the kernel must still not read out of range."""
    ops = torch.ops.mmkernels
    exact = ([1, 4, 4], [], "exact", 1, False, "none", False, False)
    weight, fixed = torch.zeros(4, 3, 1, 4, 4), (*exact[:5], "fixed", False, False)
    pixels = torch.zeros(1, 3, 1, 8, 8)
    with pytest.raises(RuntimeError, match=r"patch_embed: pixel_values .* got 9×8 pixels"):
        ops.patch_embed(
            [torch.zeros(1, 3, 1, 9, 8)], weight, None, [], None, None, None, None, *exact
        )
    with pytest.raises(RuntimeError, match=r"patch_embed: position_embed .* got 9 rows"):
        table = [torch.zeros(9, 4)]
        ops.patch_embed([pixels], weight, None, table, None, None, None, None, *fixed)
    with pytest.raises(RuntimeError, match="patch_embed: position_mode needs 1 tables"):
        ops.patch_embed([pixels], weight, None, [], None, None, None, None, *fixed)
    with pytest.raises(RuntimeError, match="patch_embed: bias"):
        ops.patch_embed([pixels], weight, torch.zeros(5), [], None, None, None, None, *exact)
    with pytest.raises(RuntimeError, match="one number for each of 3 channels"):
        ops.patch_embed([pixels], weight, None, [], None, None, [1.0], [0.0], *exact)
    with pytest.raises(RuntimeError, match="patch_embed: stride"):
        none = ([1, 0, 4], *exact[1:])
        ops.patch_embed([pixels], weight, None, [], None, None, None, None, *none)
    with pytest.raises(RuntimeError, match=r"sizes = .* of all rows"):
        rows, one = [torch.zeros(5, 3)], torch.zeros(4, 3, 1, 1, 1)
        uniform = ([1, 1, 1], [2, 3], *exact[2:])
        ops.patch_embed(rows, one, None, [], None, None, None, None, *uniform)
    with pytest.raises(RuntimeError, match="patch_embed_backward: grad"):
        grad, needs = torch.zeros(3, 4), [False, True, False, False, False]
        ops.patch_embed_backward(grad, [pixels], weight, None, None, None, 0, [], needs, *exact)


def test_the_op_of_merging_refuses_what_would_leave_its_memory() -> None:
    ops = torch.ops.mmkernels
    ids, table, row = torch.tensor([0, 7, 3]), torch.zeros(4, 2), [torch.zeros(1, 2)]
    ok = (ids, table, None, row, [7], [], None, None, None)
    ops.merge_embeddings(*ok)

    def refused(match: str, **changed: object) -> None:
        names = "ids table embeds features token_ids rows counts scale padding".split()
        with pytest.raises(RuntimeError, match=match):
            ops.merge_embeddings(*{**dict(zip(names, ok, strict=True)), **changed}.values())

    refused("input_ids must be int64 or int32", ids=ids.to(torch.int16))
    refused("embed_weight must be given", table=None)
    refused(r"embed_weight must be \[V, D\]", table=torch.zeros(4))
    refused(r"inputs_embeds must be \[\*input_ids", embeds=torch.zeros(2, 2))
    refused("the D of the embeddings", features=[torch.zeros(1, 3)])
    refused("one token id", token_ids=[])
    refused("at most 8 modalities", features=row * 9, token_ids=list(range(7, 16)))
    refused(r"feature_rows\[0\] must be int64 \[1\]", rows=[torch.tensor([], dtype=torch.int64)])
    refused(r"feature_rows\[0\] must be int64", rows=[torch.tensor([1], dtype=torch.int32)])
    refused("feature_counts must be 1 numbers", counts=[1, 1])
    refused("supported", features=[torch.zeros(1, 2, dtype=torch.int32)])
    for out in (torch.ones(2, 2), torch.ones(3, 2).half(), torch.ones(2, 3).t()):
        with pytest.raises(RuntimeError, match="out must be contiguous"):
            ops.merge_embeddings_out(out, *ok[:8])
        assert bool((out == 1).all())
    with pytest.raises(RuntimeError, match="row_source int64"):
        ops.pack_embeddings(ids.int(), table, row, None, None)


def test_the_backward_of_merging_refuses_what_would_leave_its_memory() -> None:
    backward = torch.ops.mmkernels.merge_embeddings_backward
    grad, source = torch.zeros(3, 2), torch.tensor([0, -1, 3])
    backward(grad, source, 4, [1], None, None, [True, True])
    for match, call in {
        "a row for each of 3 tokens": (grad[:2], source, 4, [1], None, None, [True, True]),
        "row_source must be int64": (grad, source.int(), 4, [1], None, None, [True, True]),
        "needs must be": (grad, source, 4, [1], None, None, [True]),
        r"row_source\[2\] is 3, expected an id in \[0, 3\)": (grad, source, 3, [1], None, None, [True, True]),
        r"row_source\[1\] is -1": (grad, source, 4, [], None, None, [True]),
        "already has a place": (grad, torch.tensor([0, -1, -1]), 4, [1], None, None, [True, True]),
        "feature_lengths must be at least 0": (grad, source, 4, [-1], None, None, [True, True]),
    }.items():  # fmt: skip
        with pytest.raises(RuntimeError, match=match):
            backward(*call)


def test_the_op_of_cross_attention_refuses_what_would_leave_its_memory() -> None:
    ops = torch.ops.mmkernels
    query, context, weight = torch.zeros(1, 2, 8), torch.zeros(1, 3, 6), torch.zeros(8, 6)
    none, rest = (None,) * 3, (0, 2, 1.0, 0.0)

    def forward(
        weight_v: torch.Tensor = weight, bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        return ops.cross_attention(query, context, None, weight, weight_v, None, bias, *none, *rest)  # type: ignore[no-any-return]

    out, lse = forward(bias=torch.zeros(8))
    for match, call in {
        r"weights must be \[A·d, X\]": {"weight_v": weight[:, :5]},
        r"value_bias must be \[8\]": {"bias": torch.zeros(4)},
        "value_bias must be .* in the dtype": {"bias": torch.zeros(8).half()},
    }.items():
        with pytest.raises(RuntimeError, match=match):
            forward(**call)
    for match, grad, sums, needs in (
        ("grad must be", out[:, :1], lse, [True] * 7),
        ("lse", out, lse[:, :1], [True] * 7),
        ("lse", out, lse.double(), [True] * 7),
        ("needs must be 7", out, lse, [True]),
    ):
        with pytest.raises(RuntimeError, match=match):
            ops.cross_attention_backward(
                grad, query, context, None, weight, weight, None, *none, out, sums, *rest, needs
            )


def test_a_grid_may_be_lists() -> None:
    grid, rows, weight = [[1, 2, 4], [2, 2, 2]], torch.randn(16, 12), torch.randn(5, 12)
    tensor = torch.tensor(grid)
    for op, args in (
        (mmkernels.patch_embed, (rows, weight)),
        (mmkernels.patch_merge, (rows,)),
        (lambda *a, **k: mmkernels.patch_embed_packed(*a, **k).tokens, (rows, weight)),
    ):
        assert torch.equal(op(*args, grid_thw=grid), op(*args, grid_thw=tensor))
    ids = torch.full((1, 4), 151655)
    for kind, token in (("image", 151655), ("video", 151656)):
        ids.fill_(token)
        named, none = {f"{kind}_grid_thw": grid[1:]}, {f"{kind}_grid_thw": []}
        got = mmkernels.mrope_positions(ids[:, :2], family="qwen2_vl", **named)[0]
        named = {f"{kind}_grid_thw": tensor[1:]}
        assert torch.equal(
            got, mmkernels.mrope_positions(ids[:, :2], family="qwen2_vl", **named)[0]
        )
        mmkernels.mrope_positions(torch.zeros_like(ids), family="qwen2_vl", **none)


def test_a_spectrogram_without_its_batch() -> None:
    embed = mmkernels.nn.AudioPatchEmbed(8, 16)
    with pytest.raises(
        ValueError, match=r"input_values must be \[B, frames, mel\], got \[98, 128\]"
    ):
        embed(torch.zeros(98, 128))
    with pytest.raises(
        ValueError, match=r"pixel_values must be \[B, C, H, W\].*got \[3, 32, 768\]"
    ):
        mmkernels.nn.PatchEmbed(3, 8, 16)(torch.zeros(3, 32, 768))
