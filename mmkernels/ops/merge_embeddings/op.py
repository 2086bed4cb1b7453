# SPDX-License-Identifier: Apache-2.0
"""Merging as torch ops: schema, shapes, autograd. The contract every kernel keeps.

``mmkernels::merge_embeddings``, ``mmkernels::merge_embeddings_backward``; arguments are those of
``reference.py``. Kernels: ``csrc/merge_embeddings/`` (C++ on CPU, CUDA C++ on CUDA).
"""

from typing import Any

import torch

from mmkernels import backends
from mmkernels.ops.merge_embeddings import reference


def _fake(
    input_ids: torch.Tensor,
    embed_weight: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    features: list[torch.Tensor],
    feature_token_ids: list[int],
    feature_rows: list[torch.Tensor],
    feature_counts: list[int] | None,
    embed_scale: float | None,
    padding_idx: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    text = inputs_embeds if inputs_embeds is not None else embed_weight
    assert text is not None
    merged = text.new_empty((*input_ids.shape, text.shape[-1]))
    return merged, torch.empty(input_ids.numel(), dtype=torch.int64, device=input_ids.device)


def fake_backward(
    grad: torch.Tensor,
    row_source: torch.Tensor,
    vocab: int,
    feature_lengths: list[int],
    embed_scale: float | None,
    padding_idx: int | None,
    needs: list[bool],
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    D = grad.shape[-1]
    text_rows = vocab or row_source.shape[0]
    d_text = grad.new_empty((text_rows, D) if needs[0] else 0)
    pairs = zip(feature_lengths, needs[1:], strict=True)
    return d_text, [grad.new_empty((n, D) if need else 0) for n, need in pairs]


FORWARD = backends.define(
    "merge_embeddings",
    "(Tensor input_ids, Tensor? embed_weight, Tensor? inputs_embeds, Tensor[] features,"
    " int[] feature_token_ids, Tensor[] feature_rows, SymInt[]? feature_counts, float? embed_scale,"
    " int? padding_idx) -> (Tensor, Tensor)",
    reference=reference.merge_embeddings,
    fake=_fake,
    autocast_skip=(3,),  # features take the text's dtype where they are copied
)
OUT = backends.define(  # not differentiable: for graphs and serving, whose memory is theirs
    "merge_embeddings_out",
    "(Tensor(a!) out, Tensor input_ids, Tensor? embed_weight, Tensor? inputs_embeds, Tensor[] features,"
    " int[] feature_token_ids, Tensor[] feature_rows, SymInt[]? feature_counts, float? embed_scale) -> Tensor",
    reference=reference.merge_embeddings_out,
    fake=lambda out, input_ids, *rest: input_ids.new_empty(input_ids.numel(), dtype=torch.int64),
    autocast_skip=(0, 4),
)
BACKWARD = backends.define(
    "merge_embeddings_backward",
    "(Tensor grad, Tensor row_source, SymInt vocab, SymInt[] feature_lengths, float? embed_scale,"
    " int? padding_idx, bool[] needs) -> (Tensor, Tensor[])",
    reference=reference.merge_embeddings_backward,
    fake=fake_backward,
    autocast_skip=(0,),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, embed_weight, inputs_embeds, features, _, _, _, ctx.embed_scale, ctx.padding_idx = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.from_embeds = inputs_embeds is not None
    ctx.text_shape = (inputs_embeds if ctx.from_embeds else embed_weight).shape
    ctx.feature_lengths = [f.shape[0] for f in features]
    ctx.feature_dtypes = [f.dtype for f in features]
    # Lists come back as lists where torch takes them for lists of tensors: empty ones, and features.
    ctx.list_grads = [
        [None] * len(i) if isinstance(i, list) and not _numbers(i) else None for i in inputs
    ]
    ctx.feature_needs = [f.requires_grad for f in features]


def feature_gradients(ctx: Any, found: list[torch.Tensor]) -> list[torch.Tensor | None]:
    """Each in its feature's dtype, None where none is needed."""
    each = zip(found, ctx.feature_needs, ctx.feature_dtypes, strict=True)
    return [g.to(dtype) if need else None for g, need, dtype in each]


def _numbers(values: list[Any]) -> bool:
    return bool(values) and not isinstance(values[0], torch.Tensor)


def _backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[Any, ...]:
    (row_source,) = ctx.saved_tensors
    needs_text = ctx.needs_input_grad[2 if ctx.from_embeds else 1]
    d_text, d_features = BACKWARD.overload(
        grad.contiguous(), row_source, 0 if ctx.from_embeds else ctx.text_shape[0],
        ctx.feature_lengths, ctx.embed_scale, ctx.padding_idx, [needs_text, *ctx.feature_needs],
    )  # fmt: skip
    text = d_text.view(ctx.text_shape) if needs_text else None
    features = feature_gradients(ctx, d_features)
    weight, embeds = (None, text) if ctx.from_embeds else (text, None)
    lists = ctx.list_grads
    return None, weight, embeds, features, lists[4], lists[5], lists[6], None, None


backends.differentiable("merge_embeddings", _backward, _save)
