# SPDX-License-Identifier: Apache-2.0
"""Features of another dtype than the embeddings: as if they had been cast before, without that pass."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mmkernels
from mmkernels.ops.merge_embeddings import cases as merge_cases
from mmkernels.ops.pack_embeddings import cases as pack_cases
from mmkernels.testing import gradients, yardstick
from mmkernels.testing.case import Inputs

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PAIRS = list(itertools.permutations(DTYPES, 2))
OPS: dict[str, tuple[Any, Callable[[Inputs], torch.Tensor]]] = {
    "merge": (merge_cases, merge_cases.run),
    "pack": (pack_cases, pack_cases.run),
}


def inputs_of(op: str, name: str, text: torch.dtype, features: torch.dtype) -> Inputs:
    """A case whose features round, overflow and underflow when they become text."""
    cases = OPS[op][0]
    case = next(c for c in cases.CASES if c.name == name)
    x: Inputs = cases.make_inputs(case, text)
    g = torch.Generator().manual_seed(1)
    found = []
    for f in x["features"]:
        wide = torch.randn(f.shape, generator=g, dtype=torch.float64)
        wide *= torch.exp2(torch.randint(-40, 20, f.shape, generator=g).double())
        found.append(wide.to(features))
    return {**x, "features": found}


class Casts(TorchDispatchMode):
    """Counts casts of tensors as large as a feature."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_to_copy" in str(func) or "aten.copy_" in str(func):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("text", "features"), PAIRS, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(
    ("op", "name"),
    [("merge", "scaled"), ("merge", "by_row"), ("merge", "inputs_embeds"), ("merge", "odd_width"),
     ("pack", "scaled"), ("pack", "odd_width"), ("pack", "unplaced")],
)  # fmt: skip
def test_bits_are_those_of_cast_features(
    op: str, name: str, text: torch.dtype, features: torch.dtype
) -> None:
    x = inputs_of(op, name, text, features)
    run = OPS[op][1]
    cast = {**x, "features": [f.to(text) for f in x["features"]]}
    expected = run(cast)
    with Casts() as casts:
        got = run(x)
    assert got.dtype == text and torch.equal(got, expected) and not casts.found
    with mmkernels.backend("reference"):
        assert torch.equal(run(x), expected)
    grad = yardstick.upstream(expected)
    found, wanted = gradients(run, x, grad=grad), gradients(run, cast, grad=grad)
    for key, value in wanted.items():
        dtype = features if key.startswith("features") else text
        assert found[key].dtype == dtype and torch.equal(found[key], value.to(dtype)), key


def test_modalities_may_differ_and_out_is_written() -> None:
    x = inputs_of("merge", "scaled", torch.bfloat16, torch.float32)
    x["features"] = [f.to(d) for f, d in zip(x["features"], DTYPES, strict=False)]
    expected = merge_cases.run({**x, "features": [f.bfloat16() for f in x["features"]]})
    out = torch.empty_like(expected)
    with torch.no_grad():
        merge_cases.run({**x, "out": out})
    assert torch.equal(out, expected) and torch.equal(merge_cases.run(x), expected)


@pytest.mark.parametrize("op", list(OPS))
@pytest.mark.parametrize("features", [torch.float32, torch.bfloat16])
def test_autocast_casts_no_features(op: str, features: torch.dtype) -> None:
    """fp32 embeddings under autocast: features of either dtype arrive as they are."""
    x = inputs_of(op, "odd_width", torch.float32, features)
    cast = {**x, "embed_weight": x["embed_weight"].bfloat16(),
            "features": [f.bfloat16() for f in x["features"]]}  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16), Casts() as casts:
        got = OPS[op][1](x)
    assert torch.equal(got, OPS[op][1](cast)) and len(casts.found) == 1  # of the table


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_out_is_written_under_autocast(kernels: str) -> None:
    """In the dtype of the result, which is the autocast dtype; the other is refused."""
    x = inputs_of("merge", "odd_width", torch.float32, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), mmkernels.backend(kernels):
        expected = merge_cases.run(x)
        out = torch.full_like(expected, torch.nan)
        assert merge_cases.run({**x, "out": out}) is out and torch.equal(out, expected)
        with pytest.raises(ValueError, match="out must be of the dtype of the result"):
            merge_cases.run({**x, "out": out.float()})


def test_at_most_eight_modalities() -> None:
    features, ids = [torch.ones(1, 2)] * 9, list(range(5, 14))
    with pytest.raises(ValueError, match="features must be at most 8, got 9 tensors"):
        mmkernels.merge_embeddings(
            torch.tensor(ids), torch.ones(5, 2), features, feature_token_ids=ids
        )
    plan = torch.arange(-9, 0)
    with pytest.raises(ValueError, match="features must be at most 8, got 9 tensors"):
        mmkernels.pack_embeddings(plan, torch.ones(5, 2), features)


def test_nothing_to_poll_without_cuda() -> None:
    if not torch.cuda.is_available():
        mmkernels.poll_errors()


def test_compiled() -> None:
    x = inputs_of("merge", "odd_width", torch.float32, torch.bfloat16)
    assert torch.equal(torch.compile(merge_cases.run, fullgraph=True)(x), merge_cases.run(x))
