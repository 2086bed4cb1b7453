# SPDX-License-Identifier: Apache-2.0
"""Packing rows by a plan in plain PyTorch: the definition of correct.

Rows are copied bit by bit; ``embed_scale`` multiplies looked-up rows only, in fp32, rounded once. ``row_source`` as in
``merge_embeddings/reference.py``; a feature row is placed at most once, and one without a place has gradient 0. The
embedding gradient sums in fp32 (fp64 for float64) and rounds once.
"""

import torch

from mmkernels.ops.merge_embeddings.reference import gather_rows, merge_embeddings_backward


def pack_embeddings(
    row_source: torch.Tensor,
    embed_weight: torch.Tensor,
    features: list[torch.Tensor],
    embed_scale: float | None,
    padding_idx: int | None,
) -> torch.Tensor:
    """``[T, D]``."""
    _check(row_source, embed_weight.shape[0], sum(len(f) for f in features))
    return gather_rows(row_source, embed_weight, features, embed_scale)


def _check(row_source: torch.Tensor, vocab: int, count: int) -> None:
    bad = ((row_source >= vocab) | (row_source < -count)).nonzero().flatten()
    if len(bad):
        t = int(bad[0])
        raise ValueError(
            f"pack_embeddings: row_source[{t}] is {int(row_source[t])}, expected an id in [0, {vocab}) "
            f"or -1 - k of a feature row k in [0, {count})"
        )
    seen: set[int] = set()
    for t in (row_source < 0).nonzero().flatten().tolist():
        source = int(row_source[t])
        if source in seen:
            raise ValueError(
                f"pack_embeddings: row_source[{t}] is {source}, a feature row that already has a place"
            )
        seen.add(source)


# Its gradients: of the table [V, D] and of each feature, from grad and row_source.
pack_embeddings_backward = merge_embeddings_backward
