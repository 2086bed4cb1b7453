# SPDX-License-Identifier: Apache-2.0
"""What encoders give and projectors turn into rows of the text: tokens of several items behind one another."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

Grid = tuple[int, int, int]


class Features(NamedTuple):
    """``tokens`` ``[T, X]``; item i is t frames of ``prefix`` tokens and a grid of h × w, ``grids[i] = (t, h, w)``."""

    tokens: torch.Tensor
    grids: tuple[Grid, ...]
    prefix: int = 0

    @property
    def counts(self) -> list[int]:
        """Tokens of each item."""
        return [t * (self.prefix + h * w) for t, h, w in self.grids]

    @property
    def frames(self) -> list[int]:
        """Tokens of each frame of each item."""
        return [self.prefix + h * w for t, h, w in self.grids for _ in range(t)]


def join(parts: Sequence[Features]) -> Features:
    """Items of several behind one another."""
    tokens = torch.cat([p.tokens for p in parts])
    return Features(tokens, tuple(g for p in parts for g in p.grids), parts[0].prefix)


def select(features: Features, items: Iterable[int]) -> Features:
    """Those items, in that order."""
    parts, items = features.tokens.split(features.counts), list(items)
    tokens = torch.cat([parts[i] for i in items] or [features.tokens[:0]])
    return features._replace(tokens=tokens, grids=tuple(features.grids[i] for i in items))


def take_part(tokens: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """The same tokens; ``others``, of which nothing is used, get a gradient of zeros.

    For what a batch without media leaves out. FSDP adds gradients of all processes: each must have those of the same
    parameters.
    """
    if not torch.is_grad_enabled():
        return tokens
    return tokens + sum(x.flatten()[:0].sum().to(tokens.dtype) for x in others)


def padded(
    tokens: torch.Tensor, lengths: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``[T, X]`` → ``[B, longest, X]`` and which are real, ``[B, longest]`` (None: all)."""
    longest = max(lengths, default=0)
    if all(n == longest for n in lengths):
        return tokens.view(len(lengths), longest, tokens.shape[-1]), None
    dense = torch.nn.utils.rnn.pad_sequence(list(tokens.split(list(lengths))), batch_first=True)
    return dense, torch.arange(longest, device=tokens.device) < torch.tensor(
        lengths, device=tokens.device
    ).unsqueeze(1)
