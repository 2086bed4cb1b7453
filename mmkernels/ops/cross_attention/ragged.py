# SPDX-License-Identifier: Apache-2.0
"""A packed context ``[T, X]`` with ``cu_seqlens`` as a padded one, and back: for whatever cannot walk it as it is."""

import torch
import torch.nn.functional as F


def padded(
    context: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[B, max_seqlen, X]`` and the mask ``[B, 1, 1, max_seqlen]`` of what is a token."""
    at = torch.arange(max_seqlen, device=cu_seqlens.device)
    inside = at < cu_seqlens.diff()[:, None]
    rows = torch.where(inside, cu_seqlens[:-1, None] + at, 0)
    if context.shape[0] == 0:  # a row to pad with; the gradient, of no rows, still has a path
        context = F.pad(context, (0, 0, 0, 1))
    dense = context.index_select(0, rows.flatten()).view(*rows.shape, context.shape[1])
    # What pads is 0: a row of another sample may hold NaN.
    return torch.where(inside[..., None], dense, 0), inside[:, None, None]


def packed(dense: torch.Tensor, cu_seqlens: torch.Tensor, total: int) -> torch.Tensor:
    """``[B, n, X]`` → ``[total, X]``, without the padding."""
    at = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sample = torch.searchsorted(cu_seqlens.contiguous(), at, right=True) - 1
    return dense[sample, at - cu_seqlens[sample]]
