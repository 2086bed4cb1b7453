# SPDX-License-Identifier: Apache-2.0
"""The ops on DTensors: ``register()`` tells ``torch.distributed.tensor`` how their arguments may lie.

FSDP2 needs none of this: under it ops see whole parameters. With DTensors as arguments every op takes replicated ones;
``cross_attention`` also a sharded batch (each rank its images, weight gradients are partial sums), and ``mrope``
tokens that are sharded. Other shards are gathered by DTensor before the call. Where an op makes an index of its own
(``patch_merge``), call it within ``torch.distributed.tensor.experimental.implicit_replication()``.
"""

from typing import Any

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding
from torch.utils._pytree import tree_leaves

from mmkernels.ops import OPS

Placements = list[Any]


def register() -> None:
    """For every op, forward and backward; a second call does nothing."""
    ops = torch.ops.mmkernels
    for name in OPS:
        for suffix in ("", "_backward"):
            if hasattr(ops, name + suffix):
                _register(getattr(ops, name + suffix).default)


def _register(op: Any) -> None:
    results = [r.type for r in op._schema.returns]
    if not results or any(not isinstance(t, torch._C.TensorType) for t in results):
        return  # a list of gradients has no fixed number of placements

    def rule(*args: Any) -> list[tuple[Placements, Placements]]:
        """All replicated, and the sharding of this op."""
        tensors = [a for a in tree_leaves(list(args)) if hasattr(a, "tensor_meta")]
        found = [([Replicate()] * len(results), [Replicate()] * len(tensors))]
        sharded = SHARDED.get(op._schema.name.partition("::")[2])
        return found + ([sharded(args)] if sharded is not None else [])

    register_sharding(op)(rule)


def _by_batch(args: Any) -> tuple[Placements, Placements]:
    """query, context, latents and the mask by image, weights everywhere."""
    query, context, latents, w_k, w_v, b_k, b_v, mask = args[:8]
    lie = [_batch(query, 3), Shard(0), Shard(0), *[Replicate()] * 4, _batch(mask, 4)]
    return [Shard(0), Shard(0)], [p for p, a in zip(lie, args[:8], strict=True) if a is not None]


def _by_batch_backward(args: Any) -> tuple[Placements, Placements]:
    grad, query, context, latents, w_k, w_v, b_v, mask, dropout, cu_seqlens, out, lse = args[:12]
    by_image = _batch(query, 3)
    lie = [
        Shard(0), by_image, Shard(0), Shard(0), *[Replicate()] * 3, _batch(mask, 4), _batch(dropout, 4), Replicate(),
        Shard(0), Shard(0),
    ]  # fmt: skip
    dquery = by_image if isinstance(by_image, Shard) else Partial()
    results = [dquery, Shard(0), Shard(0), Partial(), Partial(), Partial(), _batch(mask, 4)]
    return results, [p for p, a in zip(lie, args[:12], strict=True) if a is not None]


def _batch(spec: Any, dims: int) -> Any:
    """By image, unless one row serves all."""
    shape: Any = () if spec is None else spec.tensor_meta.shape
    return Shard(0) if len(shape) == dims and shape[0] > 1 else Replicate()


def _by_token(args: Any) -> tuple[Placements, Placements]:
    """query and key ``[T, heads, d]`` by token, and the tokens' positions."""
    position = args[2].tensor_meta.shape
    lie = [Shard(0), Shard(0), Shard(len(position) - 1), Replicate(), Replicate()]
    return [Shard(0), Shard(0)], [p for p, a in zip(lie, args[:5], strict=True) if a is not None]


SHARDED = {
    "cross_attention": _by_batch, "cross_attention_backward": _by_batch_backward, "mrope": _by_token,
    "mrope_backward": _by_token,
}  # fmt: skip
