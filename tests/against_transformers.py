# SPDX-License-Identifier: Apache-2.0
"""A module of transformers, tiny and with random weights, beside ours with the same parameters.

The truth is transformers' module in fp64, its own casts to fp32 included (``InFp64``).
"""

import copy
from typing import Any

import torch
from patch_embed_families import Family, Run
from torch import nn
from torch.overrides import TorchFunctionMode

Tensors = dict[str, torch.Tensor]


class InFp64(TorchFunctionMode):
    """Code that asks for fp32, or takes the default, gets fp64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        swap = lambda v: torch.float64 if v is torch.float32 else v
        return func(*map(swap, args), **{k: swap(v) for k, v in (kwargs or {}).items()})

    def __enter__(self) -> "InFp64":
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.set_default_dtype(torch.float32)
        super().__exit__(*error)


def made(family: Family, dtype: torch.dtype, seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    """The module and pixels, every value random and exact in ``dtype``."""
    torch.manual_seed(seed)
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
    with InFp64():
        return result(family.theirs, changed(module, lambda p: p), pixels.double(), grad)


def errors_of_transformers(
    family: Family, module: nn.Module, pixels: torch.Tensor, grad: torch.Tensor, scalings: int = 16
) -> Tensors:
    """The largest of each tensor over the same inputs scaled by up to 6 %, which rounds otherwise."""
    worst: Tensors = {}
    for i in range(scalings):
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
