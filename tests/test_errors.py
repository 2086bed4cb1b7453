# SPDX-License-Identifier: Apache-2.0
"""Invalid calls raise the stated error, name argument and value, and leave the inputs as they were."""

import importlib
import re
from types import ModuleType
from typing import Any

import pytest
import torch

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
    with pytest.raises(RuntimeError, match="cross_attention"):
        ops.cross_attention(
            torch.zeros(1, 2, 8),
            torch.zeros(1, 3, 5),
            torch.zeros(8, 6),
            torch.zeros(8, 5),
            None,
            None,
            None,
            2,
            1.0,
        )
    with pytest.raises(RuntimeError, match="merge_embeddings"):
        ops.merge_embeddings(
            torch.tensor([7]), torch.zeros(4, 2), None, [], [], [], None, None, None
        )
