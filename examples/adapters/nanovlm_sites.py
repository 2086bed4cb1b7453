# SPDX-License-Identifier: Apache-2.0
"""nanoVLM's three call sites: patch embedding, pixel-shuffle projector, image tokens replaced.

Structures are those of nanoVLM's ``models/vision_transformer.py``, ``modality_projector.py`` and
``vision_language_model.py``. The first two are found by ``mmkernels.patch``; the third assigns by a boolean mask, which
``merge_embeddings`` does in one pass.
"""

import types

import torch
from compare import assert_close, same_patched
from torch import nn

import mmkernels


class ViTPatchEmbeddings(nn.Module):
    """``conv``, flatten, positions."""

    def __init__(self, side: int = 64, patch: int = 16, width: int = 48) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, patch, patch, padding="valid")
        self.position_embedding = nn.Parameter(torch.rand(1, (side // patch) ** 2, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).flatten(2).transpose(1, 2) + self.position_embedding


class ModalityProjector(nn.Module):
    """Neighbours side by side, one linear layer."""

    def __init__(self, width: int = 48, out: int = 32, factor: int = 2) -> None:
        super().__init__()
        self.cfg = types.SimpleNamespace(mp_pixel_shuffle_factor=factor)
        self.scale_factor = factor
        self.proj = nn.Linear(width * factor**2, out, bias=False)

    def pixel_shuffle(self, x: torch.Tensor) -> torch.Tensor:
        bsz, seq, embed_dim = x.size()
        side, f = int(seq**0.5), self.scale_factor
        x = x.view(bsz, side, side, embed_dim)
        x = (
            x.reshape(bsz, side // f, f, side // f, f, embed_dim)
            .permute(0, 1, 3, 2, 4, 5)
            .contiguous()
        )
        return x.reshape(bsz, (side // f) ** 2, embed_dim * f**2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.pixel_shuffle(x))


torch.manual_seed(0)
same_patched(ViTPatchEmbeddings(), torch.randn(2, 3, 64, 64))
same_patched(ModalityProjector(), torch.randn(2, 16, 48))

ids, image_token = torch.tensor([[1, 90, 90, 5], [90, 90, 7, 8]]), 90
embed, features = nn.Embedding(100, 32), torch.randn(4, 32)
theirs = embed(ids).clone()
theirs[ids == image_token] = features
ours = mmkernels.merge_embeddings(ids, embed.weight, [features], feature_token_ids=[image_token])
assert_close(ours, theirs, "_replace_img_tokens_with_embd")
print("_replace_img_tokens_with_embd: merge_embeddings agrees")
