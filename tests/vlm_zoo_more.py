# SPDX-License-Identifier: Apache-2.0
"""The rest of the zoo: classes that place features otherwise, or that want more than pixels. All of it is ``ZOO``."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
import vlm_zoo as zoo
from vlm_zoo import END, IMAGE, PATCH, SIDE, START, VIDEO, Entry, Inputs
from vlm_zoo import _mrope as mrope
from vlm_zoo import _set as fields
from vlm_zoo_audio import SOUND


def marked(inputs: Inputs) -> Inputs:
    """Where the features go is an input (Kosmos)."""
    return {**inputs, "image_embeds_position_mask": (inputs["input_ids"] == IMAGE).long()}


def flattened(n: int, g: torch.Generator) -> Inputs:
    """Patches in rows, each after its row and column, counted from one (Pix2Struct)."""
    places = torch.tensor([[1.0 + i // 3, 1.0 + i % 3] for i in range(6)]).expand(n, -1, -1)
    pixels = torch.randn(n, 6, 3 * 4 * 4, generator=g)
    return {
        "flattened_patches": torch.cat([places, pixels], dim=-1), "width": torch.tensor([3] * n),
        "height": torch.tensor([2] * n),
    }  # fmt: skip


def of_side(side: int, **more: Callable[[int, torch.Generator], Any]) -> Callable[..., Inputs]:
    def made(n: int, g: torch.Generator) -> Inputs:
        pixels = torch.randn(n, 3, side, side, generator=g)
        return {"pixel_values": pixels, **{k: f(n, g) for k, f in more.items()}}

    return made


def tiled(inputs: Inputs) -> Inputs:
    """Images of each sample side by side, with tiles of no image, and who sees which (Mllama)."""
    if "pixel_values" not in inputs:
        return inputs
    ids, pixels, mask = inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"]
    counts = (ids == IMAGE).sum(1).tolist()
    most, tiles = max(counts), pixels.shape[1]
    found = torch.zeros(len(ids), most, *pixels.shape[1:])
    kinds, there = torch.zeros(len(ids), most).long(), torch.zeros(len(ids), most, tiles).long()
    there[..., 0] = 1  # an image that is not there has one tile of zeros
    seen, at = torch.zeros(*ids.shape, most, tiles).long(), 0
    for row, count in enumerate(counts):
        found[row, :count] = pixels[at : at + count]
        kinds[row, :count], there[row, :count] = 2, 1  # one above the other
        starts = [*(ids[row] == IMAGE).nonzero().flatten().tolist(), ids.shape[1]]
        for i in range(count):
            seen[row, starts[i] : starts[i + 1], i] = 1
        seen[row][mask[row] == 0] = 0
        at += count
    return {
        **inputs, "pixel_values": found, "aspect_ratio_ids": kinds, "aspect_ratio_mask": there,
        "cross_attention_mask": seen,
    }  # fmt: skip


def two_tiles(n: int, g: torch.Generator) -> Inputs:
    return {"pixel_values": torch.randn(n, 2, 3, SIDE, SIDE, generator=g)}


def films_of_four(n: int, g: torch.Generator) -> Inputs:
    return {"pixel_values": torch.randn(n, 4, 3, SIDE, SIDE, generator=g)}


SAM = {
    "output_channels": 8, "window_size": 2, "global_attn_indexes": [1], "image_size": 64, "patch_size": 4,
    "initializer_range": 0.02,
}  # fmt: skip


def sam(part: str, **more: Any) -> Callable[[Any], None]:
    return fields(**{f"{part}__{k}": v for k, v in {**SAM, **more}.items()})


def looked_at(inputs: Inputs) -> Inputs:
    """Images of each sample side by side, black where there is none, and the last one before a token (Idefics)."""
    ids, pixels, mask = inputs["input_ids"], inputs.get("pixel_values"), inputs["attention_mask"]
    counts = (ids == IMAGE).sum(1).tolist()
    found = torch.zeros(len(ids), max(1, *counts), 3, SIDE, SIDE)
    number = (ids == IMAGE).cumsum(1) * mask
    if pixels is not None:
        for row, part in enumerate(pixels.split(counts)):
            found[row, : len(part)] = part
    seen = torch.arange(1, found.shape[1] + 1) == number[..., None]
    return {**inputs, "pixel_values": found, "image_attention_mask": seen.long()}


def in_rows(token: int, n: int) -> list[int]:
    """Two patches a row, and a line's end (Fuyu)."""
    return [START, *[token, token, 89] * (n // 2), END]


def rows_of(n: int, g: torch.Generator) -> Inputs:
    return {"pixel_values": torch.randn(n, 4, 3 * PATCH * PATCH, generator=g)}


def crops(n: int, g: torch.Generator) -> Inputs:
    """A whole image and one crop of it, 2×2 patches each, pooled by two rows; a token each (Molmo2)."""
    rows = torch.arange(8 * n).view(-1, 2)
    return {
        "pixel_values": torch.randn(2 * n, 4, 3 * PATCH * PATCH, generator=g), "image_token_pooling": rows,
        "image_grids": torch.tensor([[2, 1, 2, 1]] * n), "image_num_crops": torch.tensor([2] * n),
    }  # fmt: skip


def cropped_film(n: int, g: torch.Generator) -> Inputs:
    return {
        "pixel_values_videos": torch.randn(2 * n, 4, 3 * PATCH * PATCH, generator=g),
        "video_token_pooling": torch.arange(8 * n).view(-1, 2), "video_grids": torch.tensor([[2, 2, 1]] * n),
    }  # fmt: skip


def molmo_types(inputs: Inputs) -> Inputs:
    """Images and films have the same token, and what encloses them counts as theirs."""
    ids = inputs["input_ids"]
    ids[ids == VIDEO] = IMAGE
    types = (ids == IMAGE) | (ids == START) | (ids == END)
    return {**inputs, "mm_token_type_ids": types.long()}


def strips(n: int, g: torch.Generator) -> Inputs:
    """All images in one strip a patch high (MiniCPM-V)."""
    sizes = [((4, 4), (4, 8), (8, 4))[i % 3] for i in range(n)]
    long = sum(h * w for h, w in sizes) * PATCH
    return {
        "pixel_values": torch.randn(1, 3, PATCH, long, generator=g),
        "target_sizes": torch.tensor(sizes),
    }


def film_strip(n: int, g: torch.Generator) -> Inputs:
    """Two frames a film."""
    pixels = torch.randn(1, 3, PATCH, n * 2 * 16 * PATCH, generator=g)
    return {"pixel_values_videos": pixels, "target_sizes_videos": torch.tensor([[4, 4]] * (2 * n))}


def sixteen_patches(media: Inputs) -> list[int]:
    """Are a token."""
    if "target_sizes" in media:
        return (media["target_sizes"].prod(-1) // 16).tolist()
    return [2] * (len(media["target_sizes_videos"]) // 2)


def hunyuan_types(inputs: Inputs) -> Inputs:
    return {**inputs, "mm_token_type_ids": (inputs["input_ids"] == IMAGE).int()}


def unmerged(n: int, g: torch.Generator) -> Inputs:
    return zoo.rows(1)(n, g)


def ernie_film(n: int, g: torch.Generator) -> Inputs:
    """Two frames are one, after the tower."""
    pixels = torch.randn(n * 2 * 16, 3 * PATCH * PATCH, generator=g)
    return {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([[2, 4, 4]] * n)}


def expert_types(inputs: Inputs) -> Inputs:
    """What the experts of vision get: what encloses an image too (Ernie 4.5)."""
    ids = inputs["input_ids"]
    return {**inputs, "moe_mm_token_type_ids": ((ids >= IMAGE) & (ids <= END)).int()}


def with_pixtral(config: Any) -> None:
    config.vision_config = zoo.shrink(tf.PixtralVisionConfig())
    config.vision_config.head_dim = 8
    config.vision_feature_select_strategy = "full"


def tile_tokens(media: Inputs) -> list[int]:
    return [1] * media["pixel_values"].shape[1]


def tiles_of_one(n: int, g: torch.Generator) -> Inputs:
    return {**zoo.stacked(n, g), "pixel_attention_mask": torch.ones(1, n).bool()}


KOSMOS = {"count": 4, "finish": marked, "reads": "always media", "loud": "image_to_text"}
KOSMOS_TEXT = {"text_config__embed_dim": 32, "text_config__ffn_dim": 40, "text_config__layers": 2,
               "text_config__attention_heads": 4, "latent_query_num": 4, "text_config__dropout": 0.0}  # fmt: skip
MAP = {
    "<image>": IMAGE,
    "<|extra_200|>": 89,
    **{f"<|visual token {i:06d}|>": 40 + i for i in range(32)},
}
_ENTRIES = (
    Entry("MllamaForConditionalGeneration", two_tiles, count=1, finish=tiled,
          change=fields(vision_config__num_global_layers=1, vision_config__intermediate_layers_indices=[0, 1],
                        vision_config__max_num_tiles=2, vision_config__vision_output_dim=96,
                        vision_config__supported_aspect_ratios=[[1, 1], [1, 2]],
                        vision_config__attention_heads=4, text_config__cross_attention_layers=[1],
                        text_config__vocab_size=zoo.VOCAB),
          note="features are keys of cross-attention, not tokens"),
    Entry("Kosmos2ForConditionalGeneration", **KOSMOS, change=fields(**KOSMOS_TEXT),
          note="features are put at image_embeds_position_mask by index; it has no fp64"),
    Entry("Kosmos2_5ForConditionalGeneration", flattened, **KOSMOS,
          change=fields(**KOSMOS_TEXT, vision_config__patch_embed_hidden_size=48, vision_config__max_num_patches=8),
          note="features are put at image_embeds_position_mask by index"),
    Entry("GotOcr2ForConditionalGeneration", of_side(64), change=sam("vision_config")),
    Entry("JanusForConditionalGeneration",
          change=fields(vq_config__base_channels=32, vq_config__channel_multiplier=[1, 1], vq_config__num_patches=2,
                        vq_config__num_embeddings=16, vq_config__latent_channels=8, vq_config__num_res_blocks=1,
                        vq_config__embed_dim=8, vision_config__depth=2, vq_config__projection_dim=32,
                        vq_config__image_token_embed_dim=32, vision_config__num_attention_heads=4)),
    Entry("DeepseekVLHybridForConditionalGeneration",
          of_side(SIDE, high_res_pixel_values=lambda n, g: torch.randn(n, 3, 64, 64, generator=g)),
          change=sam("high_res_vision_config")),
    Entry("Emu3ForConditionalGeneration",
          of_side(16, image_sizes=lambda n, g: torch.tensor([[16, 16]] * n)),
          change=fields(vocabulary_map=MAP, vq_config__codebook_size=32, vq_config__base_channels=32,
                        vq_config__embed_dim=4, vq_config__channel_multiplier=[1, 1], vq_config__num_res_blocks=1,
                        vq_config__hidden_size=32, vq_config__attn_resolutions=[],
                        vq_config__num_attention_heads=1),
          note="features are rows of the embedding table: no gradient reaches the vision tower"),
    Entry("InstructBlipVideoForConditionalGeneration", films_of_four, count=16, reads="always media",
          change=fields(video_token_index=IMAGE, text_config__word_embed_proj_dim=32),
          extra=lambda n: {"qformer_input_ids": torch.arange(3, 8).expand(n, 5)}),
    Entry("BlipForConditionalGeneration", placed=False, reads="always media",
          note="features are keys of cross-attention"),
    Entry("Florence2ForConditionalGeneration", of_side(64), count=5, loud="o",
          change=fields(vision_config__embed_dim=[8, 16, 16, 32], vision_config__num_heads=[2, 2, 2, 2],
                         vision_config__num_groups=[2, 2, 2, 2], vision_config__depths=[1, 1, 1, 1],
                         vision_config__patch_size=[7, 3, 3, 3], vision_config__window_size=4,
                         vision_config__projection_dim=32, vision_config__mlp_ratio=2.0,
                         text_config__decoder_start_token_id=2, text_config__forced_eos_token_id=None,
                         text_config__forced_bos_token_id=None),
          note="an encoder and a decoder: tokens of the prompt have no logits"),
    Entry("FuyuForCausalLM", rows_of, count=4, text=in_rows, change=fields(text_config__partial_rotary_factor=0.5),
          note="no vision tower: a linear layer of patches"),
    Entry("IdeficsForVisionText2Text", count=1, finish=looked_at, loud="cross_attn",
          change=fields(vision_config__num_attention_heads=4, additional_vocab_size=0, use_resampler=True,
                        freeze_text_layers=False, freeze_vision_layers=False, freeze_lm_head=False,
                        perceiver_config__use_resampler=True, cross_layer_interval=1),
          note="features are keys of gated cross-attention; black images where there is none"),
    Entry("Molmo2ForConditionalGeneration", crops, cropped_film, count=4, finish=molmo_types, loud="projector",
          change=fields(vision_config__image_size=[SIDE, SIDE], vision_config__num_position_embeddings=4,
                        vision_config__num_key_value_heads=4, adapter_config__text_hidden_size=32,
                        adapter_config__vision_feature_layer=[0, -1], text_config__additional_vocab_size=0,
                        image_patch_id=IMAGE, image_start_token_id=START, image_end_token_id=END),
          note="features are added to the placeholders' embeddings"),
    Entry("MiniCPMV4_6ForConditionalGeneration", strips, film_strip, count=sixteen_patches,
          change=fields(vision_config__insert_layer_id=0, insert_layer_id=0, image_token_id=IMAGE,
                        video_token_id=VIDEO, text_config__layer_types=["linear_attention", "full_attention"])),
    Entry("HunYuanVLForConditionalGeneration", unmerged, finish=hunyuan_types,
          change=fields(text_config__rope_parameters=mrope(2, 2, 2, 2), text_config__head_dim=16,
                        vision_config__max_image_size=56, vision_config__text_hidden_size=32,
                        vision_config__num_key_value_heads=4, vision_config__img_max_token_num=64)),
    Entry("Ernie4_5_VLMoeForConditionalGeneration", unmerged, ernie_film, types="mm_token_type_ids",
          finish=expert_types,
          change=fields(text_config__moe_intermediate_size=[16, 12], text_config__moe_num_experts=4,
                        text_config__moe_k=2, text_config__mlp_layer_types=["dense", "sparse"],
                        text_config__rope_parameters=mrope(1, 1, 2))),
    Entry("Qwen3_5MoeForConditionalGeneration", **zoo.FRAMES,
          change=fields(text_config__layer_types=["linear_attention", "full_attention"],
                        text_config__shared_expert_intermediate_size=16)),
    Entry("LlavaForConditionalGeneration", zoo.sized, change=with_pixtral, note="Pixtral's tower"),
    Entry("GraniteDoclingForConditionalGeneration", tiles_of_one, count=tile_tokens,
          change=fields(vision_config__scale_factor=2)),
    Entry("Step3p7ForConditionalGeneration", change=fields(text_config__sliding_window=16)),
    Entry("Lfm3VlForConditionalGeneration", zoo.rows(),
          change=fields(text_config__layer_types=["conv", "full_attention"], image_token_id=IMAGE)),
    Entry("OwlViTModel", zoo.clip_and_text, reads="media", generates=False),
    Entry("Aimv2Model", zoo.clip_and_text, reads="media", generates=False),
    Entry("IJepaForImageClassification", reads="media", generates=False),
)  # fmt: skip
# Run with transformers 5.24 only: an older one may want other inputs.
MORE = tuple(e for e in (*_ENTRIES, *SOUND) if hasattr(tf, e.kind) and zoo._VERSION >= (5, 24))
ZOO = (*zoo.ZOO, *MORE)
SKIPPED: tuple[tuple[str, str], ...] = (
    ("PerceptionLMForConditionalGeneration", "its vision tower is timm's, which is not installed"),
    ("Gemma3nForConditionalGeneration", "its vision tower is timm's, which is not installed"),
    (
        "Llama4ForConditionalGeneration",
        "forward of transformers 5.24 reads image_outputs of an output without it",
    ),
    ("ViltModel", "it draws the patches that it reads at random: two calls differ"),
    ("XCLIPModel", "its output is logits_per_video, which test_patch_classes.py does not look for"),
    (
        "SwinForImageClassification",
        "its default of four stages does not become small by the fields of SMALL",
    ),
    (
        "ChameleonForConditionalGeneration",
        "not tried beyond the default config, which does not build",
    ),
    ("FastVlmForConditionalGeneration", "its vision tower is timm's, which is not installed"),
)
