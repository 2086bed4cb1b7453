# SPDX-License-Identifier: Apache-2.0
"""Tiny VLMs of transformers, with samples as their processors give them: text alone, one image, several, video."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf

Sample = dict[str, Any]
VOCAB, IMAGE, VIDEO, START, END = 96, 90, 91, 92, 93
TEXT = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
}  # fmt: skip
SIGLIP = {**CLIP, "model_type": "siglip_vision_model"}


@dataclass(frozen=True)
class Model:
    """A class, its config, how many tokens an image has, and what media a sample brings."""

    kind: str
    config: Callable[[], Any]
    media: Callable[[int, int, torch.Generator], Sample]  # of images and videos, for the model
    image_tokens: Callable[[int], int]  # of the image of this number
    videos: bool = False

    def build(self) -> Any:
        torch.manual_seed(0)
        return getattr(tf, self.kind)._from_config(self.config(), attn_implementation="sdpa")


def text(g: torch.Generator, n: int) -> list[int]:
    return torch.randint(3, 80, (n,), generator=g).tolist()


def samples(model: Model, seed: int = 0) -> list[Sample]:
    """No image; one; two; with a video where the model takes one."""
    g = torch.Generator().manual_seed(seed)
    number, found = 0, []
    for images, videos in ((0, 0), (1, 0), (2, 0), (0, 0), (1, int(model.videos))):
        ids = text(g, 3)
        for _ in range(images):
            ids += [START, *[IMAGE] * model.image_tokens(number), END, *text(g, 2)]
            number += 1
        ids += [START, *[VIDEO] * (2 * 4), END, *text(g, 2)] * videos
        ids += text(g, 1 + images)
        sample: Sample = {"input_ids": torch.tensor(ids)}
        if model.kind.startswith(("Qwen", "Glm")):
            types = torch.tensor([{IMAGE: 1, VIDEO: 2}.get(i, 0) for i in ids])
            sample["mm_token_type_ids"] = types
        if images or videos:
            sample |= model.media(number - images, images, g)
        if videos:
            sample |= _video(g)
        found.append(sample)
    return found


GRIDS = ((1, 4, 4), (1, 2, 6), (1, 6, 4), (1, 2, 2))  # of patches; a token is 2 × 2 of them
WIDTH = 3 * 2 * 14 * 14


def _rows(first: int, images: int, g: torch.Generator) -> Sample:
    grids = [GRIDS[(first + i) % len(GRIDS)] for i in range(images)]
    n = sum(t * h * w for t, h, w in grids)
    return {
        "pixel_values": torch.randn(n, WIDTH, generator=g),
        "image_grid_thw": torch.tensor(grids),
    }


def _video(g: torch.Generator) -> Sample:
    rows = torch.randn(2 * 4 * 4, WIDTH, generator=g)
    return {"pixel_values_videos": rows, "video_grid_thw": torch.tensor([[2, 4, 4]])}


def _tokens_of_grid(number: int) -> int:
    _, h, w = GRIDS[number % len(GRIDS)]
    return h * w // 4


def _square(first: int, images: int, g: torch.Generator) -> Sample:
    return {"pixel_values": torch.randn(images, 3, 28, 28, generator=g)}


def _qwen(
    config: str, sections: list[int], vision: dict[str, Any], **more: Any
) -> Callable[[], Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections, **more}
    ids = {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
    }
    return lambda: getattr(tf, config)(
        text_config={**TEXT, "rope_parameters": rope, "pad_token_id": 0},
        vision_config=dict(vision),
        **ids,
    )


QWEN2 = {
    "depth": 2,
    "embed_dim": 32,
    "hidden_size": 32,
    "num_heads": 2,
    "patch_size": 14,
    "mlp_ratio": 1,
}
QWEN2_5 = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 14, "out_hidden_size": 32,
    "window_size": 56, "fullatt_block_indexes": [1],
}  # fmt: skip
QWEN3 = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 14, "out_hidden_size": 32,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
}  # fmt: skip
GLM = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 14, "out_hidden_size": 32,
    "image_size": 56, "spatial_merge_size": 2,
}  # fmt: skip


def _llava(config: str, vision: dict[str, Any], **more: Any) -> Callable[[], Any]:
    return lambda: getattr(tf, config)(
        text_config={"model_type": "llama", **TEXT}, vision_config=dict(vision),
        **{"image_token_index": IMAGE, "image_token_id": IMAGE, **more},
    )  # fmt: skip


MODELS = (
    Model("LlavaForConditionalGeneration", _llava("LlavaConfig", CLIP, vision_feature_layer=-1), _square, lambda i: 4),
    Model("VipLlavaForConditionalGeneration", _llava("VipLlavaConfig", CLIP, vision_feature_layers=[-1, -2]), _square,
          lambda i: 4),
    Model("AyaVisionForConditionalGeneration", _llava("AyaVisionConfig", SIGLIP, downsample_factor=2,
          adapter_layer_norm_eps=1e-6, vision_feature_layer=-1, vision_feature_select_strategy="full"), _square,
          lambda i: 1),
    Model("Cohere2VisionForConditionalGeneration", _llava("Cohere2VisionConfig", SIGLIP, downsample_factor=2,
          alignment_intermediate_size=48), _square, lambda i: 1),
    Model("Qwen2VLForConditionalGeneration", _qwen("Qwen2VLConfig", [1, 1, 2], QWEN2), _rows, _tokens_of_grid, True),
    Model("Qwen2_5_VLForConditionalGeneration", _qwen("Qwen2_5_VLConfig", [1, 1, 2], QWEN2_5), _rows, _tokens_of_grid,
          True),
    Model("Qwen3VLForConditionalGeneration", _qwen("Qwen3VLConfig", [2, 1, 1], QWEN3, mrope_interleaved=True), _rows,
          _tokens_of_grid),
    Model("InternVLForConditionalGeneration", _llava("InternVLConfig", {"model_type": "internvl_vision",
          "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": [28, 28], "patch_size": [14, 14]}, downsample_ratio=0.5), _square, lambda i: 1),
    Model("Glm4vForConditionalGeneration", _qwen("Glm4vConfig", [1, 1, 2], GLM), _rows, _tokens_of_grid),
)  # fmt: skip
