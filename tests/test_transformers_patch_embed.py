# SPDX-License-Identifier: Apache-2.0
"""patch_embed against transformers' own modules, tiny and with random weights: tokens and all gradients.

The truth is transformers' module in fp64, its own casts to fp32 included (``InFp64``). In fp64 ours is
within 1e-9 of the largest value. In fp32 and bf16 a family that is one reduction holds the bound of
TOLERANCES.md, of which transformers' rounding is no part; a chain (``Family.chain``: norms, or positions
summed before they are added) is at most 1.05 times as far off as transformers' module in that dtype, or,
gradients, one ulp of the tensor's largest value.
"""

import contextlib

import pytest
import torch
from torch import nn

import mmkernels
from mmkernels.ops.patch_embed import reference
from mmkernels.testing import yardstick

pytest.importorskip("transformers")
from against_transformers import (
    InFp64,
    Tensors,
    changed,
    errors_of_transformers,
    made,
    result,
    truth,
)
from patch_embed_families import FAMILIES, PROCESSED, Family, Processed

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def to_power(t: torch.Tensor, power: int) -> torch.Tensor:
    """|t|^power; a weight of 0 is no term."""
    return t.abs() ** power if power else (t != 0).to(t.dtype)


def bounds_of_one_reduction(
    family: Family, module: nn.Module, pixels: torch.Tensor, grad: torch.Tensor, expected: Tensors,
    monkeypatch: pytest.MonkeyPatch,
) -> Tensors:  # fmt: skip
    """As ``yardstick.check``: the terms are counted by the reference on magnitudes."""
    dtype, weights, packed = pixels.dtype, reference.axis_matrix, mmkernels.patch_embed_packed
    with mmkernels.backend("reference"), monkeypatch.context() as patch:
        runs, a, b = [], family.scale, family.shift
        for power in (1, 2, 0):
            p = lambda t, power=power: to_power(t, power)
            patch.setattr(reference, "axis_matrix", lambda *a, p=p: p(weights(*a)))
            if a != 1:
                rescaled = lambda *_, op=packed, r=a**power, **k: op(
                    *_, **{**k, "rescale_factor": r, "image_mean": None}
                )
                patch.setattr(mmkernels, "patch_embed_packed", rescaled)
            wide = changed(module, p), p(pixels.double() + b / a), p(grad.double())
            runs.append(result(family.ours, *wide))
    found = {
        n: yardstick.one_reduction(expected[n], dtype, *(r[n] for r in runs)) for n in expected
    }
    if dtype != torch.float32:
        found["out"] = found["out"] + 0.505 * yardstick.ulp(
            before_positions(family, module, pixels, monkeypatch), dtype
        )
    return found


def before_positions(
    family: Family, module: nn.Module, pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> torch.Tensor:
    """The tokens that round once more when 16-bit positions are added (TOLERANCES.md)."""
    with mmkernels.backend("reference"), monkeypatch.context() as patch:
        for name, table in (
            ("patch_embed", "position_embed"),
            ("patch_embed_packed", "position_table"),
        ):
            op = getattr(mmkernels, name)
            without = lambda *a, op=op, table=table, **k: op(*a, **{**k, table: None})
            patch.setattr(mmkernels, name, without)
        tokens = family.ours(changed(module, lambda p: p), pixels.double()).detach()
        return tokens.reshape(-1, tokens.shape[-1])


def check(family: Family, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is out of bounds."""
    module, pixels = made(family, dtype)
    out = family.ours(module, pixels)
    grad = yardstick.upstream(out.reshape(-1, out.shape[-1]))
    with InFp64() if dtype == torch.float64 else contextlib.nullcontext():  # its norms cast as well
        got = result(family.ours, module, pixels, grad)
    expected = truth(family, module, pixels, grad)
    assert got.keys() == expected.keys()
    assert all(got[n].dtype == dtype and got[n].shape == expected[n].shape for n in got)
    assert all(expected[n].abs().max() > 0 for n in expected), (
        "a gradient is zero: nothing is compared"
    )
    if dtype == torch.float64:
        bounds = {n: 1e-9 * t.abs().max() for n, t in expected.items()}
    elif family.chain:
        theirs = errors_of_transformers(family, module, pixels, grad)
        bounds = {n: 1.05 * theirs[n] for n in expected}
        for n in expected.keys() - {"out"}:
            bounds[n] = torch.maximum(bounds[n], yardstick.ulp(expected[n].abs().max(), dtype))
    else:
        bounds = bounds_of_one_reduction(family, module, pixels, grad, expected, monkeypatch)
    compared = [yardstick.compare(n, got[n], expected[n], bounds[n]) for n in expected]
    return [str(c) for c in compared if not c.ratio <= 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_equals_transformers(
    family: Family, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = check(family, dtype, monkeypatch)
    assert not failed, "; ".join(failed)


@pytest.mark.parametrize("case", PROCESSED, ids=lambda c: c.path.split(".")[1])
def test_uint8_images_equal_what_the_image_processor_lays_out(case: Processed) -> None:
    family = next(f for f in FAMILIES if f.path == case.path)
    module = changed(made(family, torch.float32)[0], lambda p: p)
    images = [torch.randint(0, 256, (3, h, w), dtype=torch.uint8) for h, w in ((16, 24), (24, 8))]
    with torch.no_grad():
        with InFp64():
            expected = case.theirs(module, case.process(images))
        got = case.ours(module, images)
    expected = expected.reshape(-1, expected.shape[-1])
    bound = 1e-9 * expected.abs().max()
    compared = yardstick.compare(case.path, got, expected, bound)
    assert got.shape == expected.shape and compared.ratio <= 1, str(compared)


def test_enough_classes() -> None:
    assert len({f.path for f in FAMILIES}) >= 60
    names = [f.name for f in FAMILIES]
    assert len(names) == len(set(names))
