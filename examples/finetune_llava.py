# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a LLaVA-style model with and without ``mmkernels.patch``: step time, memory, losses.

``python examples/finetune_llava.py [--model FOLDER]``. Data are random: two images and captions a step.
"""

from typing import Any

import torch
from finetune import Batch, arguments, compare, load


def tiny() -> Any:
    """CLIP of two layers, an MLP, Llama of two layers."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    vision = {"model_type": "clip_vision_model", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
              "num_attention_heads": 4, "image_size": 224, "patch_size": 14}  # fmt: skip
    text = {"model_type": "llama", "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=999,
        image_token_id=999,
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config)


def batch(model: Any, seed: int) -> Batch:
    """Two samples: an image, a caption; the image learns nothing to say."""
    c, g = model.config, torch.Generator().manual_seed(seed)
    patches = (c.vision_config.image_size // c.vision_config.patch_size) ** 2
    text = torch.randint(5, 900, (2, 24), generator=g)
    ids = torch.cat([torch.full((2, patches), c.image_token_id), text], 1)
    pixels = torch.randn(2, 3, c.vision_config.image_size, c.vision_config.image_size, generator=g)
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(model.dtype),
        "labels": ids.masked_fill(ids == c.image_token_id, -100),
    }  # fmt: skip


if __name__ == "__main__":
    args = arguments("Fine-tunes a LLaVA-style model with and without mmkernels.patch.")
    model = load(args.model, tiny, args.dtype)
    compare(model, [batch(model, seed) for seed in range(args.steps)])
