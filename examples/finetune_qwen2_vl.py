# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a Qwen2-VL-style model with and without ``mmkernels.patch``: step time, memory, losses.

``python examples/finetune_qwen2_vl.py [--model FOLDER]``. Data are random: two images of different size a step.
"""

from typing import Any

import torch
from finetune import Batch, arguments, compare, load

GRIDS = torch.tensor([[1, 16, 20], [1, 12, 16]])  # of patches


def tiny() -> Any:
    """Two layers of each tower."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {"depth": 2, "embed_dim": 256, "hidden_size": 256, "num_heads": 4, "mlp_ratio": 2}
    text = {"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}}  # fmt: skip
    ids = {
        "image_token_id": 999,
        "video_token_id": 998,
        "vision_start_token_id": 997,
        "vision_end_token_id": 996,
    }
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
    )


def batch(model: Any, seed: int) -> Batch:
    """Two samples, padded right."""
    c, g = model.config, torch.Generator().manual_seed(seed)
    v = c.vision_config
    tokens = GRIDS.prod(1) // v.spatial_merge_size**2
    longest = int(tokens.max()) + 26
    ids, mask = torch.zeros(2, longest, dtype=torch.long), torch.zeros(2, longest, dtype=torch.long)
    for row, n in enumerate(tokens.tolist()):
        image = [c.vision_start_token_id, *[c.image_token_id] * n, c.vision_end_token_id]
        text = torch.randint(5, 900, (24,), generator=g)
        ids[row, : n + 26] = torch.cat([torch.tensor(image), text])
        mask[row, : n + 26] = 1
    width = v.in_channels * v.temporal_patch_size * v.patch_size**2
    pixels = torch.randn(int(GRIDS.prod(1).sum()), width, generator=g)
    return {
        "input_ids": ids, "attention_mask": mask, "pixel_values": pixels.to(model.dtype), "image_grid_thw": GRIDS,
        "mm_token_type_ids": (ids == c.image_token_id).int(),
        "labels": ids.masked_fill((ids == c.image_token_id) | (mask == 0), -100),
    }  # fmt: skip


if __name__ == "__main__":
    args = arguments("Fine-tunes a Qwen2-VL-style model with and without mmkernels.patch.")
    model = load(args.model, tiny, args.dtype)
    compare(model, [batch(model, seed) for seed in range(args.steps)])
