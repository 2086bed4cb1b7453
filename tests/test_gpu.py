# SPDX-License-Identifier: Apache-2.0
"""Every op on a GPU: the bound, a side stream, a captured graph. ``MMKERNELS_TEST_DEVICE=cpu`` tries the bound here."""

import os
from typing import Any

import pytest
import torch

from benchmarks.rows import cases_of
from mmkernels import OPS
from mmkernels.testing import Case, gradients, which_kernel_ran, yardstick
from mmkernels.testing.case import map_tensors

DEVICE = os.environ.get("MMKERNELS_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no GPU"),
]
on_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="streams and graphs are a GPU's")
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int64": torch.int64,
}
WITHOUT_KERNEL = {"cross_attention"}  # auto may choose torch's own algorithm


def calls(dtypes: tuple[str, ...] = ("fp32", "bf16")) -> list[Any]:
    """Op, case and dtype of everything the suite tests."""
    return [
        pytest.param(op, case, DTYPES[dtype], id=f"{op}-{case.name}-{dtype}")
        for op in OPS
        for case in cases_of(op).CASES
        if "test" in case.tags
        for dtype in getattr(cases_of(op), "DTYPES", dtypes)
    ]


def first_calls() -> list[Any]:
    """One for each op."""
    found: dict[str, Any] = {}
    for call in calls(("bf16",)):
        found.setdefault(call.values[0], call)
    return list(found.values())


def outputs(op: str, inputs: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        out = cases_of(op).run(inputs)
    return list(out) if isinstance(out, tuple) else [out]


@pytest.mark.parametrize(("op", "case", "dtype"), calls())
def test_within_the_bound(op: str, case: Case, dtype: torch.dtype) -> None:
    cases = cases_of(op)
    inputs = cases.make_inputs(case, dtype, DEVICE)
    with which_kernel_ran() as ran:
        if hasattr(cases, "compared"):
            found = cases.compared(inputs, cases.results(inputs))
        else:
            grad = yardstick.upstream(cases.run(inputs))
            found = yardstick.check(cases, inputs, gradients(cases.run, inputs, grad=grad), grad)
    failed = [c for c in found if not c.ratio <= 1]
    assert not failed, "; ".join(map(str, failed))
    assert "reference" not in ran.values() or op in WITHOUT_KERNEL, ran


@on_gpu
@pytest.mark.parametrize(("op", "case", "dtype"), first_calls())
def test_on_a_side_stream(op: str, case: Case, dtype: torch.dtype) -> None:
    """The same bits, and nothing on the default stream."""
    inputs = cases_of(op).make_inputs(case, dtype, DEVICE)
    expected = [t.clone() for t in outputs(op, map_tensors(inputs, torch.clone))]
    stream: Any = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        copied = map_tensors(inputs, torch.clone)
        got = outputs(op, copied)
    stream.synchronize()
    assert all(map(torch.equal, got, expected))


@on_gpu
@pytest.mark.parametrize(("op", "case", "dtype"), first_calls())
def test_in_a_graph(op: str, case: Case, dtype: torch.dtype) -> None:
    """Captured once, replayed on other memory contents of the same shape."""
    inputs = cases_of(op).make_inputs(case, dtype, DEVICE)
    for _ in range(3):
        outputs(op, map_tensors(inputs, torch.clone))  # compiles
    static = map_tensors(inputs, torch.clone)
    torch.cuda.synchronize()
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outputs(op, static)
    expected = [t.clone() for t in outputs(op, map_tensors(inputs, torch.clone))]
    for _ in range(2):
        for t in captured:
            t.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, captured, expected))
