# SPDX-License-Identifier: Apache-2.0
"""nanoVLM's three call sites: patch embedding, pixel-shuffle projector, image tokens replaced.

With nanoVLM's folder on the path (it is no package: ``models/…``) its own classes are taken. Otherwise what is below,
which has the structure and the names of its ``models/vision_transformer.py``, ``models/modality_projector.py`` and
``models/vision_language_model.py``. ``mmkernels.patch`` finds the first two; the third assigns by a boolean mask, which
``merge_embeddings`` does together with the token lookup.
"""

import types
from typing import Any

import torch
from compare import same_op, same_patched, show
from torch import nn

import mmkernels

CONFIG = types.SimpleNamespace(
    vit_img_size=64, vit_patch_size=16, vit_hidden_dim=48, vit_cls_flag=False, mp_pixel_shuffle_factor=2,
    lm_hidden_dim=32,
)  # fmt: skip
IMAGE_TOKEN = 90


class ViTPatchEmbeddings(nn.Module):
    """``conv``, a class token if asked for, positions."""

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        width, patch = cfg.vit_hidden_dim, cfg.vit_patch_size
        places = (cfg.vit_img_size // patch) ** 2
        self.cls_flag = cfg.vit_cls_flag
        self.conv = nn.Conv2d(3, width, patch, patch, padding="valid")
        if self.cls_flag:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embedding = nn.Parameter(torch.rand(1, places + self.cls_flag, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).flatten(2).transpose(1, 2)
        if self.cls_flag:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        return x + self.position_embedding


class ModalityProjector(nn.Module):
    """Neighbours side by side, one linear layer."""

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.cfg, self.scale_factor = cfg, cfg.mp_pixel_shuffle_factor
        width = cfg.vit_hidden_dim * self.scale_factor**2
        self.proj = nn.Linear(width, cfg.lm_hidden_dim, bias=False)

    def pixel_shuffle(self, x: torch.Tensor) -> torch.Tensor:
        bsz, seq, embed_dim = x.size()
        side, f = int(seq**0.5), self.scale_factor
        x = x.view(bsz, side, side, embed_dim)
        x = x.reshape(bsz, side // f, f, side // f, f, embed_dim)
        x = x.permute(0, 1, 3, 2, 4, 5).contiguous()
        return x.reshape(bsz, (side // f) ** 2, embed_dim * f**2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.pixel_shuffle(x))


def replace_img_tokens_with_embd(
    input_ids: torch.Tensor, token_embd: torch.Tensor, image_embd: torch.Tensor
) -> torch.Tensor:
    """``VisionLanguageModel._replace_img_tokens_with_embd``."""
    updated = token_embd.clone()
    updated[input_ids == IMAGE_TOKEN] = image_embd.view(-1, image_embd.size(-1)).to(updated.dtype)
    return updated


def main() -> None:
    try:
        from models.modality_projector import ModalityProjector as Projector
        from models.vision_transformer import ViTPatchEmbeddings as Embeddings
    except ImportError:
        Embeddings, Projector = ViTPatchEmbeddings, ModalityProjector  # type: ignore[misc,assignment]
    torch.manual_seed(0)
    ids = torch.tensor([[1, 90, 90, 5], [90, 90, 7, 8]])
    embedding, features = nn.Embedding(100, 32), torch.randn(2, 2, 32, requires_grad=True)
    theirs = replace_img_tokens_with_embd(ids, embedding(ids), features)
    ours = mmkernels.merge_embeddings(
        ids, embedding.weight, [features.flatten(0, 1)], feature_token_ids=[IMAGE_TOKEN]
    )
    inputs = [embedding.weight, features]
    show(
        same_patched(Embeddings(CONFIG), torch.randn(2, 3, 64, 64)),
        same_patched(Projector(CONFIG), torch.randn(2, 16, 48)),
        same_op("_replace_img_tokens_with_embd", "merge_embeddings", ours, theirs, inputs),
    )


if __name__ == "__main__":
    main()
