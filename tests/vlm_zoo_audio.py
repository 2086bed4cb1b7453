# SPDX-License-Identifier: Apache-2.0
"""Classes of the zoo that hear: audio alone, and with images and films."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
import vlm_zoo as zoo
from vlm_zoo import AUDIO, END, IMAGE, PATCH, SIDE, START, VIDEO, Entry, Inputs
from vlm_zoo import _mrope as mrope
from vlm_zoo import _set as fields


def placed_patches(n: int, g: torch.Generator) -> Inputs:
    """Patches in rows with their x and y; the first image has fewer (Gemma 4)."""
    places = torch.tensor([[i % 4, i // 4] for i in range(16)]).repeat(n, 1, 1)
    places[0, 8:] = -1
    pixels = torch.rand(n, 16, 3 * PATCH * PATCH, generator=g)
    pixels[0, 8:] = 0
    return {"pixel_values": pixels, "image_position_ids": places}


def film_of_placed_patches(n: int, g: torch.Generator) -> Inputs:
    """Two frames each."""
    found = placed_patches(2 * n, g)
    found["image_position_ids"][0] = found["image_position_ids"][1]
    return {
        "pixel_values_videos": found["pixel_values"], "video_position_ids": found["image_position_ids"],
        "num_frames_per_video": torch.tensor([2] * n),
    }  # fmt: skip


def mel(
    bins: int, frames: int, mask: str = "", shorter: int = 0
) -> Callable[[int, torch.Generator], Inputs]:
    """Spectrograms [n, bins, frames]; the first is shorter."""

    def made(n: int, g: torch.Generator) -> Inputs:
        found = {"input_features": torch.randn(n, bins, frames, generator=g)}
        if mask:
            there = torch.ones(n, frames).long()
            there[0, frames - shorter :] = 0
            found |= {mask: there}
        return found

    return made


def quarters(mask: str) -> Callable[[Inputs], list[int]]:
    """Two strides of two."""
    return lambda media: [((int(n) - 1) // 2 + 1 - 2) // 2 + 1 for n in media[mask].sum(-1)]


def with_towers(family: str, audio: Inputs, **values: Any) -> Callable[[Any], None]:
    """A config that has no towers by default, with small ones."""

    def change(config: Any) -> None:
        config.vision_config = zoo.shrink(getattr(tf, f"{family}VisionConfig")())
        config.audio_config = zoo.shrink(getattr(tf, f"{family}AudioConfig")(**audio))
        fields(**values)(config)

    return change


def gemma_sounds(n: int, g: torch.Generator) -> Inputs:
    there = torch.ones(n, 32).bool()
    return {"input_features": torch.randn(n, 32, 16, generator=g), "input_features_mask": there}


def granite_sounds(n: int, g: torch.Generator) -> Inputs:
    """The mask is of what the projector gives: three of a window of fifteen."""
    there = torch.ones(n, 6).bool()
    there[0, 4:] = False
    return {"input_features": torch.randn(n, 30, 16, generator=g), "input_features_mask": there}


OMNI = {
    "audio_config__num_mel_bins": 16, "audio_config__output_dim": 32, "audio_config__max_source_positions": 16,
    "image_token_id": IMAGE, "video_token_id": VIDEO, "audio_token_id": AUDIO, "vision_start_token_id": START,
    "vision_end_token_id": END, "audio_start_token_id": 88, "audio_end_token_id": 89, "position_id_per_seconds": 2,
}  # fmt: skip
omni_sounds = mel(16, 16, "feature_attention_mask", 4)


def omni_film(n: int, g: torch.Generator) -> Inputs:
    return {**zoo.film(n, g), "video_second_per_grid": torch.tensor([1.0] * n)}


def omni_count(media: Inputs) -> list[int]:
    """2×2 patches; of a sound a quarter. The long ones are Qwen 3's: 13 of each hundred, and an eighth of the rest."""
    for name in ("image_grid_thw", "video_grid_thw"):
        if name in media:
            return (media[name].prod(-1) // 4).tolist()
    lengths = media["feature_attention_mask"].sum(-1).tolist()
    if max(lengths) > 100:
        return [n // 100 * 13 + (n % 100 + 7) // 8 for n in lengths]
    return quarters("feature_attention_mask")(media)


def phi_crops(n: int, g: torch.Generator) -> Inputs:
    """A whole image and one crop of it, 2×2 patches each."""
    return {
        "image_pixel_values": torch.randn(n, 2, 3, SIDE, SIDE, generator=g),
        "image_sizes": torch.tensor([[SIDE, SIDE]] * n), "image_attention_mask": torch.ones(n, 2, 2, 2).bool(),
    }  # fmt: skip


def phi_sounds(n: int, g: torch.Generator) -> Inputs:
    there = torch.ones(n, 32).bool()
    there[0, 24:] = False
    return {
        "audio_input_features": torch.randn(n, 32, 32, generator=g), "audio_attention_mask": there,
        "audio_embed_sizes": torch.tensor([3] + [4] * (n - 1)),
    }  # fmt: skip


def phi_count(media: Inputs) -> list[int]:
    """A row of a crop and of the whole ends with a separator, and there is one between them."""
    return (
        media["audio_embed_sizes"].tolist()
        if "audio_embed_sizes" in media
        else [5] * len(media["image_sizes"])
    )


def sixteenths(media: Inputs) -> list[int]:
    """A stride of two, then four to a token (GLM-ASR)."""
    return [((int(n) - 1) // 2 + 1 - 4) // 4 + 1 for n in media["input_features_mask"].sum(-1)]


SOUND = (
    Entry("Gemma4ForConditionalGeneration", placed_patches, film_of_placed_patches, types="mm_token_type_ids",
          audios=gemma_sounds,
          change=with_towers(
              "Gemma4", {"subsampling_conv_channels": [16, 8], "output_proj_dims": 32},
              vision_config__pooling_kernel_size=2, vision_config__position_embedding_size=8,
              vision_config__num_key_value_heads=4, text_config__hidden_size_per_layer_input=8,
              text_config__vocab_size_per_layer_input=zoo.VOCAB,
              text_config__layer_types=["sliding_attention", "full_attention"]),
          note="its audio tower has no fp64"),
    Entry("Qwen2AudioForConditionalGeneration", None, audios=mel(8, 32, "feature_attention_mask", 8),
          count=quarters("feature_attention_mask"),
          change=fields(audio_config__max_source_positions=16, audio_config__num_mel_bins=8)),
    Entry("AudioFlamingo3ForConditionalGeneration", None, audios=mel(8, 32, "input_features_mask", 8),
          count=quarters("input_features_mask"),
          change=fields(audio_config__max_source_positions=16, audio_config__num_mel_bins=8)),
    Entry("VoxtralForConditionalGeneration", None, audios=mel(8, 32), count=4,
          change=fields(audio_config__max_source_positions=16, audio_config__num_mel_bins=8,
                        audio_config__intermediate_size=128, audio_token_id=AUDIO)),
    Entry("GraniteSpeechForConditionalGeneration", None, audios=granite_sounds, loud="projector",
          count=lambda media: media["input_features_mask"].sum(-1).tolist(),
          change=fields(encoder_config__input_dim=16, encoder_config__num_layers=2, encoder_config__output_dim=8,
                        encoder_config__dim_head=8, encoder_config__num_heads=4, encoder_config__context_size=10,
                        encoder_config__max_pos_emb=16, encoder_config__conv_kernel_size=3, window_size=15,
                        has_lora_adapter=False)),
    Entry("Qwen2_5OmniThinkerForConditionalGeneration", zoo.rows(), omni_film, audios=omni_sounds,
          change=fields(**OMNI, text_config__rope_parameters=mrope(1, 1, 2), audio_config__n_window=4),
          count=omni_count),
    Entry("Qwen3OmniMoeThinkerForConditionalGeneration", zoo.rows(), omni_film,
          audios=mel(16, 120, "feature_attention_mask", 20), count=omni_count, loud="audio_tower",
          change=fields(**OMNI, text_config__rope_parameters=mrope(3, 3, 2, mrope_interleaved=True),
                        audio_config__n_window=50, audio_config__n_window_infer=100,
                        audio_config__downsample_hidden_size=8, text_config__shared_expert_intermediate_size=16)),
    Entry("Phi4MultimodalForCausalLM", phi_crops, audios=phi_sounds, count=phi_count, loud="audio_embed",
          change=fields(audio_config__num_blocks=2, audio_config__ext_pw_out_channel=32,
                        audio_config__depthwise_separable_out_channel=32, audio_config__nemo_conv_channels=8,
                        audio_config__input_size=32, vision_config__crop_size=SIDE, audio_config__nemo_final_size=4,
                        audio_config__bias_max_distance=8),
          note="features are put by index_put"),
    Entry("GlmAsrForConditionalGeneration", None, audios=mel(8, 32, "input_features_mask", 16), count=sixteenths,
          change=fields(audio_config__num_mel_bins=8, audio_config__max_position_embeddings=16, audio_token_id=AUDIO,
                        audio_config__intermediate_size=128)),
)  # fmt: skip
