# SPDX-License-Identifier: Apache-2.0
"""What the adapter examples share: a module as it is and patched, outputs and gradients, and a table of the errors."""

import copy
from typing import Any, NamedTuple

import torch
from torch import nn

import mmkernels

CLOSE = 1e-4  # of the largest value, fp32


class Row(NamedTuple):
    """One comparison: by what, and the largest errors as a part of the largest value."""

    what: str
    op: str
    output: float
    gradient: float


def off(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> float:
    """The largest difference, of the largest value; an error if it is not small.

    A gradient that is zero but for rounding (a bias before a softmax) is measured by 1e-3.
    """
    found = (ours - theirs).detach().abs().max() / theirs.abs().max().clamp(min=1e-3)
    assert found <= CLOSE, f"{what}: differs by {found:.2g} of the largest value"
    return found.item()


def same_patched(module: nn.Module, *inputs: Any) -> Row:
    """Patches a copy, prints the report, and compares output and all gradients with those of the module."""
    patched = copy.deepcopy(module)
    report = mmkernels.patch(patched)
    print(f"{type(module).__module__}.{type(module).__name__}\n{report}\n")
    outs = []
    for m in (module, patched):
        out = m(*inputs)
        out = out[0] if isinstance(out, tuple) else out
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
        (out * weights).sum().backward()
        outs.append(out.detach())
    named = dict(patched.named_parameters())
    pairs = [(n, named[n].grad, p.grad) for n, p in module.named_parameters() if p.grad is not None]
    ops = sorted({line.op for line in report.lines if not line.why_not})
    worst = max(off(ours, theirs, name) for name, ours, theirs in pairs)
    return Row(type(module).__name__, "patch: " + ", ".join(ops), off(*outs[::-1], "output"), worst)


def same_op(
    what: str, op: str, ours: torch.Tensor, theirs: torch.Tensor, inputs: list[torch.Tensor]
) -> Row:
    """Compares two outputs and their gradients to the same inputs."""
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0))
    grads = [torch.autograd.grad((out * weights).sum(), inputs) for out in (ours, theirs)]
    worst = max(off(a, b, what) for a, b in zip(*grads, strict=True))
    return Row(what, op, off(ours, theirs, what), worst)


def show(*rows: Row) -> None:
    """The table at the end of each example."""
    width = max(len(r.what) for r in rows)
    print(f"{'':<{width}}  {'output':>8}  {'gradient':>8}  computed by")
    for r in rows:
        print(f"{r.what:<{width}}  {r.output:8.1e}  {r.gradient:8.1e}  {r.op}")
    print("outputs and gradients agree")
