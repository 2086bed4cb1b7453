# SPDX-License-Identifier: Apache-2.0
"""Packing as torch ops: schema, shapes, autograd. The contract every kernel keeps.

``mmkernels::pack_embeddings``, ``mmkernels::pack_embeddings_backward``; arguments are those of ``reference.py``.
Kernels: ``csrc/merge_embeddings/``, whose rows these are; only the plan comes from outside.
"""

from typing import Any

import torch

from mmkernels import backends
from mmkernels.ops.merge_embeddings import op as merge
from mmkernels.ops.pack_embeddings import reference


def _fake(
    row_source: torch.Tensor,
    embed_weight: torch.Tensor,
    features: list[torch.Tensor],
    embed_scale: float | None,
    padding_idx: int | None,
) -> torch.Tensor:
    return embed_weight.new_empty(row_source.shape[0], embed_weight.shape[1])


FORWARD = backends.define(
    "pack_embeddings",
    "(Tensor row_source, Tensor embed_weight, Tensor[] features, float? embed_scale, int? padding_idx) -> Tensor",
    reference=reference.pack_embeddings,
    fake=_fake,
    autocast_skip=(2,),  # features take the dtype of the embeddings where they are copied
)
BACKWARD = backends.define(
    "pack_embeddings_backward",
    "(Tensor grad, Tensor row_source, SymInt vocab, SymInt[] feature_lengths, float? embed_scale,"
    " int? padding_idx, bool[] needs) -> (Tensor, Tensor[])",
    reference=reference.pack_embeddings_backward,
    fake=merge.fake_backward,
    autocast_skip=(0,),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    row_source, embed_weight, features, ctx.embed_scale, ctx.padding_idx = inputs
    ctx.save_for_backward(row_source)
    ctx.vocab = embed_weight.shape[0]
    ctx.feature_lengths = [f.shape[0] for f in features]
    ctx.feature_dtypes = [f.dtype for f in features]
    ctx.feature_needs = [f.requires_grad for f in features]


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    (row_source,) = ctx.saved_tensors
    needs = [ctx.needs_input_grad[1], *ctx.feature_needs]
    d_text, d_features = BACKWARD.overload(
        grad.contiguous(), row_source, ctx.vocab, ctx.feature_lengths, ctx.embed_scale, ctx.padding_idx, needs
    )  # fmt: skip
    features = merge.feature_gradients(ctx, d_features)
    return None, d_text if needs[0] else None, features, None, None


backends.differentiable("pack_embeddings", _backward, _save)
