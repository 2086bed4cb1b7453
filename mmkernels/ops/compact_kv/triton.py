# SPDX-License-Identifier: Apache-2.0
"""Compaction on CUDA: one launch for the keys of all layers, one for the values. A program moves a share of the
values of one sequence's slots in one layer, a block of tokens after the other: it reads a block before it writes it,
and the i-th kept token lies in slot i or later, so nothing is written that is still to be read. Bytes are moved as they
are. Lengths are clamped to their tables; pages that do not exist are neither read nor written.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _compact_kernel(
    cache, source_BL, new_lens, table, target,
    L, width, target_width, pages, heads_width, D,
    stride_layer, stride_page, stride_slot, stride_head, stride_value,
    PAGE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``source_BL[b, i]``: where the i-th token to keep lies."""
    b, layer = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    of_value = layer * stride_layer + (c // D) * stride_head + (c % D) * stride_value
    n = tl.minimum(tl.load(new_lens + b), target_width * PAGE)
    for i0 in range(0, n, BLOCK_T):
        i = i0 + tl.arange(0, BLOCK_T)
        j = tl.load(source_BL + b * L + i, mask=i < n, other=0)
        page = tl.load(table + b * width + j // PAGE, mask=i < n, other=-1).to(tl.int64)
        to = tl.load(target + b * target_width + i // PAGE, mask=i < n, other=-1).to(tl.int64)
        found = (page >= 0) & (page < pages) & (to >= 0) & (to < pages)
        moved = found & ((page != to) | (j % PAGE != i % PAGE))
        mask = moved[:, None] & (c < heads_width)[None, :]
        of_slot = page * stride_page + (j % PAGE) * stride_slot
        rows = tl.load(cache + of_slot[:, None] + of_value[None, :], mask=mask, other=0)
        tl.debug_barrier()  # all of a block is read before any of it is written
        of_slot = to * stride_page + (i % PAGE) * stride_slot
        tl.store(cache + of_slot[:, None] + of_value[None, :], rows, mask=mask)
        tl.debug_barrier()


def compact_kv(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    target_table: torch.Tensor,
    seq_lens: torch.Tensor,
    keep: torch.Tensor,
) -> torch.Tensor:
    """As ``reference.compact_kv``, but that nothing is checked."""
    (layers, pages, page_size, H, d), (B, L) = key_cache.shape, keep.shape
    room = block_table.shape[1] * page_size
    lens = seq_lens.clamp(0, min(room, L)).unsqueeze(1)
    kept = keep & (torch.arange(L, device=keep.device) < lens)
    new_lens = kept.sum(1)
    # the places of the kept tokens, in order, in front of those of the others
    source = (~kept).to(torch.int8).argsort(dim=1, stable=True)
    block_c = min(256, max(16, triton.next_power_of_2(H * d)))
    grid = (B, layers, triton.cdiv(H * d, block_c))
    if min(grid) and L:
        table, target = block_table.contiguous(), target_table.contiguous()
        for cache in (key_cache, value_cache):
            as_bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
            cache = cache.view(as_bits[cache.element_size()])
            _compact_kernel[grid](
                cache, source, new_lens, table, target, L, table.shape[1], target.shape[1], pages, H * d, d,
                *cache.stride(), PAGE=page_size, BLOCK_T=16, BLOCK_C=block_c, num_warps=4,
                num_stages=1,
            )  # fmt: skip
    return new_lens
