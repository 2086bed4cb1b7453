# SPDX-License-Identifier: Apache-2.0
"""Systems that also draw: an output projector turns the language model's states into a generator's condition.

Of the output projectors the one for images is built where it is a learned-query transformer; generators are recorded.
"""

from dataclasses import replace

from mmkernels.models.config import (
    DropPrefixConfig,
    LinearConfig,
    PerceiverConfig,
    PoolConfig,
    SpreadConfig,
)  # fmt: skip
from mmkernels.models.presets import components as c
from mmkernels.models.presets.linear import ALL, mlp
from mmkernels.models.presets.qformer import qformer
from mmkernels.models.presets.schema import PROJECTORS, READ, RECALLED, Part, Preset, Stage, no_such

OUT = "output_projector.*"
FOUR = "4 signal tokens for 8"

_GILL = Stage(
    (PROJECTORS, OUT), "GILL, Koh et al. 2023, section 3", RECALLED, "and the embeddings of [IMG] tokens"
)  # fmt: skip
GILL = Preset(
    "GILL",
    {"image": replace(c.CLIP_L, published="CLIP ViT-L/14, 224 px, pooled")},
    {
        "image": Part(
            (PoolConfig("prefix"), SpreadConfig(1, 4096)), "Linear from the pooled feature to n tokens, 1 by default",
            "gill gill/models.py:25-45",
        )
    },
    c.OPT_6_7B, _GILL, no_such(_GILL),
    {
        "image": Part(
            c.MAPPER,
            "GILLMapper: transformer of width 512, 4 + 4 layers, 4 heads, MLP 2048, 77 queries -> 768; 8 [IMG] tokens",
            "gill gill/layers.py", READ, FOUR,
        )
    },
    {"image": Part(None, "Stable Diffusion 1.5", "GILL, Koh et al. 2023", RECALLED)},
)  # fmt: skip

_NEXT_HEADS = "the mean for the class token; head's sizes from PandaGPT's copy"
_NEXT = "NExT-GPT NExT-GPT-Lagacy/code/config/base.yaml, model/layers.py"
NEXT_GPT = Preset(
    "NExT-GPT",
    {"image": c.IMAGEBIND, "video": "image", "audio": c.IMAGEBIND_AUDIO},
    {
        "image": Part(
            (PoolConfig("prefix"), PoolConfig("item"), LinearConfig(1024, bias=False), LinearConfig(4096)),
            "ImageBind's head 1280 -> 1024, Linear 1024 -> 4096, one token an item", _NEXT,
        ),
        "video": "image",
        "audio": Part(
            (PoolConfig("item"), LinearConfig(1024, bias=False), LinearConfig(4096)),
            "ImageBind's head 768 -> 1024, Linear 1024 -> 4096, one token an item", _NEXT, READ, _NEXT_HEADS,
        ),
    },
    replace(
        c.VICUNA_7B, published="Vicuna-7B, with LoRA of rank 32 in tuning",
        config=replace(c.VICUNA_7B.config, lora_rank=32, lora_targets=("q_proj", "k_proj", "v_proj", "o_proj")),
        differs="the layers that have LoRA are recalled",
    ),
    Stage(
        ("projectors.image.blocks.3.*", "projectors.audio.blocks.2.*", OUT),
        "NExT-GPT code/config/stage_1.yaml, stage_2.yaml", READ,
        "stage 1 trains the input side, stage 2 the output side; here in one step",
    ),
    Stage(
        ("projectors.image.blocks.3.*", "projectors.audio.blocks.2.*", OUT, "*lora_*"),
        "NExT-GPT code/config/stage_3.yaml", READ,
    ),
    {
        "image": Part(c.MAPPER, "transformer of width 512, 4 + 4 layers, 4 heads, 4 tokens -> 77 x 768", _NEXT),
        "video": Part(None, "transformer of width 512, 4 + 4 layers, 4 heads, 24 tokens -> 77 x 1024", _NEXT),
        "audio": Part(None, "transformer of width 512, 4 + 4 layers, 4 heads, 8 tokens -> 1 x 512", _NEXT),
    },
    {
        "image": Part(None, "Stable Diffusion 1.5", _NEXT),
        "video": Part(None, "zeroscope_v2_576w", _NEXT),
        "audio": Part(None, "AudioLDM-L", _NEXT),
    },
)  # fmt: skip

_MINIGPT5 = Stage(
    ("projectors.image.blocks.1.*", OUT, "*lora_*"), "MiniGPT-5, Zheng et al. 2023", RECALLED,
    "and the embeddings of [IMG] tokens",
)  # fmt: skip
MINIGPT5 = Preset(
    "MiniGPT-5",
    {"image": c.EVA_G},
    {"image": qformer(4096, "MiniGPT-5 model.py:73-113")},
    replace(
        c.VICUNA_7B, published="Vicuna-7B with adapters", differs="rank and layers of the adapters are ours",
        config=replace(c.VICUNA_7B.config, lora_rank=8, lora_targets=("q_proj", "v_proj")),
    ),
    _MINIGPT5, _MINIGPT5,
    {
        "image": Part(
            replace(c.MAPPER, hidden_size=1024, condition_size=1024),
            "MLP 4096 -> d -> d, transformer of Stable Diffusion's width, 4 + 4 layers, 77 queries; 8 [IMG] tokens",
            "MiniGPT-5 model.py:73-113, constants.py", READ, f"one linear layer for the MLP; {FOUR}; heads are ours",
        )
    },
    {"image": Part(None, "Stable Diffusion 2.1 base", "MiniGPT-5 constants.py")},
)  # fmt: skip

_LAVIT = Stage(ALL, "LaVIT, Jin et al. 2023")
LAVIT = Preset(
    "LaVIT",
    {"image": c.EVA_G},
    {
        "image": Part(
            (PerceiverConfig(64, 6, 16, 16, 88, 6144, norm="layer", mlp="gelu"), LinearConfig(4096)),
            "selector and merger of tokens, cross-attention; a number of tokens that follows the image",
            "LaVIT, Jin et al. 2023", RECALLED, "stand-in: a Perceiver with 64 latents; all of its sizes are ours",
        )
    },
    c.LLAMA_7B, _LAVIT, no_such(_LAVIT),
    {"image": Part(None, "MLP or decoder of tokens", "LaVIT, Jin et al. 2023", RECALLED)},
    {"image": Part(None, "Stable Diffusion", "LaVIT, Jin et al. 2023", RECALLED)},
)  # fmt: skip

_DREAM = "DreamLLM, Dong et al. 2023"
DREAMLLM = Preset(
    "DreamLLM",
    {"image": c.CLIP_L},
    {"image": Part((DropPrefixConfig(), LinearConfig(4096)), "Linear", _DREAM, RECALLED)},
    c.VICUNA_7B,
    Stage((PROJECTORS,), _DREAM, RECALLED, "and the output side, which is not built"),
    Stage(ALL, _DREAM, RECALLED, "and the output side, which is not built"),
    {"image": Part(None, "MLP", _DREAM, RECALLED)},
    {"image": Part(None, "Stable Diffusion", _DREAM, RECALLED)},
)  # fmt: skip

_CODI = "CoDi-2, Tang et al. 2023"
CODI_2 = Preset(
    "CoDi-2",
    {"image": c.IMAGEBIND, "video": "image", "audio": c.IMAGEBIND_AUDIO},
    {
        "image": Part(
            (PoolConfig("prefix"), LinearConfig(1024, bias=False), *mlp(4096)), "MLP from ImageBind's features",
            _CODI, RECALLED, "its depth is ours",
        ),
        "video": "image",
        "audio": Part(
            (PoolConfig("item"), LinearConfig(1024, bias=False), *mlp(4096)), "MLP from ImageBind's features", _CODI,
            RECALLED, "its depth is ours; the mean for the class token",
        ),
    },
    replace(
        c.LLAMA2_7B, published="LLaMA-2-7B with LoRA", differs="rank and layers of LoRA are ours",
        config=replace(c.LLAMA2_7B.config, lora_rank=8, lora_targets=("q_proj", "v_proj")),
    ),
    no_such(Stage(("projectors.*.blocks.[23].*", "*lora_*"), _CODI)),
    Stage(("projectors.*.blocks.[23].*", "*lora_*"), _CODI, RECALLED, "and the output side, which is not built"),
    {m: Part(None, "MLP", _CODI, RECALLED) for m in ("image", "video", "audio")},
    {
        "image": Part(None, "Stable Diffusion 2.1", _CODI, RECALLED),
        "video": Part(None, "zeroscope", _CODI, RECALLED),
        "audio": Part(None, "AudioLDM 2", _CODI, RECALLED),
    },
)  # fmt: skip
