# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels against the reference in fp64: every case and every gradient, by the bound."""

import importlib
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mmkernels import OPS as ALL_OPS
from mmkernels import backends
from mmkernels.testing import Case, gradients, yardstick
from mmkernels.testing.case import Inputs

OPS = [  # mrope_positions, of integers, has a file of its own
    op for op in ALL_OPS if op in backends.TRITON_OPS and op != "mrope_positions"
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# For an interpreter; test_layouts.py and test_patch_embed.py have several tiles, groups and filters, too.
TOO_LONG = (
    "packed_planes",
    "many_panels",
    "wide",
    "many_images",
    "packed_bicubic_antialias",
    "two_chunks",
    "a_chunk_of_one",
    "few_queries_in_chunks",
    "many_rows",
)


def cases_of(op: str) -> ModuleType:
    return importlib.import_module(f"mmkernels.ops.{op}.cases")


def tagged(tag: str) -> list[Any]:
    return [
        pytest.param(cases_of(op), case, id=f"{op}-{case.name}")
        for op in OPS
        for case in cases_of(op).CASES
        if tag in case.tags and case.name not in TOO_LONG
    ]


def rows() -> list[object]:
    """Every case in fp32, and in one of the 16-bit dtypes, in turns by commit; in both in ``make full``."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    turn = int(commit.stdout.strip() or "0", 16)
    found = []
    for i, row in enumerate(tagged("test")):
        for j, dtype in enumerate(DTYPES):
            later = j > 0 and (i + j + turn) % 2 == 0
            name = f"{row.id}-{str(dtype).removeprefix('torch.')}"
            marks = pytest.mark.full if later else ()
            found.append(pytest.param(*row.values, dtype, id=name, marks=marks))
    return found


def assert_within_bound(cases: ModuleType, inputs: Inputs) -> None:
    grad = yardstick.upstream(cases.run(inputs))
    got = gradients(cases.run, inputs, grad=grad)
    failed = [c for c in yardstick.check(cases, inputs, got, grad) if not c.ratio <= 1]
    assert not failed, "; ".join(map(str, failed))


@pytest.mark.parametrize(("cases", "case", "dtype"), rows())
def test_values_and_gradients_hold_the_bound(
    cases: ModuleType, case: Case, dtype: torch.dtype
) -> None:
    # fp16 takes the path of bf16; the larger cases are there for their shape.
    every = "gradcheck" in case.tags and dtype != torch.float16
    for seed, family in enumerate(cases.FAMILIES if every else cases.FAMILIES[:1]):
        assert_within_bound(cases, cases.make_inputs(case, dtype, seed=seed, family=family))


@pytest.mark.parametrize(("cases", "case"), tagged("empty"))
def test_nothing_to_do(cases: ModuleType, case: Case) -> None:
    inputs = cases.make_inputs(case, torch.float32)
    got, expected = gradients(cases.run, inputs), gradients(cases.plain, inputs)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)
