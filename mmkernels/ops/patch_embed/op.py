# SPDX-License-Identifier: Apache-2.0
"""Patch embedding as torch ops: schema, shapes, autograd. The contract every kernel keeps.

``mmkernels::patch_embed`` and ``mmkernels::patch_embed_backward``; arguments are those of
``reference.py``. Kernels: ``csrc/patch_embed/patch_embed_cpu.cpp`` on CPU, ``triton.py`` on CUDA.
"""

from typing import Any

import torch

from mmkernels import backends
from mmkernels.ops.patch_embed import reference


def _fake(
    pixel_values: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    position_embed: torch.Tensor | None,
    prefix_tokens: torch.Tensor | None,
    pixel_scale: list[float] | None,
    pixel_shift: list[float] | None,
) -> torch.Tensor:
    B, _, H, W = pixel_values.shape
    D, _, P_h, P_w = weight.shape
    R = 0 if prefix_tokens is None else prefix_tokens.shape[0]
    return weight.new_empty(B, R + (H // P_h) * (W // P_w), D)


def _fake_backward(
    grad: torch.Tensor,
    pixel_values: torch.Tensor,
    weight: torch.Tensor,
    pixel_scale: list[float] | None,
    pixel_shift: list[float] | None,
    prefix_rows: int,
    position_rows: int,
    needs: list[bool],
) -> tuple[torch.Tensor, ...]:
    D = weight.shape[0]
    return (
        pixel_values.new_empty(pixel_values.shape if needs[0] else 0),
        weight.new_empty(weight.shape if needs[1] else 0),
        weight.new_empty(D if needs[2] else 0),
        weight.new_empty((position_rows, D) if needs[3] else 0),
        weight.new_empty((prefix_rows, D) if needs[4] else 0),
    )


FORWARD = backends.define(
    "patch_embed",
    "(Tensor pixel_values, Tensor weight, Tensor? bias, Tensor? position_embed,"
    " Tensor? prefix_tokens, float[]? pixel_scale, float[]? pixel_shift) -> Tensor",
    reference=reference.patch_embed,
    fake=_fake,
    autocast_skip=(0,),  # pixels are normalised in fp32 before they are rounded
)
BACKWARD = backends.define(
    "patch_embed_backward",
    "(Tensor grad, Tensor pixel_values, Tensor weight, float[]? pixel_scale, float[]? pixel_shift,"
    " int prefix_rows, int position_rows, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.patch_embed_backward,
    fake=_fake_backward,
    autocast_skip=(0, 1, 2),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    pixel_values, weight, _, position_embed, prefix_tokens, ctx.pixel_scale, ctx.pixel_shift = (
        inputs
    )
    ctx.save_for_backward(pixel_values, weight)
    ctx.position_rows = 0 if position_embed is None else position_embed.shape[0]
    ctx.prefix_rows = 0 if prefix_tokens is None else prefix_tokens.shape[0]


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    pixel_values, weight = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:5])
    grads = BACKWARD.overload(
        grad.contiguous(), pixel_values, weight, ctx.pixel_scale, ctx.pixel_shift,
        ctx.prefix_rows, ctx.position_rows, needs,
    )  # fmt: skip
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None, None)


backends.differentiable("patch_embed", _backward, _save)
for op in (FORWARD, BACKWARD):
    backends.register_triton(op, "mmkernels.ops.patch_embed.triton")
