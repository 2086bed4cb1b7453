# SPDX-License-Identifier: Apache-2.0
"""Samples into bins of at most so many tokens: first-fit decreasing, deterministic."""

from collections.abc import Sequence

from mmkernels import checks


def pack_bins(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of the samples of each bin, rising; bins in the order they were opened.

    The longest first, each into the first bin with room: at most 11/9 of the fewest bins, plus one (Johnson 1973).
    O(S log S) by a tree of the room left. For a batch sampler: every bin is a batch.

    Raises:
        ValueError: A sample longer than a bin; names it.
    """
    for i, length in enumerate(lengths):
        if not 0 <= length <= max_tokens:
            checks.fail("plan_pack", f"the length of sample {i}", length, f"in [0, {max_tokens}]")
    leaves = 1 << max(1, len(lengths) - 1).bit_length()
    room = [max_tokens] * (2 * leaves)  # of a tree: a node has the most room of its leaves
    bins: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= lengths[i] else 2 * node + 1
        if node - leaves == len(bins):
            bins.append([])
        bins[node - leaves].append(i)
        room[node] -= lengths[i]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return [sorted(samples) for samples in bins]
