# SPDX-License-Identifier: Apache-2.0
"""Systems that answer in text and whose input projector is linear or an MLP, some over pooled or merged tokens."""

from dataclasses import replace

from mmkernels.models.config import (
    DropPrefixConfig,
    LinearConfig,
    MergeConfig,
    NormConfig,
    PoolConfig,
    SwiGLUConfig,
    WrapConfig,
)  # fmt: skip
from mmkernels.models.presets import components as c
from mmkernels.models.presets.schema import PROJECTORS, READ, RECALLED, Part, Preset, Stage, no_such

ALL = (PROJECTORS, "language_model.*")


def mlp(width: int) -> tuple[LinearConfig, ...]:
    return LinearConfig(width, act="gelu"), LinearConfig(width)


LLAVA = Preset(
    "LLaVA",
    {"image": c.CLIP_L},
    {
        "image": Part(
            (DropPrefixConfig(), LinearConfig(4096)), "Linear 1024 -> 4096",
            "LLaVA llava/model/multimodal_projector/builder.py:33; sizes recalled", RECALLED,
        )
    },
    c.VICUNA_7B, Stage((PROJECTORS,), "LLaVA, Liu et al. 2023, section 4.2"),
    Stage(ALL, "LLaVA, Liu et al. 2023, section 4.2"),
)  # fmt: skip

LLAVA_15 = Preset(
    "LLaVA-1.5",
    {"image": c.CLIP_L_336},
    {
        "image": Part(
            (DropPrefixConfig(), *mlp(4096)), "Linear 1024 -> 4096, GELU, Linear 4096 -> 4096, biases",
            "transformers llava/modeling_llava.py:88",
        )
    },
    c.VICUNA_7B, Stage((PROJECTORS,), "LLaVA scripts/v1_5/pretrain.sh", READ),
    Stage(ALL, "LLaVA scripts/v1_5/finetune.sh", READ),
)  # fmt: skip

SHIKRA = Preset(
    "Shikra",
    {"image": replace(c.CLIP_L, published="CLIP ViT-L/14, 224 px, layer -2, 256 tokens",
                      differs=f"{c.PRE_NORM}; features of the last layer")},
    {"image": Part((DropPrefixConfig(), LinearConfig(4096)), "Linear 1024 -> 4096",
                   "shikra config/_base_/model/shikra.py; 4096 recalled")},
    c.VICUNA_7B, Stage(ALL, "Shikra, Chen et al. 2023"), Stage(ALL, "Shikra, Chen et al. 2023"),
)  # fmt: skip

_CHATSPOT = "ChatSpot, Zhao et al. 2023"
CHATSPOT = Preset(
    "ChatSpot",
    {"image": c.CLIP_L},
    {"image": Part((DropPrefixConfig(), LinearConfig(4096)), "Linear 1024 -> 4096", _CHATSPOT, RECALLED)},
    c.VICUNA_7B, Stage((PROJECTORS,), _CHATSPOT), Stage(ALL, _CHATSPOT),
)  # fmt: skip

_BIND = Stage(("projectors.*.blocks.3.*", "*lora_*"), "PandaGPT, Su et al. 2023")
PANDAGPT = Preset(
    "PandaGPT",
    {"image": c.IMAGEBIND, "video": "image", "audio": c.IMAGEBIND_AUDIO},
    {
        "image": Part(
            (PoolConfig("prefix"), PoolConfig("item"), LinearConfig(1024, bias=False), LinearConfig(5120)),
            "ImageBind's head 1280 -> 1024, Linear 1024 -> D, one token an item",
            "PandaGPT imagebind_model.py:496-521, openllama.py:113", READ, "one layer for each modality's encoder",
        ),
        "video": "image",
        "audio": Part(
            (PoolConfig("item"), PoolConfig("item"), LinearConfig(1024, bias=False), LinearConfig(5120)),
            "ImageBind's head 768 -> 1024, Linear 1024 -> D, one token an item",
            "PandaGPT imagebind_model.py:496-521, openllama.py:113", READ,
            "the mean for the class token; one layer for each modality's encoder",
        ),
    },
    replace(
        c.VICUNA_13B, published="Vicuna-13B with LoRA",
        config=replace(c.VICUNA_13B.config, lora_rank=32, lora_targets=("q_proj", "k_proj", "v_proj", "o_proj")),
    ),
    no_such(_BIND), _BIND,
)  # fmt: skip

_PALI_X = Stage(ALL, "PaLI-X, Chen et al. 2023")
PALI_X = Preset(
    "PaLI-X",
    {"image": c.VIT_22B},
    {"image": Part((LinearConfig(4096),), "Linear", _PALI_X.source, RECALLED, "to the width of our stand-in")},
    c.UL2_32B, _PALI_X, _PALI_X,
)  # fmt: skip

VIDEO_CHATGPT = Preset(
    "Video-ChatGPT",
    {"video": c.CLIP_L},
    {
        "video": Part(
            (PoolConfig("time_and_space"), LinearConfig(4096)),
            "100 frames: means over space (100 tokens), then over time (256), Linear 1024 -> 4096",
            "Video-ChatGPT save_spatio_temporal_clip_features.py:46",
        )
    },
    c.VICUNA_7B, no_such(Stage((PROJECTORS,), "Video-ChatGPT, Maaz et al. 2023")),
    Stage((PROJECTORS,), "Video-ChatGPT, Maaz et al. 2023"),
)  # fmt: skip

_MINIGPT_V2 = Stage((PROJECTORS, "*lora_*"), "MiniGPT-v2, Chen et al. 2023, section 3")
MINIGPT_V2 = Preset(
    "MiniGPT-v2",
    {"image": c.EVA_G_448},
    {
        "image": Part(
            (DropPrefixConfig(), MergeConfig(1, 4), LinearConfig(4096)),
            "4 tokens in raster order side by side, Linear 5632 -> 4096, 256 tokens",
            "MiniGPT-4 minigpt4/models/minigpt_v2.py:63-90",
        )
    },
    replace(
        c.LLAMA2_7B, published="LLaMA-2-7B with LoRA",
        config=replace(c.LLAMA2_7B.config, lora_rank=64, lora_targets=("q_proj", "v_proj")),
    ),
    _MINIGPT_V2, _MINIGPT_V2,
)  # fmt: skip

_COGVLM = Stage(
    (PROJECTORS,), "CogVLM, Wang et al. 2023, section 2", RECALLED, "and the visual expert, which is not built"
)  # fmt: skip
COGVLM = Preset(
    "CogVLM",
    {"image": c.EVA_E},
    {
        "image": Part(
            (
                DropPrefixConfig(), LinearConfig(4096, bias=False), NormConfig(act="gelu"), SwiGLUConfig(4096, 11008),
                WrapConfig(),
            ),
            "Linear without bias 1792 -> 4096, LayerNorm, GELU, SwiGLU; a vector before and behind",
            "CogVLM utils/models/cogvlm_model.py:18,75",
        )
    },
    replace(c.VICUNA_7B, published="Vicuna-7B with a visual expert in each layer",
            differs="the visual expert, weights of their own for image tokens, is not built"),
    _COGVLM, _COGVLM,
)  # fmt: skip

_QWEN_AUDIO = "Qwen-Audio, Chu et al. 2023"
QWEN_AUDIO = Preset(
    "Qwen-Audio",
    {"audio": c.WHISPER},
    {
        "audio": Part(
            (LinearConfig(4096),), "Linear 1280 -> 4096", "transformers qwen2_audio/modeling_qwen2_audio.py:404"
        )
    },
    c.QWEN_7B, Stage(("encoders.*", PROJECTORS), _QWEN_AUDIO), Stage(("language_model.*",), _QWEN_AUDIO),
)  # fmt: skip

VILA = Preset(
    "VILA",
    {"image": c.SIGLIP_448},
    {
        "image": Part(
            (MergeConfig(2, 2, pad=True), NormConfig(), *mlp(3584)),
            "mlp_downsample: 2 x 2 merged, an odd side padded with zeros, LayerNorm, Linear, GELU, Linear",
            "VILA base_projector.py:40-210", READ, "NVILA-Lite's mlp_downsample_3x3_fix is not the one built",
        )
    },
    c.QWEN2_7B, Stage((PROJECTORS,), "VILA scripts/NVILA-Lite/align.sh", READ),
    Stage(("encoders.*", *ALL), "VILA scripts/NVILA-Lite/sft.sh", READ),
)  # fmt: skip

_INTERNVL = (
    "InternVL internvl_chat/shell/internvl2.5/{}/internvl2_5_8b_internlm2_5_7b_dynamic_res_{}.sh"
)
INTERNVL = Preset(
    "InternVL",
    {"image": c.INTERNVIT},
    {
        "image": Part(
            (DropPrefixConfig(), MergeConfig(2, 2), NormConfig(eps=1e-5), *mlp(4096)),
            "2 x 2 merged (pixel shuffle 0.5), LayerNorm over 4096, Linear, GELU, Linear, 256 tokens",
            "InternVL modeling_internvl_chat.py:89,257-290",
        )
    },
    c.INTERNLM2_7B, Stage((PROJECTORS,), _INTERNVL.format("stage1", "stage1"), READ),
    Stage(("encoders.*", *ALL), _INTERNVL.format("stage2", "stage2"), READ),
)  # fmt: skip
