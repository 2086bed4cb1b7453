# SPDX-License-Identifier: Apache-2.0
"""Patch embedding as torch ops: schema, shapes, autograd. The contract every kernel keeps.

``mmkernels::patch_embed`` and ``mmkernels::patch_embed_backward`` embed dense batches, packed lists and
rows alike (``layout.py`` says which tensors ``images`` may hold); ``mmkernels::patch_embed_grids`` tells
offsets and grids of a packed list. Arguments are those of ``reference.py``.
Kernels: ``csrc/patch_embed/patch_embed_cpu.cpp`` on CPU, ``triton.py`` on CUDA.
"""

import math
from typing import Any

import torch

from mmkernels import backends
from mmkernels.ops.patch_embed import reference
from mmkernels.ops.patch_embed.layout import Layout, patch_count

_LAYOUT = (
    "SymInt[] stride, SymInt[] sizes, str edge, int merge_size, bool prefix_last,"
    " str position_mode, bool align_corners, bool antialias"
)


def token_count(
    images: list[torch.Tensor],
    weight: torch.Tensor,
    prefix_rows: int,
    grid_thw: torch.Tensor | None,
    layout: Layout,
) -> Any:
    """From shapes alone, so also from symbolic ones; what does not fit is an error of the kernel."""
    if images and images[0].dim() == 2:
        count = layout.sizes[1] if grid_thw is None else grid_thw.shape[0]
        return images[0].shape[0] + count * prefix_rows
    sizes = [tuple(i.shape) for i in images]
    if images and images[0].dim() == 1:
        triples = zip(layout.sizes[::3], layout.sizes[1::3], layout.sizes[2::3], strict=True)
        sizes = [(0, *hw) if t == 0 else (0, t, *hw) for t, *hw in triples]
    total: Any = 0
    for size in sizes:
        batch = size[0] if len(size) == 5 else 1
        frames = 1 if len(size) == 3 else size[-3]
        edges = ["pad" if frames == 1 else layout.edge, layout.edge, layout.edge]
        axes = zip((frames, *size[-2:]), weight.shape[2:], layout.stride, edges, strict=True)
        total += batch * (prefix_rows + math.prod(_count(*axis) for axis in axes))
    return total


def _count(size: Any, patch: Any, stride: Any, edge: str) -> Any:
    if edge == "exact":  # no branch on a symbolic size; a rest is the kernel's error
        rest = (size - patch) // stride + 1
        return size // patch if stride == patch else torch.sym_max(rest, 0)
    return patch_count(size, patch, stride, edge)


def _fake(
    images: list[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    positions: list[torch.Tensor],
    prefix_tokens: torch.Tensor | None,
    grid_thw: torch.Tensor | None,
    pixel_scale: list[float] | None,
    pixel_shift: list[float] | None,
    *layout: Any,
) -> torch.Tensor:
    R = 0 if prefix_tokens is None else prefix_tokens.shape[0]
    tokens = token_count(images, weight, R, grid_thw, Layout(*layout))
    return weight.new_empty(tokens, weight.shape[0])


def _fake_backward(
    grad: torch.Tensor,
    images: list[torch.Tensor],
    weight: torch.Tensor,
    grid_thw: torch.Tensor | None,
    pixel_scale: list[float] | None,
    pixel_shift: list[float] | None,
    prefix_rows: int,
    position_shape: list[int],
    needs: list[bool],
    *layout: Any,
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, list[torch.Tensor], torch.Tensor]:
    D = weight.shape[0]
    return (
        [i.new_empty(i.shape if needs[0] else 0) for i in images],
        weight.new_empty(weight.shape if needs[1] else 0),
        weight.new_empty(D if needs[2] else 0),
        [weight.new_empty(s) for s in table_shapes(position_shape, D, Layout(*layout))]
        if needs[3]
        else [],
        weight.new_empty((prefix_rows, D) if needs[4] else 0),
    )


def table_shapes(position_shape: list[int], D: int, layout: Layout) -> list[tuple[int, ...]]:
    """The shapes of the position tables: two of rows if factorised, else one."""
    if layout.position_mode == "none":
        return []
    if layout.position_mode == "factorised":
        return [(n, D) for n in position_shape]
    return [(*position_shape, D)]


def _fake_grids(
    weight: torch.Tensor, images: list[torch.Tensor], prefix_rows: int, *layout: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    n = len(images) if not images or images[0].dim() > 1 else len(layout[1]) // 3
    device = weight.device
    return (
        torch.empty(n + 1, dtype=torch.int32, device=device),
        torch.empty(n, 3, dtype=torch.int64, device=device),
    )


FORWARD = backends.define(
    "patch_embed",
    "(Tensor[] images, Tensor weight, Tensor? bias, Tensor[] positions, Tensor? prefix_tokens,"
    f" Tensor? grid_thw, float[]? pixel_scale, float[]? pixel_shift, {_LAYOUT}) -> Tensor",
    reference=reference.patch_embed,
    fake=_fake,
    autocast_skip=(0,),  # pixels are normalised in fp32 before they are rounded
)
BACKWARD = backends.define(
    "patch_embed_backward",
    "(Tensor grad, Tensor[] images, Tensor weight, Tensor? grid_thw, float[]? pixel_scale,"
    " float[]? pixel_shift, int prefix_rows, SymInt[] position_shape, bool[] needs,"
    f" {_LAYOUT}) -> (Tensor[], Tensor, Tensor, Tensor[], Tensor)",
    reference=reference.patch_embed_backward,
    fake=_fake_backward,
    autocast_skip=(0, 1, 2),
)
GRIDS = backends.define(
    "patch_embed_grids",
    f"(Tensor weight, Tensor[] images, int prefix_rows, {_LAYOUT}) -> (Tensor, Tensor)",
    reference=reference.patch_embed_grids,
    fake=_fake_grids,
    autocast_skip=(0, 1),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    images, weight, _, positions, prefix_tokens, grid_thw, *ctx.numbers = inputs
    ctx.save_for_backward(weight, grid_thw, *images)
    ctx.image_needs = [i.requires_grad for i in images]
    shapes = [list(p.shape[:-1]) for p in positions]
    ctx.position_shape = [n for shape in shapes for n in shape]
    ctx.position_needs = [p.requires_grad for p in positions]
    ctx.prefix_rows = 0 if prefix_tokens is None else prefix_tokens.shape[0]
    # Lists come back as lists where torch takes them for lists of tensors: empty ones.
    ctx.number_grads = [[] if n == [] else None for n in ctx.numbers]


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    weight, grid_thw, *images = ctx.saved_tensors
    _, needs_weight, needs_bias, _, needs_prefix, *_ = ctx.needs_input_grad
    needs = [
        any(ctx.image_needs), needs_weight, needs_bias, any(ctx.position_needs), needs_prefix,
    ]  # fmt: skip
    scale, shift, *layout = ctx.numbers
    d_images, d_weight, d_bias, d_positions, d_prefix = BACKWARD.overload(
        grad.contiguous(), images, weight, grid_thw, scale, shift,
        ctx.prefix_rows, ctx.position_shape, needs, *layout,
    )  # fmt: skip
    return (
        [g if need else None for g, need in zip(d_images, ctx.image_needs, strict=True)],
        d_weight if needs_weight else None,
        d_bias if needs_bias else None,
        [g if need else None for g, need in zip(d_positions, ctx.position_needs, strict=False)]
        or [None] * len(ctx.position_needs),
        d_prefix if needs_prefix else None,
        None,
        *ctx.number_grads,
    )


backends.differentiable("patch_embed", _backward, _save)
for op in (FORWARD, BACKWARD):
    backends.register_triton(op, "mmkernels.ops.patch_embed.triton")
