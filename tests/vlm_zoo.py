# SPDX-License-Identifier: Apache-2.0
"""Multimodal classes of transformers, tiny and with random weights, and batches as their processors give them.

A config is the class's default made small, field by field (``SMALL``), with what a row says in addition. How many
tokens an image has is asked of the model itself.
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf

Inputs = dict[str, Any]
_VERSION = tuple(map(int, tf.__version__.split(".")[:2]))
CASES = ("text", "image", "images", "left", "right", "video", "audio")
VOCAB, IMAGE, VIDEO, START, END, AUDIO, SIDE, PATCH = 96, 90, 91, 92, 93, 94, 28, 14
SMALL: Inputs = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCAB, "image_size": SIDE, "patch_size": PATCH, "depth": 2,
    "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "max_position_embeddings": 512, "encoder_layers": 2,
    "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40, "d_model": 32, "projection_dim": 32, "out_hidden_size": 32, "moe_intermediate_size": 16,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "vision_feature_layer": -1, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4,
    "resampler_head_dim": 8, "num_query_tokens": 4, "encoder_hidden_size": 32, "sliding_window": 16,
    "num_position_embeddings": 16, "window_size": 56, "fullatt_block_indexes": [1], "deepstack_visual_indexes": [0],
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "image_token_id": IMAGE, "image_token_index": IMAGE,
    "video_token_id": VIDEO, "video_token_index": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
    "hidden_dim": 32, "layer_norm_eps": 1e-6, "attention_dropout": 0.0, "mlp_dim": 40, "audio_token_id": AUDIO,
    "audio_token_index": AUDIO,
}  # fmt: skip


def shrink(config: Any) -> Any:
    """The same kind of config, small."""
    config._experts_implementation = "eager"  # the others have no fp64
    for name, value in list(vars(config).items()):
        if isinstance(value, tf.PreTrainedConfig):
            shrink(value)
        elif name == "initializer_range" and value < 1e-3:
            config.initializer_range = 0.02  # BLIP's 1e-10: no logit shows what is in an image
        elif name == "layer_types" and value:
            config.layer_types = value[:2]
        elif name in SMALL and value is not None:
            small = SMALL[name]
            if name in ("patch_size", "image_size") and isinstance(value, list | tuple):
                small = [small] * len(value)
            with contextlib.suppress(Exception):  # a field of another type keeps its default
                setattr(config, name, small)
    return config


def square(n: int, g: torch.Generator) -> Inputs:
    return {"pixel_values": torch.randn(n, 3, SIDE, SIDE, generator=g)}


def tiles(n: int, g: torch.Generator) -> Inputs:
    """Three tiles an image (anyres)."""
    pixels = torch.randn(n, 3, 3, SIDE, SIDE, generator=g)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[SIDE, 2 * SIDE]] * n)}


def sized(n: int, g: torch.Generator) -> Inputs:
    return {**square(n, g), "image_sizes": torch.tensor([[SIDE, SIDE]] * n)}


def stacked(n: int, g: torch.Generator) -> Inputs:
    """All images of one sample."""
    pixels = torch.randn(1, n, 3, SIDE, SIDE, generator=g)
    return {"pixel_values": pixels, "pixel_attention_mask": torch.ones(1, n, SIDE, SIDE).bool()}


GRIDS = ((1, 4, 4), (1, 2, 6), (1, 6, 4), (1, 2, 2))  # of patches; a token is 2 × 2 of them


def rows(
    temporal: int = 2, images: str = "image_grid_thw"
) -> Callable[[int, torch.Generator], Inputs]:
    """Patches cut already, of images of several sizes."""

    def made(n: int, g: torch.Generator) -> Inputs:
        grids = [GRIDS[i % len(GRIDS)] for i in range(n)]
        patches = sum(t * h * w for t, h, w in grids)
        pixels = torch.randn(patches, 3 * temporal * PATCH * PATCH, generator=g)
        return {"pixel_values": pixels, images: torch.tensor(grids)}

    return made


def film(n: int, g: torch.Generator) -> Inputs:
    """Four frames of 4×4 patches in rows."""
    pixels = torch.randn(n * 2 * 16, 3 * 2 * PATCH * PATCH, generator=g)
    return {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([[2, 4, 4]] * n)}


def frames(n: int, g: torch.Generator) -> Inputs:
    return {"pixel_values_videos": torch.randn(n, 4, 3, SIDE, SIDE, generator=g)}


def enclosed(token: int, n: int) -> list[int]:
    """What stands in the text for an image, a video or a sound of n features."""
    return [START, *[token] * n, END]


@dataclass(frozen=True, eq=False)
class Entry:
    """``change`` is applied to the small config; ``count``: tokens of an image where the model does not tell."""

    kind: str
    images: Callable[[int, torch.Generator], Inputs] | None = square
    videos: Callable[[int, torch.Generator], Inputs] | None = None
    change: Callable[[Any], Any] = lambda c: None
    types: str = ""  # name of the input that says which tokens are images'
    count: int | Callable[[Inputs], list[int]] = 0
    reads: str = "text and media"  # or "always media": no call without; "media": no text
    placed: bool = True  # the text has placeholders
    several: bool = True
    generates: bool = True
    extra: Callable[[int], Inputs] = lambda samples: {}
    since: tuple[int, int] = (5, 3)  # an older transformers wants other inputs
    audios: Callable[[int, torch.Generator], Inputs] | None = None
    text: Callable[[int, int], list[int]] = enclosed
    finish: Callable[[Inputs], Inputs] = lambda inputs: inputs  # what depends on the whole batch
    loud: str = ""  # weights with this in their name keep the size of what they get; else no logit shows the features
    note: str = ""  # what is unlike the others

    @property
    def name(self) -> str:
        return self.kind.removesuffix("ForConditionalGeneration")

    def config(self) -> Any:
        """The class's own, small."""
        config = shrink(getattr(tf, self.kind).config_class())
        self.change(config)
        return config

    def build(self) -> Any:
        """In evaluation mode. What starts as zeros (gates, biases) is noise, so that it counts."""
        torch.manual_seed(0)
        model = getattr(tf, self.kind)(self.config()).eval()
        g = torch.Generator().manual_seed(1)
        for name, p in model.named_parameters():
            if p.ndim < 2 or not p.detach().any():
                p.data += 0.1 * torch.randn(p.shape, generator=g)
            elif self.loud and self.loud in name:
                p.data = torch.randn(p.shape, generator=g) * p[0].numel() ** -0.5
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.eos_token_id = None
        return model

    def batch(self, case: str, g: torch.Generator) -> Inputs | None:
        """Inputs of one of ``CASES``; None if the class has none."""
        media = {"image": self.images, "images": self.images, "video": self.videos, "audio": self.audios}  # fmt: skip
        if media.get(case, square) is None or (case == "images" and not self.several):
            return None
        if self.reads != "text and media" and case in ("text", "images"):
            return None
        if self.reads == "media":
            return self.images(2, g) if case == "image" and self.images is not None else None
        counts = {"text": [0, 0], "images": [0, 1, 2], "video": [0, 0], "audio": [0, 0]}
        return _batch(self, counts.get(case, [1, 1]), case, g)


@functools.cache
def _model(entry: Entry) -> Any:
    return entry.build()


@torch.no_grad()
def _tokens(entry: Entry, media: Inputs, kind: str) -> list[int]:
    """Of each image or video."""
    names = {
        "image": ("pixel_values", "get_image_features"),
        "video": ("pixel_values_videos", "get_video_features"),
        "audio": ("input_features", "get_audio_features"),
    }
    values, method = names[kind]
    if callable(entry.count):
        return entry.count(media)
    if entry.count or not entry.placed:
        return [entry.count] * len(next(iter(media.values())))
    model = _model(entry)
    model = model if hasattr(model, method) else model.model
    rest = {k: v for k, v in media.items() if k != values}
    found = getattr(model, method)(media[values], **rest, return_dict=True).pooler_output
    if torch.is_tensor(found):
        n = media[values].shape[entry.images is stacked]
        return [found.numel() // found.shape[-1] // n] * n
    return [len(f.flatten(0, -2)) for f in found]


def _batch(entry: Entry, counts: list[int], case: str, g: torch.Generator) -> Inputs:
    n = sum(counts) if entry.images is not None else 0
    media = entry.images(n, g) if n and entry.images is not None else {}
    lengths = _tokens(entry, media, "image") if n else []
    films = entry.videos(2, g) if case == "video" and entry.videos is not None else {}
    film_lengths = _tokens(entry, films, "video") if films else []
    heard = case == "audio" or (entry.images is None and case in ("left", "right"))
    sounds = entry.audios(2, g) if heard and entry.audios is not None else {}
    sound_lengths = _tokens(entry, sounds, "audio") if sounds else []
    ids, types, at = [], [], 0
    for row, count in enumerate(counts):
        pieces = [[*_text(3, g)]]
        for length in lengths[at : at + count]:
            pieces += [entry.text(IMAGE, length if entry.placed else 0), _text(2, g)]
        if films:
            pieces += [entry.text(VIDEO, film_lengths[row]), _text(2, g)]
        if sounds:
            pieces += [entry.text(AUDIO, sound_lengths[row]), _text(2, g)]
        at += count
        ids.append([x for p in pieces for x in p] + _text(2, g))
    if case not in ("left", "right"):
        longest = max(map(len, ids))
        ids = [row + _text(longest - len(row), g) for row in ids]
    else:
        ids[0] += _text(5, g)
    longest = max(map(len, ids))
    pad = [[0] * (longest - len(row)) for row in ids]
    mask = [[1] * len(row) for row in ids]
    left = case == "left"
    ids = [p + r if left else r + p for p, r in zip(pad, ids, strict=True)]
    mask = [p + m if left else m + p for p, m in zip(pad, mask, strict=True)]
    inputs = {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        **media,
        **films,
        **sounds,
    }
    if entry.types:
        types = [[{IMAGE: 1, VIDEO: 2, AUDIO: 3}.get(i, 0) for i in row] for row in ids]
        inputs[entry.types] = torch.tensor(types)
    inputs |= entry.extra(len(counts)) if n or films else {}
    return entry.finish(inputs)


def _text(n: int, g: torch.Generator) -> list[int]:
    return torch.randint(3, 80, (n,), generator=g).tolist()


def _set(**values: Any) -> Callable[[Any], None]:
    """``text_config__hidden_size=8`` sets it there."""

    def change(config: Any) -> None:
        for name, value in values.items():
            *path, last = name.split("__")
            setattr(functools.reduce(getattr, path, config), last, value)

    return change


def _mrope(*section: int, **more: Any) -> Inputs:
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(section), **more}


def patches(n: int, g: torch.Generator) -> Inputs:
    """Patches as pictures, one behind the other (PaddleOCR-VL)."""
    found = rows(1)(n, g)
    return {**found, "pixel_values": found["pixel_values"].view(-1, 3, PATCH, PATCH)}


def merged(n: int, g: torch.Generator) -> Inputs:
    return {**rows(1)(n, g), "image_merge_sizes": torch.tensor([2] * n)}


def clip_and_text(n: int, g: torch.Generator) -> Inputs:
    ids = torch.randint(3, 80, (n, 6), generator=g)
    return {**square(n, g), "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def clips(n: int, g: torch.Generator) -> Inputs:
    return {"pixel_values": torch.randn(n, 4, 3, SIDE, SIDE, generator=g)}


def spectrogram(n: int, g: torch.Generator) -> Inputs:
    return {"input_values": torch.randn(n, 48, 32, generator=g)}


def naflex_pixels(n: int, g: torch.Generator) -> Inputs:
    """Rows of patches, padded."""
    mask = torch.ones(n, 12).long()
    mask[0, 8:] = 0
    return {
        "pixel_values": torch.randn(n, 12, 3 * PATCH * PATCH, generator=g), "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor([[2, 4]] + [[3, 4]] * (n - 1)),
    }  # fmt: skip


def naflex(n: int, g: torch.Generator) -> Inputs:
    return {**naflex_pixels(n, g), "input_ids": torch.randint(3, 80, (n, 6), generator=g)}


def by_frames(token: int, n: int) -> list[int]:
    """A film is two frames, each after its time."""
    if token != VIDEO:
        return enclosed(token, n)
    return [x for time in (81, 82) for x in (time, *enclosed(token, n // 2))]


def of_images(inputs: Inputs) -> Inputs:
    """Frames have the token of images, and another type (GLM)."""
    ids = inputs["input_ids"]
    return {**inputs, "input_ids": torch.where(ids == VIDEO, IMAGE, ids)}


def small_film(n: int, g: torch.Generator) -> Inputs:
    """Patches without time; three tokens of the first film are left out: like those before (VideoLLaMA 3)."""
    return {
        **film(n, g), "pixel_values_videos": torch.randn(n * 2 * 16, 3 * PATCH * PATCH, generator=g),
        "video_merge_sizes": torch.tensor([2] * n), "video_compression_mask": torch.arange(n * 8) // 3 != 1,
    }  # fmt: skip


def tokens_kept(media: Inputs) -> list[int]:
    if "video_compression_mask" in media:
        return [int(kept.sum()) for kept in media["video_compression_mask"].split(8)]
    return (media["image_grid_thw"].prod(-1) // 4).tolist()


ROWS = {"images": rows(), "types": "mm_token_type_ids"}
QWEN = {**ROWS, "videos": film}
ROPE4 = _set(text_config__rope_parameters=_mrope(1, 1, 2))
# An older transformers wants the frames of a film otherwise.
FRAMES = {**QWEN, "text": by_frames} if _VERSION >= (5, 23) else ROWS
GLM_ROWS = {**FRAMES, "finish": of_images}
GLM = {**GLM_ROWS, "change": ROPE4}
QUERIES = {
    "count": 4, "reads": "always media", "change": _set(image_token_index=IMAGE, text_config__word_embed_proj_dim=32),
}  # fmt: skip
GRID = {"image_grid_pinpoints": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]}
_ENTRIES = (
    Entry("LlavaForConditionalGeneration"),
    Entry("LlavaNextForConditionalGeneration", tiles, change=_set(**GRID)),
    Entry("LlavaNextVideoForConditionalGeneration", tiles, frames, change=_set(**GRID)),
    Entry("LlavaOnevisionForConditionalGeneration", tiles, frames, change=_set(**GRID), since=(5, 23)),
    Entry("VipLlavaForConditionalGeneration", change=_set(vision_feature_layers=[-1, -2])),
    Entry("VideoLlavaForConditionalGeneration", since=(5, 23), videos=frames),
    Entry("AyaVisionForConditionalGeneration"),
    Entry("Cohere2VisionForConditionalGeneration"),
    Entry("PaliGemmaForConditionalGeneration", types="token_type_ids"),
    Entry("Gemma3ForConditionalGeneration", types="token_type_ids", change=_set(mm_tokens_per_image=1)),
    Entry("Idefics2ForConditionalGeneration", stacked),
    Entry("Idefics3ForConditionalGeneration", stacked),
    Entry("SmolVLMForConditionalGeneration", stacked),
    Entry("InternVLForConditionalGeneration"),
    Entry("QianfanOCRForConditionalGeneration"),
    Entry("Qwen2VLForConditionalGeneration", **QWEN, change=ROPE4),
    Entry("Qwen2_5_VLForConditionalGeneration", **QWEN, change=ROPE4),
    Entry("Qwen3VLForConditionalGeneration", **FRAMES),
    Entry("Qwen3VLMoeForConditionalGeneration", **FRAMES),
    Entry("Qwen3_5ForConditionalGeneration", **FRAMES,
          change=_set(text_config__layer_types=["linear_attention", "full_attention"])),
    Entry("Cosmos3OmniForConditionalGeneration", **FRAMES),
    Entry("Glm4vForConditionalGeneration", **GLM),
    Entry("Glm4vMoeForConditionalGeneration", **GLM_ROWS,
          change=_set(text_config__rope_parameters=_mrope(0, 1, 1, partial_rotary_factor=0.5))),
    Entry("Glm46VForConditionalGeneration", **GLM),
    Entry("GlmOcrForConditionalGeneration", **GLM),
    Entry("Exaone4_5_ForConditionalGeneration", rows(), film),
    Entry("HyperCLOVAXVisionV2ForConditionalGeneration", rows(), film),
    Entry("PaddleOCRVLForConditionalGeneration", patches, since=(5, 23), types="mm_token_type_ids",
          change=_set(text_config__rope_parameters=_mrope(2, 3, 3))),
    Entry("VideoLlama3ForConditionalGeneration", merged, small_film, count=tokens_kept),
    Entry("Mistral3ForConditionalGeneration", sized, change=_set(vision_config__head_dim=8)),
    Entry("LightOnOcrForConditionalGeneration", sized, change=_set(vision_config__head_dim=8)),
    Entry("Blip2ForConditionalGeneration", **QUERIES),
    Entry("InstructBlipForConditionalGeneration", **QUERIES,
          extra=lambda n: {"qformer_input_ids": torch.arange(3, 8).expand(n, 5)}),
    Entry("Ovis2ForConditionalGeneration"),
    Entry("DeepseekVLForConditionalGeneration"),
    Entry("AriaForConditionalGeneration", change=_set(projector_patch_to_query_dict={4: 2})),
    Entry("GitForCausalLM", placed=False, reads="always media"),
    Entry("Lfm2VlForConditionalGeneration", naflex_pixels, since=(5, 23), change=_set(image_token_id=IMAGE)),
    Entry("CLIPModel", clip_and_text, reads="media", generates=False),
    Entry("SiglipModel", clip_and_text, reads="media", generates=False,
          change=_set(text_config__projection_size=32)),
    Entry("Siglip2Model", naflex, reads="media", generates=False,
          change=_set(text_config__projection_size=32)),
    Entry("ChineseCLIPModel", clip_and_text, reads="media", generates=False),
    Entry("AltCLIPModel", clip_and_text, reads="media", generates=False),
    Entry("MetaClip2Model", clip_and_text, reads="media", generates=False),
    Entry("BlipForImageTextRetrieval", clip_and_text, reads="media", generates=False),
    Entry("ViTForImageClassification", reads="media", generates=False),
    Entry("DeiTForImageClassification", reads="media", generates=False),
    Entry("BeitForImageClassification", reads="media", generates=False),
    Entry("Dinov2ForImageClassification", reads="media", generates=False),
    Entry("Dinov2WithRegistersForImageClassification", reads="media", generates=False),
    Entry("DINOv3ViTModel", reads="media", generates=False),
    Entry("PixtralVisionModel", reads="media", generates=False, change=_set(head_dim=8)),
    Entry("VideoMAEForVideoClassification", clips, reads="media", generates=False, change=_set(num_frames=4)),
    Entry("VivitForVideoClassification", clips, reads="media", generates=False,
          change=_set(num_frames=4, tubelet_size=[2, PATCH, PATCH])),
    Entry("TimesformerForVideoClassification", clips, reads="media", generates=False),
    Entry("ASTForAudioClassification", spectrogram, reads="media", generates=False,
          change=_set(max_length=48, num_mel_bins=32)),
)  # fmt: skip
ZOO = tuple(e for e in _ENTRIES if hasattr(tf, e.kind) and e.since <= _VERSION)
