# SPDX-License-Identifier: Apache-2.0
"""The error bound: how far a kernel may be from the reference in fp64. Derived in TOLERANCES.md.

No tolerance is chosen per test. The terms tᵢ of every output are counted by running the reference on
magnitudes of the inputs: power 1 gives Σ|tᵢ|, power 2 gives Σtᵢ², power 0 the number of terms.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch

from mmkernels.testing.case import Inputs, leaves, map_tensors

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-12, torch.bfloat16: 2.0**-9}
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Comparison:
    """The worst value of a tensor: ``ratio`` ≤ 1 means within the bound."""

    name: str
    ratio: float
    error: float

    def __str__(self) -> str:
        return f"{self.name}: error {self.error:.3g}, {self.ratio:.3g} of the bound"


def in_fp64(inputs: Inputs) -> Inputs:
    """The same values (already rounded to their dtype) in fp64; integers stay."""
    return map_tensors(inputs, lambda t: t.detach().double() if t.is_floating_point() else t)


def gradients(
    run: Callable[[Inputs], torch.Tensor],
    inputs: Inputs,
    grad: torch.Tensor | None = None,
) -> Tensors:
    """Output and the gradient of every float input, for this ``grad`` of the output (default: ones).

    Of what is ``inference_only``, the output alone.
    """
    if getattr(run, "inference_only", False):
        return {"out": run(inputs)}
    wanted = {id(t) for t in leaves(inputs).values()}
    inputs = map_tensors(inputs, lambda t: t.detach().requires_grad_(id(t) in wanted))
    out = run(inputs)
    names = leaves(inputs)
    if out.numel() == 0 and not out.requires_grad:
        return {"out": out}
    grad = torch.ones_like(out) if grad is None else grad.to(out.dtype)
    grads = torch.autograd.grad(out, list(names.values()), grad, allow_unused=True)
    found = {"out": out.detach()}
    for name, g in zip(names, grads, strict=True):
        if g is None:
            raise AssertionError(f"the gradient of {name} is None")
        found[name] = g.detach()
    return found


def upstream(out: torch.Tensor) -> torch.Tensor:
    """The fixed random gradient of an output, exactly representable in its dtype."""
    generator = torch.Generator().manual_seed(1234)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float32)
    return grad.to(out.dtype).to(out.device)


def ulp(reference: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The spacing of ``dtype`` at each reference value."""
    exponent = torch.frexp(reference.abs())[1] - 1
    info = torch.finfo(dtype)
    spacing = torch.ldexp(torch.full_like(reference, info.eps), exponent)
    return spacing.clamp(min=info.tiny * info.eps)


def one_reduction(
    reference: torch.Tensor,
    dtype: torch.dtype,
    sum_abs: torch.Tensor,
    sum_squares: torch.Tensor,
    count: torch.Tensor,
) -> torch.Tensor:
    """The bound of a single sum of products, accumulated in fp32 and rounded once."""
    u = UNIT[dtype]
    if dtype == torch.float32:
        return ulp(reference, dtype) + 2 * u * count.sqrt() * sum_abs
    factor = 8 if reference.numel() > 10**7 else 6
    return 0.505 * ulp(reference, dtype) + factor * u * sum_squares.sqrt()


def compare(
    name: str, got: torch.Tensor, reference: torch.Tensor, bound: torch.Tensor
) -> Comparison:
    """The worst ratio of error to bound; NaN and infinity must be where the reference has them."""
    got = got.double()
    same = (got == reference) | (got.isnan() & reference.isnan())
    error = torch.where(same, 0.0, (got - reference).abs())
    error = torch.where(error.isnan(), float("inf"), error)
    ratio = torch.where(same, 0.0, error / bound)
    if ratio.numel() == 0:
        return Comparison(name, 0.0, 0.0)
    return Comparison(name, ratio.max().item(), error.max().item())


def largest(tensor: torch.Tensor) -> torch.Tensor:
    """The largest magnitude, 0 of an empty tensor."""
    return tensor.abs().max() if tensor.numel() else tensor.new_zeros(())


def check(cases: ModuleType, inputs: Inputs, got: Tensors, grad: torch.Tensor) -> list[Comparison]:
    """Every tensor of ``got`` (of ``gradients``) against the reference in fp64, by the op's bound."""
    wide = in_fp64(inputs)
    reference = gradients(cases.plain, wide, grad=grad.double())
    dtype = got["out"].dtype
    if dtype == torch.float64:
        return [
            compare(n, got[n], reference[n], 1e-9 * largest(reference[n]).clamp(min=1e-3))
            for n in got  # inputs are of order 1: below 1e-3 a tensor is a sum that cancels
        ]
    if not hasattr(cases, "magnitudes"):
        comparisons: list[Comparison] = cases.check(inputs, wide, got, reference, grad)
        return comparisons
    runs = [
        gradients(cases.plain, cases.magnitudes(wide, p), grad=grad.double().abs() ** p)
        for p in (1, 2, 0)
    ]
    bounds = {n: one_reduction(reference[n], got[n].dtype, *(r[n] for r in runs)) for n in got}
    if dtype != torch.float32 and (first := cases.rounded_before(wide)) is not None:
        bounds["out"] = bounds["out"] + 0.505 * ulp(first, dtype)
    return [compare(n, got[n], reference[n], bounds[n]) for n in got]


def worst(comparisons: list[Comparison]) -> Comparison:
    """The one nearest to its bound, or past it."""
    return max(comparisons, key=lambda c: float("inf") if math.isnan(c.ratio) else c.ratio)


def examined(cases: ModuleType, inputs: Inputs) -> tuple[Tensors, list[Comparison]]:
    """What the op makes of these inputs, with gradients if it has any, and how far that is from the reference."""
    if hasattr(cases, "compared"):  # it has none
        got = cases.results(inputs)
        return got, cases.compared(inputs, got)
    grad = upstream(cases.run(inputs))
    got = gradients(cases.run, inputs, grad=grad)
    return got, check(cases, inputs, got, grad)
