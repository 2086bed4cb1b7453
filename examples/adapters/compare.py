# SPDX-License-Identifier: Apache-2.0
"""What the adapter examples share: a module as it is and patched, outputs and gradients."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import mmkernels

CLOSE = 1e-4  # of the largest value, fp32


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    """Or says what differs."""
    off = (ours - theirs).abs().max().item()
    allowed = CLOSE * max(theirs.abs().max().item(), 1e-3)
    assert off <= allowed, f"{what}: differs by {off:.2g}, allowed {allowed:.2g}"


def same_patched(
    module: nn.Module, *inputs: Any, call: Callable[..., torch.Tensor] | None = None
) -> None:
    """Patches a copy and compares its output and all gradients with the module's; prints the report."""
    call = call or (lambda m, *x: m(*x))
    patched = copy.deepcopy(module)
    mmkernels.patch(patched).report()
    outs = []
    for m in (module, patched):
        out = call(m, *inputs)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
        (out * weights).sum().backward()
        outs.append(out)
    assert_close(outs[1], outs[0], "output")
    named = dict(patched.named_parameters())
    for name, p in module.named_parameters():
        if p.grad is not None:
            assert_close(named[name].grad, p.grad, name)
    print(f"{type(module).__name__}: output and gradients agree")
