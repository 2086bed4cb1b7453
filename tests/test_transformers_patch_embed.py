# SPDX-License-Identifier: Apache-2.0
"""patch_embed against transformers' own modules, tiny and with random weights: tokens and all gradients.

The truth is transformers' module in fp64, its own casts to fp32 included (``_InFp64``). In fp64 ours is
within 1e-9 of the largest value. In fp32 and bf16 a family that is one reduction holds the bound of
TOLERANCES.md, of which transformers' rounding is no part; a chain (``Family.chain``: norms, or positions
summed before they are added) is at most 1.05 times as far off as transformers' module in that dtype, or,
gradients, one ulp of the tensor's largest value.
"""

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import mmkernels
from mmkernels.ops.patch_embed import reference
from mmkernels.testing import yardstick

pytest.importorskip("transformers")
from patch_embed_families import FAMILIES, PROCESSED, Family, Processed, Run

Tensors = dict[str, torch.Tensor]
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


class _InFp64(TorchFunctionMode):
    """Code that asks for fp32, or takes the default, gets fp64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        swap = lambda v: torch.float64 if v is torch.float32 else v
        return func(*map(swap, args), **{k: swap(v) for k, v in (kwargs or {}).items()})

    def __enter__(self) -> "_InFp64":
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.set_default_dtype(torch.float32)
        super().__exit__(*error)


def made(family: Family, dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor]:
    """The module and pixels, every value random and exact in ``dtype``."""
    torch.manual_seed(0)
    module = family.build().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.to(dtype), torch.randn(family.pixels).to(dtype)


def changed(module: nn.Module, change: Any) -> nn.Module:
    """A copy in fp64 whose parameters are ``change`` of the module's."""
    module = copy.deepcopy(module).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(change(parameter))
    return module


def result(run: Run, module: nn.Module, pixels: torch.Tensor, grad: torch.Tensor) -> Tensors:
    """Tokens and the gradients of pixels and parameters that have one, for this gradient of the tokens."""
    pixels = pixels.detach().requires_grad_()
    parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
    out = run(module, pixels)
    out = out.reshape(-1, out.shape[-1])
    wanted = [pixels, *parameters.values()]
    grads = torch.autograd.grad(out, wanted, grad.to(out.dtype), allow_unused=True)
    found = {"out": out, "pixels": grads[0], **dict(zip(parameters, grads[1:], strict=True))}
    return {name: g.detach() for name, g in found.items() if g is not None}


def truth(family: Family, module: nn.Module, pixels: torch.Tensor, grad: torch.Tensor) -> Tensors:
    """Of transformers' module, in fp64."""
    with _InFp64():
        return result(family.theirs, changed(module, lambda p: p), pixels.double(), grad)


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


def errors_of_transformers(
    family: Family, module: nn.Module, pixels: torch.Tensor, grad: torch.Tensor
) -> Tensors:
    """The largest of each tensor over the same inputs scaled by up to 6 %, which rounds otherwise."""
    worst: Tensors = {}
    for i in range(16):
        scaled = copy.deepcopy(module)
        with torch.no_grad():
            for parameter in scaled.parameters():
                parameter.mul_(1 + i / 256)
        there = pixels * (1 + i / 256)
        expected = truth(family, scaled, there, grad)
        for name, value in result(family.theirs, scaled, there, grad).items():
            error = (value.double() - expected[name]).abs().max()
            worst[name] = torch.maximum(worst.get(name, error), error)
    return worst


def check(family: Family, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is out of bounds."""
    module, pixels = made(family, dtype)
    out = family.ours(module, pixels)
    grad = yardstick.upstream(out.reshape(-1, out.shape[-1]))
    with (
        _InFp64() if dtype == torch.float64 else contextlib.nullcontext()
    ):  # its norms cast as well
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
        with _InFp64():
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
