# SPDX-License-Identifier: Apache-2.0
"""Systems whose input projector is a Perceiver or a resampler, and that answer in text."""

from dataclasses import replace

from mmkernels.models.config import (
    DropPrefixConfig,
    FramePlaceConfig,
    LinearConfig,
    PerceiverConfig,
    ResamplerConfig,
)
from mmkernels.models.presets import components as c
from mmkernels.models.presets.schema import PROJECTORS, READ, RECALLED, Part, Preset, Stage, no_such

GATED = "*.gated.*"


def flamingo_perceiver(width: int) -> PerceiverConfig:
    return PerceiverConfig(64, 6, 8, 8, 64, 4 * width, norm="layer", mlp="gelu")


_FLAMINGO = Stage((PROJECTORS, GATED), "Flamingo, Alayrac et al. 2022, section 2")
FLAMINGO = Preset(
    "Flamingo",
    {"image": c.NFNET_F6, "video": "image"},
    {
        "image": Part(
            (FramePlaceConfig(8), flamingo_perceiver(1536)),
            "vectors for frames (a picture is one), Perceiver: 64 latents, 6 layers, 8 heads x 64, LayerNorm on both,"
            " no bias",
            "open_flamingo open_flamingo/src/helpers.py:25-133", READ, "8 frames are recalled",
            "194 M (Flamingo, table 5, whose heads are wider; recalled)",
        ),
        "video": "image",
    },
    Part(
        replace(
            c.llama(8192, 32768, 80, 64, 32000, 2048), gated_layers=tuple(range(0, 80, 7)), gated_num_heads=8,
            gated_head_dim=64, gated_feature_size=1536,
        ),
        "Chinchilla-70B and tanh-gated cross-attention 8 x 64 before every 7th layer",
        "open_flamingo open_flamingo/src/helpers.py:136-277; sizes of Chinchilla and every 7th recalled", RECALLED,
        f"{c.LLAMA_LIKE}; its MLP has a third matrix",
        "70 B and 10 B gated (Flamingo, table 5, whose gated heads are wider; recalled)",
    ),
    _FLAMINGO,
    no_such(_FLAMINGO),
)  # fmt: skip

_MPT_7B = Part(
    replace(
        c.llama(4096, 16384, 32, 32, 50432, 2048), gated_layers=tuple(range(3, 32, 4)), gated_num_heads=8,
        gated_head_dim=64, gated_feature_size=1024,
    ),
    "MPT-7B and gated cross-attention 8 x 64 before every 4th layer",
    "open_flamingo open_flamingo/src/helpers.py:136-277; sizes of MPT and every 4th recalled", RECALLED,
    f"{c.LLAMA_LIKE}; ALiBi is not built, its MLP has a third matrix", "7 B without the gated layers (its name)",
)  # fmt: skip
OTTER = Preset(
    "Otter",
    {"image": c.CLIP_L, "video": "image"},
    {
        "image": Part(
            (DropPrefixConfig(), flamingo_perceiver(1024)),
            "Perceiver: 64 latents, 6 layers, 8 heads x 64 (IDEFICS: 16 heads x 96)",
            "open_flamingo open_flamingo/src/helpers.py:25-133; transformers idefics/perceiver.py:46,106",
        ),
        "video": "image",
    },
    _MPT_7B,
    Stage(
        (PROJECTORS, GATED, "language_model.model.embed_tokens.*"), "open_flamingo open_flamingo/src/factory.py", READ
    ),
    Stage((PROJECTORS, GATED, "language_model.model.embed_tokens.*"), "Otter, Li et al. 2023"),
)  # fmt: skip

MPLUG_OWL = Preset(
    "mPLUG-Owl",
    {"image": c.CLIP_L},
    {
        "image": Part(
            (PerceiverConfig(64, 6, 16, 16, 64, 2816, norm="layer"), LinearConfig(4096)),
            "abstractor: 64 queries, 6 layers, 16 heads x 64, keys of (latents, features), SwiGLU with a norm inside;"
            " Linear; an eos vector",
            "mPLUG-Owl configuration_mplug_owl.py:132-253", READ,
            "no norm inside the SwiGLU, no biases, no eos vector; MLP 2816 is Owl2's",
        )
    },
    replace(c.LLAMA_7B, config=replace(c.LLAMA_7B.config, lora_rank=8, lora_targets=("q_proj", "v_proj"))),
    Stage(("encoders.*", PROJECTORS), "mPLUG-Owl, Ye et al. 2023"),
    Stage(("*lora_*",), "mPLUG-Owl, Ye et al. 2023"),
)  # fmt: skip

QWEN_VL = Preset(
    "Qwen-VL",
    {"image": c.CLIP_BIG_G_448},
    {
        "image": Part(
            (DropPrefixConfig(), ResamplerConfig(256, 4096, 32, query_grid=True)),
            "256 queries, one attention of 32 heads x 128, LayerNorm on queries and keys, 2-D sines on both, norm"
            " and matrix behind",
            "vLLM layers/resampler.py:155-290; 256 queries, sines on queries, norm and matrix recalled", RECALLED,
            "the class token is dropped",
            "0.08 B (Qwen-VL, Bai et al. 2023, table 1; recalled)",
        )
    },
    c.QWEN_7B, Stage(("encoders.*", PROJECTORS), "Qwen-VL, Bai et al. 2023, section 3"),
    Stage((PROJECTORS, "language_model.*"), "Qwen-VL, Bai et al. 2023, section 3"),
)  # fmt: skip

MINICPM_V = Preset(
    "MiniCPM-V",
    {"image": c.SIGLIP_980},
    {
        "image": Part(
            (ResamplerConfig(64, 3584, 28),),
            "64 queries, one attention of heads x 128, kv_proj, 2-D sines on keys, norm and matrix behind",
            "vLLM models/minicpmv.py:171-436; 64 queries recalled", RECALLED,
        )
    },
    c.QWEN2_7B, Stage((PROJECTORS,), "MiniCPM-V, Yao et al. 2024, section 4"),
    Stage(("encoders.*", PROJECTORS, "language_model.*"), "MiniCPM-V, Yao et al. 2024, section 4"),
)  # fmt: skip

ANYMAL = Preset(
    "AnyMAL",
    {"image": c.CLIP_L},
    {
        "image": Part(
            (DropPrefixConfig(), flamingo_perceiver(1024), LinearConfig(8192)), "Perceiver", "AnyMAL, Moon et al. 2023",
            RECALLED, "stand-in: Flamingo's sizes; AnyMAL's were not read",
        )
    },
    replace(
        c.LLAMA2_70B, config=replace(c.LLAMA2_70B.config, lora_rank=8, lora_targets=("q_proj", "v_proj")),
        published="LLaMA-2-70B, with LoRA in tuning", differs="the rank of LoRA is ours",
    ),
    Stage((PROJECTORS,), "AnyMAL, Moon et al. 2023"), Stage((PROJECTORS, "*lora_*"), "AnyMAL, Moon et al. 2023"),
)  # fmt: skip
