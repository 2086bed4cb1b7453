# SPDX-License-Identifier: Apache-2.0
"""Absorbed cross-attention as torch ops: schema, shapes, autograd. The contract every kernel keeps.

``mmkernels::cross_attention``, ``mmkernels::cross_attention_backward``; arguments are those of
``reference.py``. Saved for the backward: inputs, output and lse; never K or V. Kernels:
``csrc/cross_attention/cross_attention_cpu.cpp`` on CPU, ``triton.py`` on CUDA.
"""

from typing import Any

import torch

from mmkernels import backends
from mmkernels.ops.cross_attention import reference


def _fake(
    query: torch.Tensor,
    context: torch.Tensor,
    latents: torch.Tensor | None,
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
    key_bias: torch.Tensor | None,
    value_bias: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    dropout_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    num_heads: int,
    scale: float,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    B, Q = context.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, query.shape[-2]
    acc = torch.promote_types(query.dtype, torch.float32)
    out = query.new_empty(B, Q, value_weight.shape[0])
    return out, query.new_empty(B, num_heads, Q, dtype=acc)


def _fake_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    context: torch.Tensor,
    latents: torch.Tensor | None,
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
    value_bias: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    dropout_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    max_seqlen: int,
    num_heads: int,
    scale: float,
    dropout_p: float,
    needs: list[bool],
) -> tuple[torch.Tensor, ...]:
    bias_shape, of_latents = value_weight.shape[:1], (0,) if latents is None else latents.shape
    shapes = (
        query.shape, context.shape, of_latents, key_weight.shape, value_weight.shape, bias_shape,
    )  # fmt: skip
    found = [query.new_empty(s if need else 0) for s, need in zip(shapes, needs, strict=False)]
    n = context.shape[1] if cu_seqlens is None else max_seqlen
    n += 0 if latents is None else latents.shape[1]
    return (*found, lse.new_empty((*lse.shape, n) if needs[6] else 0))


FORWARD = backends.define(
    "cross_attention",
    "(Tensor query, Tensor context, Tensor? latents, Tensor key_weight, Tensor value_weight, Tensor? key_bias,"
    " Tensor? value_bias, Tensor? attention_mask, Tensor? dropout_mask, Tensor? cu_seqlens, SymInt max_seqlen,"
    " int num_heads, float scale, float dropout_p) -> (Tensor, Tensor)",
    reference=reference.cross_attention,
    fake=_fake,
)
BACKWARD = backends.define(
    "cross_attention_backward",
    "(Tensor grad, Tensor query, Tensor context, Tensor? latents, Tensor key_weight, Tensor value_weight,"
    " Tensor? value_bias, Tensor? attention_mask, Tensor? dropout_mask, Tensor? cu_seqlens, Tensor out, Tensor lse,"
    " SymInt max_seqlen, int num_heads, float scale, float dropout_p, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.cross_attention_backward,
    fake=_fake_backward,
    autocast_skip=tuple(range(12)),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, ctx.max_seqlen, ctx.heads, ctx.scale, ctx.dropout_p = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    (
        query,
        context,
        latents,
        key_weight,
        value_weight,
        key_bias,
        value_bias,
        mask,
        dropout,
        cu_seqlens,
        out,
        lse,
    ) = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    needs = [*wanted[:5], wanted[6], wanted[7]]
    grads = BACKWARD.overload(
        grad.contiguous(), query, context, latents, key_weight, value_weight, value_bias, mask, dropout,
        cu_seqlens, out, lse, ctx.max_seqlen, ctx.heads, ctx.scale, ctx.dropout_p, needs,
    )  # fmt: skip
    q, x, more, w_k, w_v, b_v, m = (
        g if need else None for g, need in zip(grads, needs, strict=True)
    )
    # Adding q · b_k to a whole row of scores changes nothing, so its gradient is exactly 0.
    b_k = torch.zeros_like(key_bias) if wanted[5] else None
    m = m if m is None else m.to(mask.dtype)
    return q, x, more, w_k, w_v, b_k, b_v, m, None, None, None, None, None, None


backends.differentiable("cross_attention", _backward, _save)
for op in (FORWARD, BACKWARD):
    backends.register_triton(op, "mmkernels.ops.cross_attention.triton")
