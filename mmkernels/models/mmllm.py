# SPDX-License-Identifier: Apache-2.0
"""The whole reference MM-LLM on one page: image and question in, text out.

```
pixel_values [B,3,H,W] uint8 ── encode: patch_embed, ViT ──▶ image_embeds [B,n,X]
  ── project: Q-Former (cross_attention), linear ──▶ image_features [B,Q,E] ┐
input_ids [B,L] with Q placeholders a sample ── merge_embeddings ───────────┴▶ inputs_embeds [B,L,E]
  ── decoder with KV cache ──▶ logits [B,L,V] ──▶ text
```

Dimensions: B samples, n feature tokens, X their width, Q image tokens, L tokens, E decoder width.
"""

from collections.abc import Sequence

import torch
from torch import nn

import mmkernels
from mmkernels.models import tokenizer
from mmkernels.models.config import MMConfig
from mmkernels.models.decoder import Decoder
from mmkernels.models.projector import Projector
from mmkernels.models.vision import VisionEncoder


class MMLLM(nn.Module):
    """Vision encoder, projector and language model.

    Source: the layout of BLIP-2 (Li et al. 2023) and its training stages.
    """

    def __init__(self, config: MMConfig | None = None) -> None:
        super().__init__()
        self.config = config or MMConfig()
        self.vision = VisionEncoder(self.config.vision)
        self.projector = Projector(self.config)
        self.language_model = Decoder(self.config.decoder)

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """``[B, 3, H, W]`` uint8 → ``[B, n, X]``; constant while the encoder is frozen."""
        image_embeds: torch.Tensor = self.vision(pixel_values)
        return image_embeds

    def project(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """``[B, n, X]`` → ``[B, Q, E]``."""
        image_features: torch.Tensor = self.projector(image_embeds)
        return image_features

    def embed(self, input_ids: torch.Tensor, image_features: torch.Tensor | None) -> torch.Tensor:
        """Token embeddings with each sample's features in its placeholders' rows, ``[B, L, E]``.

        Raises:
            ValueError: A sample does not have exactly Q placeholders; the message names it.
        """
        weight = self.language_model.model.embed_tokens.weight
        if image_features is None:
            return mmkernels.merge_embeddings(input_ids, weight, [])
        B, Q, _ = image_features.shape
        return mmkernels.merge_embeddings(
            input_ids,
            weight,
            [image_features],
            feature_token_ids=[tokenizer.IMAGE],
            feature_counts=[[Q] * B],
        )

    def forward(
        self, input_ids: torch.Tensor, image_features: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits ``[B, L, V]``; without features the text alone is modelled."""
        logits: torch.Tensor = self.language_model(self.embed(input_ids, image_features))
        return logits

    def forward_packed(
        self, plan: mmkernels.PackPlan, image_features: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits ``[T, V]`` of a plan's samples behind one another, without padding."""
        features = [] if image_features is None else [image_features]
        weight = self.language_model.model.embed_tokens.weight
        embeds = mmkernels.pack_embeddings(plan, weight, features)
        logits: torch.Tensor = self.language_model(embeds[None], plan.position_ids[None])[0]
        return logits

    @torch.no_grad()
    def answer(
        self, prompts: Sequence[str], image_features: torch.Tensor, max_new_tokens: int = 48
    ) -> list[str]:
        """Greedy answers, one a prompt and image, generated as one batch."""
        rows = [tokenizer.encode_prompt(p, image_features.shape[1]) for p in prompts]
        inputs_embeds = self.embed(tokenizer.pad(rows), image_features)
        lengths = torch.tensor([len(row) for row in rows])
        ids = self.language_model.generate(inputs_embeds, lengths, max_new_tokens, tokenizer.EOS)
        return [tokenizer.decode(row) for row in ids.tolist()]
