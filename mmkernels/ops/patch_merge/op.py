# SPDX-License-Identifier: Apache-2.0
"""Patch merging as torch ops: schema, shapes, autograd. The contract every kernel keeps.

``mmkernels::patch_merge``, ``mmkernels::patch_merge_backward``; arguments are those of ``reference.py``. Saved for the
backward: the inputs alone. Kernels: ``csrc/patch_merge/patch_merge_cpu.cpp`` on CPU, ``triton.py`` on CUDA.
"""

from typing import Any

import torch

from mmkernels import backends
from mmkernels.ops.patch_merge import reference

_ARGUMENTS = (
    "Tensor features, Tensor? index, Tensor? weight, Tensor? bias, int group, str norm, bool norm_after,"
    " bool channels_first, float eps"
)


def _fake(features: torch.Tensor, index: torch.Tensor | None, *rest: Any) -> torch.Tensor:
    group = rest[2]
    rows = features.shape[0] // group if index is None else index.shape[0]
    return features.new_empty(rows, group * features.shape[1])


def _fake_backward(
    grad: torch.Tensor,
    features: torch.Tensor,
    index: torch.Tensor | None,
    weight: torch.Tensor | None,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *_, needs = rest
    _, group, _, norm_after = rest[:4]
    width = features.shape[1] * (group if norm_after else 1)
    return (
        features.new_empty(features.shape if needs[0] else 0),
        features.new_empty(width if needs[1] else 0),
        features.new_empty(width if needs[2] else 0),
    )


FORWARD = backends.define(
    "patch_merge", f"({_ARGUMENTS}) -> Tensor", reference=reference.patch_merge, fake=_fake
)
BACKWARD = backends.define(
    "patch_merge_backward",
    f"(Tensor grad, {_ARGUMENTS}, bool[] needs) -> (Tensor, Tensor, Tensor)",
    reference=reference.patch_merge_backward,
    fake=_fake_backward,
    autocast_skip=tuple(range(5)),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.group, ctx.norm, ctx.norm_after, ctx.channels_first, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    wanted = ctx.needs_input_grad
    needs = [wanted[0], wanted[2], wanted[3]]
    grads = BACKWARD.overload(
        grad.contiguous(), *ctx.saved_tensors, ctx.group, ctx.norm, ctx.norm_after,
        ctx.channels_first, ctx.eps, needs,
    )  # fmt: skip
    features, weight, bias = (g if need else None for g, need in zip(grads, needs, strict=True))
    return features, None, weight, bias, None, None, None, None, None


backends.differentiable("patch_merge", _backward, _save)
for op in (FORWARD, BACKWARD):
    backends.register_triton(op, "mmkernels.ops.patch_merge.triton")
