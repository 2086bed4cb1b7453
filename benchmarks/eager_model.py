# SPDX-License-Identifier: Apache-2.0
"""The reference MM-LLM as codebases run it today, on the same weights: float images, padding, masked_scatter, and
transformers' own LlamaForCausalLM."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mmkernels.models import MMLLM, tokenizer
from mmkernels.models.vision import IMAGE_MEAN, IMAGE_STD, VisionEncoder

IMAGE = tokenizer.MODALITIES["image"]


class EagerMMLLM(nn.Module):
    """Shares the parameters of ``model``, whose projector is DropPrefix, perhaps Merge(2, 2), Linear, Linear."""

    def __init__(self, model: MMLLM) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        c = model.config.decoder
        config = LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.num_key_value_heads, rms_norm_eps=c.rms_norm_eps,
            max_position_embeddings=c.max_position_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            pad_token_id=tokenizer.PAD, bos_token_id=tokenizer.BOS, eos_token_id=tokenizer.EOS,
        )  # fmt: skip
        with torch.device("meta"):
            self.llama: Any = LlamaForCausalLM(config)
        self.llama.load_state_dict(model.language_model.state_dict(), assign=True)
        own = dict(model.language_model.named_parameters())
        for name, _ in list(self.llama.named_parameters()):
            module, _, leaf = name.rpartition(".")
            setattr(self.llama.get_submodule(module), leaf, own[name])
        kind = type(self.llama.model.rotary_emb)
        self.llama.model.rotary_emb = kind(config)
        encoder = model.encoder("image")
        assert isinstance(encoder, VisionEncoder)
        self.vision, self.projector = encoder, model.projectors["image"].get_submodule("blocks")

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """``[n, 3, H, W]`` uint8 → ``[n, q, E]``."""
        return self.project(self.encode(images))

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise, convolve, concatenate, add, ViT: ``[n, 1+N, D]``."""
        v = self.vision
        mean, std = (torch.tensor(x)[:, None, None] for x in (IMAGE_MEAN, IMAGE_STD))
        pixels = ((images.float() / 255 - mean) / std).to(v.weight.dtype)
        x = F.conv2d(pixels, v.weight, v.bias, v.weight.shape[-1]).flatten(2).mT + v.position_embed
        assert v.class_token is not None
        x = torch.cat((v.class_token.expand(len(x), 1, -1), x), 1)
        for layer in v.layers:
            x = self._block(layer, x)
        return F.layer_norm(x, v.norm.normalized_shape, v.norm.weight, v.norm.bias, v.norm.eps)

    def project(self, embeds: torch.Tensor) -> torch.Tensor:
        """LLaVA's MLP, over 2×2 neighbours where the projector merges."""
        n, tokens, D = embeds.shape
        grid = embeds[:, 1:]
        layers: list[Any] = list(self.projector.children())
        first, second = (block.linear for block in layers[-2:])
        if first.in_features == 4 * D:
            side = round((tokens - 1) ** 0.5)
            grid = (
                grid.view(n, side // 2, 2, side // 2, 2, D).transpose(2, 3).flatten(3).flatten(1, 2)
            )
        out: torch.Tensor = second(F.gelu(first(grid)))
        return out

    def loss(
        self, rows: Sequence[torch.Tensor], labels: Sequence[torch.Tensor], features: torch.Tensor
    ) -> torch.Tensor:
        """As a Trainer computes it: padded ids, masked_scatter, causal and padding mask, logits of every place."""
        ids = nn.utils.rnn.pad_sequence(list(rows), True, tokenizer.PAD)
        wanted = nn.utils.rnn.pad_sequence(list(labels), True, -100)
        embeds = self.llama.model.embed_tokens(ids)
        is_image = (ids == IMAGE)[..., None].expand_as(embeds)
        embeds = embeds.masked_scatter(is_image, features.to(embeds.dtype))
        out = self.llama(
            inputs_embeds=embeds, attention_mask=(ids != tokenizer.PAD).long(), labels=wanted, use_cache=False
        )  # fmt: skip
        loss: torch.Tensor = out.loss
        return loss

    @torch.no_grad()
    def generate(
        self, rows: Sequence[torch.Tensor], features: torch.Tensor, new: int
    ) -> list[list[int]]:
        """Greedy, padded on the left, as transformers' generate wants it."""
        longest = max(map(len, rows))
        ids = torch.stack([F.pad(r, (longest - len(r), 0), value=tokenizer.PAD) for r in rows])
        embeds = self.llama.model.embed_tokens(ids)
        embeds = embeds.masked_scatter((ids == IMAGE)[..., None].expand_as(embeds), features)
        out = self.llama.generate(
            inputs_embeds=embeds, attention_mask=(ids != tokenizer.PAD).long(), max_new_tokens=new,
            min_new_tokens=new, do_sample=False,
        )  # fmt: skip
        found: list[list[int]] = out.tolist()
        return found

    def _block(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        qkv = layer.qkv(layer.norm1(x)).unflatten(-1, (3, layer.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = x + layer.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        out: torch.Tensor = x + layer.fc2(F.gelu(layer.fc1(layer.norm2(x)), approximate="tanh"))
        return out
